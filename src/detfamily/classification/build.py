"""From a config composed from ``classify.yaml`` to the classifier that it describes."""

from __future__ import annotations

from omegaconf import DictConfig

from detfamily.build import start_backbone_anew, with_num_classes
from detfamily.classification.classifier import Classifier
from detfamily.config import build
from detfamily.errors import ConfigError


def build_classifier(cfg: DictConfig, num_classes: int, pretrained: bool = True) -> Classifier:
    """Build a classifier.

    Args:
        cfg: composed from ``classify.yaml``.
        num_classes: columns of the head, from the data set's label map.
        pretrained: start the backbone from the weights that the config names.

    Raises:
        ConfigError: the config sets ``model.num_classes``, or the backbone does not fit.
    """
    given = cfg.model.num_classes
    if given is not None and given != num_classes:
        raise ConfigError(
            f"model.num_classes={given} contradicts the data set, which has {num_classes}: leave it out, it is derived"
        )
    cfg = with_num_classes(cfg, num_classes)
    if not pretrained:
        start_backbone_anew(cfg)
    classifier: Classifier = build(cfg.classifier)
    return classifier
