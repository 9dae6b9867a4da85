"""How many columns a class head has, without the data set at hand."""

from __future__ import annotations

from omegaconf import DictConfig

from detfamily.checkpoints.coco_classes import COLUMNS, coco_label_map
from detfamily.checkpoints.registry import UPSTREAMS
from detfamily.data.coco import CocoData
from detfamily.data.shapes import CLASSES, ShapesData
from detfamily.errors import ConfigError, require_at_least


def columns_of(cfg: DictConfig) -> tuple[int, str]:
    """The number of columns, and where it is from.

    ``info.num_classes`` decides, then published figures, which are of models with the columns of the official code, 91
    or, of Co-DETR, 80; else it is what training with this config would have, where data in COCO's format is taken to
    have COCO's categories.

    Raises:
        ConfigError: nothing of this says it.
    """
    given, target = cfg.info.num_classes, cfg.data._target_
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int):
            raise ConfigError(f"info.num_classes is {given!r}; expected a whole number")
        require_at_least(1, "info.num_classes", given)
        return given, "as info.num_classes asks for"
    upstream = UPSTREAMS.get(cfg.family_name)
    if cfg.published and upstream is not None and upstream.of_mmcv:
        return coco_label_map().num_categories, "as published, one for each category of COCO"
    if cfg.published:
        return COLUMNS, "as published, one for each category id of COCO (info.num_classes=80: one for each category)"
    if target == _path(ShapesData):
        return len(CLASSES), "one for each class of data=shapes"
    if target != _path(CocoData):
        raise ConfigError(f"how many classes {target} has is not known without its data: pass info.num_classes=N")
    if cfg.data.labels == "category_id":
        return COLUMNS, "one for each category id of COCO (other data: info.num_classes=N)"
    return coco_label_map().num_categories, "one for each category of COCO (other data: info.num_classes=N)"


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
