from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.blocks.neck import FPN, BiFPN, ChannelMapper

CHANNELS = [6, 10, 14]
WIDTH = 8


def backbone_maps(channels: Sequence[int] = CHANNELS, requires_grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = [(13, 9), (7, 5), (4, 3)][-len(channels) :]
    return [torch.randn(2, c, *size, requires_grad=requires_grad) for c, size in zip(channels, sizes, strict=True)]


def build(kind: str, channels: Sequence[int], levels: int) -> nn.Module:
    torch.manual_seed(1)
    if kind == "channel_mapper":
        return ChannelMapper(channels, WIDTH, levels, num_groups=4)
    if kind == "projection":
        return ChannelMapper(channels, WIDTH, levels, num_groups=None)
    return FPN(channels, WIDTH, levels) if kind == "fpn" else BiFPN(channels, WIDTH, levels, num_rounds=2)


KINDS = ["channel_mapper", "projection", "fpn", "bifpn"]


@pytest.mark.parametrize(("maps", "levels"), [(1, 1), (1, 3), (2, 2), (3, 3), (3, 4), (3, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_levels_have_one_width_and_halve_in_size(kind: str, maps: int, levels: int) -> None:
    given = backbone_maps(CHANNELS[-maps:])
    neck = build(kind, CHANNELS[-maps:], levels)
    outputs = neck(given)
    sizes = [tuple(one.shape[-2:]) for one in given]
    while len(sizes) < levels:
        h, w = sizes[-1]
        sizes.append(((h + 1) // 2, (w + 1) // 2))
    assert [tuple(one.shape) for one in outputs] == [(2, WIDTH, *size) for size in sizes]
    sum(one.square().sum() for one in outputs).backward()
    for name, parameter in neck.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_levels_than_maps_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"model\.num_levels=2 is less than the 3 maps.*model\.stages"):
        build(kind, CHANNELS, 2)


def test_groups_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"neck\.num_groups=3 does not divide embed_dim=8"):
        ChannelMapper(CHANNELS, WIDTH, 3, num_groups=3)


def test_channel_mapper_by_hand() -> None:
    """The first extra level reads the raw last map, the second one the extra level before it, norm included."""
    maps = backbone_maps()
    neck = build("channel_mapper", CHANNELS, 5)
    sources = [*maps, maps[-1]]
    outputs = neck(maps)
    sources.append(outputs[3])
    for level, (source, output) in enumerate(zip(sources, outputs, strict=True)):
        conv, norm = neck.levels[level]
        step = {} if level < 3 else {"stride": 2, "padding": 1}
        projected = F.conv2d(source, conv.weight, conv.bias, **step)
        torch.testing.assert_close(output, F.group_norm(projected, 4, norm.weight, norm.bias))
        assert not conv.bias.any()
        fans = conv.weight[0].numel() + conv.weight[:, 0].numel()
        assert float(conv.weight.detach().abs().max()) <= (6 / fans) ** 0.5


def test_projection_is_one_convolution() -> None:
    maps = backbone_maps(CHANNELS[-1:])
    neck = build("projection", CHANNELS[-1:], 1)
    (conv, identity) = neck.levels[0]
    assert isinstance(identity, nn.Identity)
    (output,) = neck(maps)
    torch.testing.assert_close(
        output, torch.einsum("bchw,dc->bdhw", maps[0], conv.weight[..., 0, 0]) + conv.bias.view(-1, 1, 1)
    )


def influence(neck: nn.Module, levels: int) -> list[list[bool]]:
    """Which level depends on which map."""
    maps = backbone_maps(requires_grad=True)
    outputs = neck(maps)
    rows = []
    for level in range(levels):
        gradients = torch.autograd.grad(outputs[level].square().sum(), maps, retain_graph=True, allow_unused=True)
        rows.append([one is not None and bool(one.abs().sum() > 0) for one in gradients])
    return rows


def test_who_hears_from_whom() -> None:
    own = [[True, False, False], [False, True, False], [False, False, True], [False, False, True]]
    assert influence(build("channel_mapper", CHANNELS, 4), 4) == own
    down = [[True, True, True], [False, True, True], [False, False, True], [False, False, True]]
    assert influence(build("fpn", CHANNELS, 4), 4) == down
    assert influence(build("bifpn", CHANNELS, 4), 4) == [[True] * 3] * 4


def test_one_bifpn_round_by_hand() -> None:
    """Fast normalised fusion with the convolutions and norms taken away."""
    neck = BiFPN([4, 4], 4, 2, num_rounds=1)
    identity = torch.eye(4)[..., None, None]
    neck.lateral = nn.ModuleList([nn.Identity(), nn.Identity()])
    fine, coarse = torch.rand(1, 4, 4, 6), torch.rand(1, 4, 2, 3)
    (one_round,) = neck.rounds
    for fusion in (one_round.down[0], one_round.up[0]):
        fusion.depthwise, fusion.norm = nn.Identity(), nn.Identity()
        with torch.no_grad():
            fusion.pointwise.weight.copy_(identity)
            fusion.pointwise.bias.zero_()
            fusion.weights.copy_(torch.tensor([0.5, 2.0]))
    outputs = neck([fine, coarse])
    swish = lambda x: x * torch.sigmoid(x)  # noqa: E731
    repeated = coarse.repeat_interleave(2, -1).repeat_interleave(2, -2)
    top = swish((0.5 * fine + 2.0 * repeated) / (2.5 + 1e-4))
    largest = top.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    torch.testing.assert_close(outputs[0], top)
    torch.testing.assert_close(outputs[1], swish((0.5 * coarse + 2.0 * largest) / (2.5 + 1e-4)))
