"""Names of official ImageNet classifiers: a backbone with its head."""

from __future__ import annotations

from torch import nn

from detfamily.backbones.dat import DAT
from detfamily.backbones.resnet import ResNet
from detfamily.backbones.swin import Swin
from detfamily.checkpoints import dat, swin
from detfamily.checkpoints.adapter import Adapter, Rename, Rule
from detfamily.errors import CheckpointError


def classifier_adapter(backbone: nn.Module) -> Adapter:
    """A classifier of ours against the official one with the same backbone: Swin's, DAT's, or torchvision's ResNets.

    The norm before the mean, officially the classifier's, is here that of the backbone's last map.

    Raises:
        CheckpointError: there are no official classifiers with such a backbone.
    """
    if isinstance(backbone, Swin):
        return Adapter([*_head(backbone, "head", "norm"), *swin.rules("backbone.", "")], [r"\.attn_mask$"])
    if isinstance(backbone, DAT):
        adapter = dat.dat_adapter(backbone, "backbone.")
        head = _head(backbone, "cls_head", "cls_norm.norm")
        return Adapter([*head, *adapter.rules], [one.pattern for one in adapter.ignored])
    if isinstance(backbone, ResNet):
        return Adapter([Rename("head.{rest}", ("fc.{rest}",)), Rename("backbone.body.{rest}", ("{rest}",))])
    raise CheckpointError(f"official classifiers are known of Swin, DAT and ResNet, not of {type(backbone).__name__}")


def tables(backbone: nn.Module) -> set[str]:
    """Our names of the position biases that belong to a size of windows or images, and can be interpolated."""
    if isinstance(backbone, DAT):
        return {f"backbone.{name}" for name in dat.tables(backbone)}
    return {f"backbone.{name}" for name in backbone.state_dict() if name.endswith(".attention.position_bias")}


def _head(backbone: Swin | DAT, head: str, norm: str) -> list[Rule]:
    last = len(backbone.stages) - 1
    return [
        Rename("head.{rest}", (f"{head}.{{rest}}",)),
        Rename(f"backbone.stages.{last}.norm.{{rest}}", (f"{norm}.{{rest}}",)),
    ]
