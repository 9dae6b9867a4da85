"""Any timm model that gives feature maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detfamily.backbones.resnet import check_stages
from detfamily.errors import ConfigError, nearest


class TimmBackbone(nn.Module):
    """Maps of a timm model, picked by their reduction: stage k has 1 / 2^k of the image's side.

    Args:
        name: the model's name in timm.
        stages: which stages to give, ascending.
        pretrained: load timm's weights (downloaded on first use).

    Raises:
        ConfigError: timm is not installed, has no such model, or the model gives no feature maps.
        ValueError: the model has no such stage.
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
            reductions = timm.create_model(name, pretrained=False, features_only=True).feature_info.reduction()
        except (RuntimeError, AttributeError) as error:
            raise ConfigError(f"backbone.name={name!r}: timm gives no feature maps for it ({error})") from error
        available = {reduction.bit_length() - 1: index for index, reduction in enumerate(reductions)}
        check_stages(stages, {stage: "" for stage in available})
        self.body = timm.create_model(
            name, pretrained=pretrained, features_only=True, out_indices=tuple(available[stage] for stage in stages)
        )
        self.channels = list(self.body.feature_info.channels())

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> [(B, c, h, w)]"""
        maps: list[Tensor] = self.body(pixels)
        return maps
