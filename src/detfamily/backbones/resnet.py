"""ResNet (arXiv 1512.03385) and ResNeXt (arXiv 1611.05431) from torchvision, frozen the way the DETR line does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, cast

import torchvision
from torch import Tensor, nn

from detfamily.backbones.fold import conv_norm
from detfamily.backbones.weights import naming, read_state
from detfamily.errors import CheckpointError

_STAGES = {2: "layer1", 3: "layer2", 4: "layer3", 5: "layer4"}


class ResNet(nn.Module):
    """C2 to C5 of a torchvision ResNet.

    Args:
        name: of the network in torchvision.
        stages: which of C2..C5 to give, ascending.
        norm: factory of the norms, called with the number of channels.
        frozen_stages: stages without gradient from the stem (C1) on: 2 freezes stem and layer1, as officially.
        dilation: dilate C5 instead of striding, "DC5": twice the resolution.
        weights: "imagenet" for torchvision's first ImageNet weights (those of the papers; downloaded on first use), a
            path of a state dict, or None for random weights.

    Raises:
        ValueError: stages out of range; dilation with a network that has no bottlenecks.
        CheckpointError: weights cannot be downloaded or read.
    """

    def __init__(
        self,
        name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext101_64x4d"],
        stages: Sequence[int],
        norm: Callable[[int], nn.Module],
        frozen_stages: int,
        dilation: bool = False,
        weights: str | None = "imagenet",
    ) -> None:
        super().__init__()
        check_stages(stages, _STAGES)
        basic = name in ("resnet18", "resnet34")
        if dilation and basic:
            raise ValueError(f"backbone.dilation=true needs bottlenecks, which {name} has not: use resnet50 or deeper")
        if not 0 <= frozen_stages <= 5:
            raise ValueError(f"backbone.frozen_stages={frozen_stages}: expected 0 (nothing) to 5 (everything)")
        body = getattr(torchvision.models, name)(
            norm_layer=norm, **({"replace_stride_with_dilation": [False, False, True]} if dilation else {})
        )
        if weights is not None:
            _load(body, _read_weights(name, weights), weights)
        del body.fc, body.avgpool
        self.body = body
        self.stages = tuple(stages)
        base = 64 if basic else 256
        self.channels = [base * 2 ** (stage - 2) for stage in stages]
        self.strides = [2 ** (4 if dilation and stage == 5 else stage) for stage in stages]
        self._freeze(frozen_stages)

    def _freeze(self, frozen_stages: int) -> None:
        frozen = ["conv1", "bn1"] if frozen_stages >= 1 else []
        frozen += [name for stage, name in _STAGES.items() if stage <= frozen_stages]
        for name in frozen:
            self.body.get_submodule(name).requires_grad_(False)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> [(B, c, h, w)]"""
        x = self.body.maxpool(conv_norm(self.body.conv1, self.body.bn1, pixels).relu_())
        maps = []
        for stage in range(2, self.stages[-1] + 1):
            for block in self.body.get_submodule(_STAGES[stage]).children():
                x = _run_block(block, x)
            if stage in self.stages:
                maps.append(x)
        return maps


def _run_block(block: nn.Module, x: Tensor) -> Tensor:
    """A block of two or three convolutions, as torchvision's own forward but for folded norms."""
    branch, count = x, 3 if hasattr(block, "conv3") else 2
    for index in range(1, count + 1):
        conv, norm = block.get_submodule(f"conv{index}"), block.get_submodule(f"bn{index}")
        branch = conv_norm(cast("nn.Conv2d", conv), norm, branch)
        branch = branch.relu_() if index < count else branch
    if block.downsample is not None:
        conv, norm = cast("nn.Sequential", block.downsample)
        x = conv_norm(cast("nn.Conv2d", conv), norm, x)
    return branch.add_(x).relu_()


def check_stages(stages: Sequence[int], available: Sequence[int] | dict[int, str]) -> None:
    """Raise ValueError unless stages ascend and all are available."""
    if not stages or sorted(set(stages)) != list(stages) or not set(stages) <= set(available):
        raise ValueError(f"model.stages={list(stages)}: expected ascending stages out of {list(available)}")


def _read_weights(name: str, weights: str) -> dict[str, Tensor]:
    if weights == "imagenet":
        try:
            enum = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
            state: dict[str, Tensor] = enum.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:  # no network; a file that came damaged
            raise CheckpointError(
                f"cannot download the ImageNet weights of {name} ({error}): pass backbone.weights=PATH, a torchvision "
                "state dict, or backbone.weights=null to start from random weights"
            ) from error
        return state
    with naming(weights):
        return read_state(weights, {}, otherwise="expected a path, 'imagenet' or")


def _load(body: nn.Module, state: Mapping[str, Tensor], weights: str) -> None:
    """Load all but the classifier, which is not kept; a file of other names must not pass for weights."""
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    try:
        missing, unexpected = body.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"backbone.weights={weights!r} is of another network: {error}") from error
    missing = [name for name in missing if not name.startswith("fc.") and not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise CheckpointError(
            f"backbone.weights={weights!r} is not a torchvision state dict of this network: {len(missing)} names are "
            f"missing {missing[:3]}, {len(unexpected)} are unknown {unexpected[:3]}"
        )
