"""Names of Co-DETR's auxiliary heads in the files of Sense-X/Co-DETR: those of mmdet's heads."""

from __future__ import annotations

from detfamily.checkpoints.adapter import Rename


def rules(ours: str = "", official: str = "") -> tuple[Rename, ...]:
    """Of ``FasterRCNN`` and ``ATSS``, as "faster_rcnn" and "atss".

    Args:
        ours: what stands before our names.
        official: what stands before the official ones.
    """
    pairs = {
        "faster_rcnn.rpn.conv.{rest}": "rpn_head.rpn_conv.{rest}",
        "faster_rcnn.rpn.class_head.{rest}": "rpn_head.rpn_cls.{rest}",
        "faster_rcnn.rpn.box_head.{rest}": "rpn_head.rpn_reg.{rest}",
        "faster_rcnn.roi.shared.{rest}": "roi_head.0.bbox_head.shared_fcs.{rest}",
        "faster_rcnn.roi.class_head.{rest}": "roi_head.0.bbox_head.fc_cls.{rest}",
        "faster_rcnn.roi.box_head.{rest}": "roi_head.0.bbox_head.fc_reg.{rest}",
        "atss.class_tower.{n}.conv.{rest}": "bbox_head.0.cls_convs.{n}.conv.{rest}",
        "atss.class_tower.{n}.norm.{rest}": "bbox_head.0.cls_convs.{n}.gn.{rest}",
        "atss.box_tower.{n}.conv.{rest}": "bbox_head.0.reg_convs.{n}.conv.{rest}",
        "atss.box_tower.{n}.norm.{rest}": "bbox_head.0.reg_convs.{n}.gn.{rest}",
        "atss.class_head.{rest}": "bbox_head.0.atss_cls.{rest}",
        "atss.box_head.{rest}": "bbox_head.0.atss_reg.{rest}",
        "atss.centerness_head.{rest}": "bbox_head.0.atss_centerness.{rest}",
        "atss.scales.{n}": "bbox_head.0.scales.{n}.scale",
    }
    return tuple(Rename(ours + name, (official + theirs,)) for name, theirs in pairs.items())
