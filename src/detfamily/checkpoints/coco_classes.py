"""What the columns of the official class heads stand for: COCO's 80 categories, each at its id."""

from __future__ import annotations

from detfamily.data.labels import LabelMap

COLUMNS = 91
"""Of the official heads: ids 0 to 90, of which 0 is no category."""

_NAMES = {
    1: "person bicycle car motorcycle airplane bus train truck boat",
    10: "traffic_light fire_hydrant",
    13: "stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe",
    27: "backpack umbrella",
    31: "handbag tie suitcase frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard "
    "tennis_racket bottle",
    46: "wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake "
    "chair couch potted_plant bed",
    67: "dining_table",
    70: "toilet",
    72: "tv laptop mouse remote keyboard cell_phone microwave oven toaster sink refrigerator",
    84: "book clock vase scissors teddy_bear hair_drier toothbrush",
}
"""First id of each run of ids without a gap -> the names, with a line for each space inside a name."""


def coco_label_map() -> LabelMap:
    """The 91 columns of the official COCO checkpoints."""
    runs = ((first, index, name) for first, names in _NAMES.items() for index, name in enumerate(names.split()))
    return LabelMap.by_category_id([{"id": first + i, "name": name.replace("_", " ")} for first, i, name in runs])
