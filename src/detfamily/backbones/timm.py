"""Any timm model that gives feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from detfamily.backbones.resnet import check_stages
from detfamily.errors import CheckpointError, ConfigError, nearest


class TimmBackbone(nn.Module):
    """Maps of a timm model, picked by their reduction: stage k has 1 / 2^k of the image's side.

    Args:
        name: the model's name in timm.
        stages: which stages to give, ascending.
        pretrained: load timm's weights (downloaded on first use).

    Raises:
        ConfigError: timm is not installed, has no such model, or the model gives no feature maps.
        ValueError: the model has no such stage.
        CheckpointError: there are no weights, or they cannot be downloaded.
    """

    def __init__(self, name: str, stages: Sequence[int], pretrained: bool = True) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ConfigError("backbone=timm needs the package timm: pip install 'detfamily[timm]'") from error
        if not timm.is_model(name):
            raise ConfigError(f"backbone.name={name!r}: timm has no such model; {nearest(name, timm.list_models())}")
        try:
            info: Any = timm.create_model(name, pretrained=False, features_only=True).feature_info
        except (RuntimeError, AttributeError) as error:
            raise ConfigError(f"backbone.name={name!r}: timm gives no feature maps for it ({error})") from error
        available = {int(reduction).bit_length() - 1: index for index, reduction in enumerate(info.reduction())}
        check_stages(stages, sorted(available))
        indices = [available[stage] for stage in stages]
        try:
            self.body = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=indices)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot get timm's weights of {name} ({error}): choose a model that has some, or pass "
                "backbone.pretrained=false to start from random weights"
            ) from error
        self.channels = [int(info.channels()[index]) for index in indices]
        self.strides = [2**stage for stage in stages]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> [(B, c, h, w)]"""
        maps: list[Tensor] = self.body(pixels)
        return maps
