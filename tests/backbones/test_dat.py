"""DAT's own parts against loops and properties; the golden cases compare whole networks with the official code."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from detfamily.attention import (
    DeformableAttention,
    DenseAttention,
    MSDeformAttention,
    NeighborhoodAttention,
    WindowAttention,
)
from detfamily.attention.deformable_position import TableBias
from detfamily.backbones.dat import CONV, DAT, ConvBlock, ConvStem, PatchStem, StridedMerge
from detfamily.backbones.dat_blocks import ConvFeedForward, MixFeedForward
from detfamily.backbones.dat_weights import PAGES
from detfamily.blocks.layers import FeedForward
from detfamily.build import build_criterion, build_detector
from detfamily.checkpoints.dat import PREFIX, dat_adapter
from detfamily.config import build, compose
from detfamily.config.registry import configs_dir
from detfamily.errors import CheckpointError, ConfigError
from detfamily.structures import Images, Targets

PLAIN = partial(FeedForward, activation=nn.GELU)


def attentions(size: int = 8, window: int = 3) -> dict[str, Callable[..., nn.Module]]:
    def deformable(stage: int) -> Callable[..., nn.Module]:
        bias = partial(TableBias, size=(size // 2**stage, size // 2**stage))
        return partial(
            DeformableAttention, num_groups=1, stride=max(2 // 2**stage, 1), kernel_size=3, position_bias=bias
        )

    return {
        "neighborhood": partial(NeighborhoodAttention, kernel_size=3),
        "window": partial(WindowAttention, window_size=window),
        **{f"deformable{stage}": deformable(stage) for stage in range(3)},
    }


def dat(**settings: Any) -> DAT:
    given = {
        **{"embed_dim": 8, "depths": [2, 2, 3], "num_heads": [1, 2, 4], "attention": attentions(), "stem": ConvStem},
        **{"spec": [["neighborhood", "deformable0"], ["window", "deformable1"], ["neighborhood", CONV, "deformable2"]]},
        **{"ffn": ConvFeedForward, "merge_kernel": 3, "stages": [2, 3, 4], "drop_path": 0.0, "conv_kernel": 3},
    }
    return DAT(**{**given, **settings})


def moved(backbone: DAT) -> DAT:
    """Away from its start, where norms do nothing."""
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


# --------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("size", [(96, 64), (65, 130), (40, 33)])
def test_maps_of_any_size(size: tuple[int, int]) -> None:
    """With padding, sizes are rounded up at each step; without, down."""
    pixels = torch.randn(2, 3, *size)
    for settings, rounded in (
        ({}, lambda side: [-(-side // 4), -(-side // 8), -(-side // 16)]),
        ({"stem": PatchStem, "merge_kernel": 2}, lambda side: [side // 4, side // 8, side // 16]),
    ):
        backbone = dat(**settings).eval()
        maps = backbone(pixels)
        assert backbone.channels == [8, 16, 32]
        heights, widths = (rounded(side) for side in size)
        for channels, h, w, one in zip(backbone.channels, heights, widths, maps, strict=True):
            assert one.shape == (2, channels, h, w) and bool(one.isfinite().all())


def test_images_that_are_too_small() -> None:
    backbone = dat(stem=PatchStem, merge_kernel=2, spec=[["window"]] * 3)
    assert backbone(torch.randn(1, 3, 16, 16))[-1].shape == (1, 32, 1, 1)
    for size, found in (((8, 8), "a map of 1 x 1"), ((40, 3), "a map of 40 x 3")):
        with pytest.raises(ValueError, match=rf"{found} is too small for the \d x \d convolutions"):
            backbone(torch.randn(1, 3, *size))


def test_a_stage_is_the_same_whatever_is_given_besides() -> None:
    torch.manual_seed(0)
    whole = moved(dat()).eval()
    pixels = torch.randn(1, 3, 64, 48)
    for stages in ([2], [3], [2, 4]):
        some = dat(stages=stages).eval()
        state = {name: value for name, value in whole.state_dict().items() if name in some.state_dict()}
        some.load_state_dict(state)  # nothing is missing, and nothing is built that is not used
        maps = some(pixels)
        for stage, one in zip(stages, maps, strict=True):
            assert torch.equal(one, whole(pixels)[stage - 2])
        sum(one.sum() for one in maps).backward()
        assert all(parameter.grad is not None for parameter in some.parameters())


# --------------------------------------------------------------------------------------------------------------- parts


def test_stems_and_merges_are_strided_convolutions_with_norms() -> None:
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 17, 22)

    def normed(x: Tensor, norm: nn.Module) -> Tensor:
        mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]

    stem = ConvStem(8)
    x = normed(F.conv2d(pixels, stem.conv1.weight, stem.conv1.bias, stride=2, padding=1), stem.norm1)
    x = normed(F.conv2d(F.gelu(x), stem.conv2.weight, stem.conv2.bias, stride=2, padding=1), stem.norm2)
    torch.testing.assert_close(stem(pixels).permute(0, 3, 1, 2), x, rtol=0, atol=1e-5)
    for kernel, padding in ((4, 0), (7, 3)):
        patches = PatchStem(8, kernel, padding)
        x = normed(F.conv2d(pixels, patches.conv.weight, patches.conv.bias, stride=4, padding=padding), patches.norm)
        torch.testing.assert_close(patches(pixels).permute(0, 3, 1, 2), x, rtol=0, atol=1e-5)
    for kernel in (2, 3):
        merge = StridedMerge(8, kernel)
        x = torch.randn(2, 5, 6, 8)
        expected = F.conv2d(x.permute(0, 3, 1, 2), merge.conv.weight, stride=2, padding=kernel // 3)
        torch.testing.assert_close(merge(x).permute(0, 3, 1, 2), normed(expected, merge.norm), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stem", [PatchStem, ConvStem])
def test_a_stem_of_another_width_ends_with_a_linear_layer(stem: Callable[..., nn.Module]) -> None:
    wide = stem(8, stem_dim=6)
    same = stem(6)
    same.load_state_dict({name: value for name, value in wide.state_dict().items() if "proj" not in name})
    pixels = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(wide(pixels), same(pixels) @ wide.proj.weight.t() + wide.proj.bias)


def test_blocks_are_put_together_as_in_the_paper() -> None:
    """Local perception; attention and FFN, each behind a norm and with factors; or a convolution for attention."""
    torch.manual_seed(0)
    settings = {"local_perception": True, "layer_scale": 0.3, "depths": [2], "num_heads": [2], "stages": [2]}
    backbone = moved(dat(spec=[["window", CONV]], ffn=PLAIN, **settings)).eval()
    block, conv = backbone.stages[0].blocks
    assert isinstance(conv, ConvBlock)
    x = torch.randn(2, 5, 6, 8)

    def around(x: Tensor, weights: nn.Conv2d) -> Tensor:
        out = F.conv2d(x.permute(0, 3, 1, 2), weights.weight, weights.bias, padding=1, groups=8)
        return out.permute(0, 2, 3, 1)

    y = x + around(x, block.local.depthwise)
    y = y + block.attention_scale.scale * block.attention.on_map(block.attention_norm(y))
    y = y + block.ffn_scale.scale * block.ffn(block.ffn_norm(y))
    torch.testing.assert_close(block(x), y)
    y = x + around(x, conv.local.depthwise)
    y = y + conv.ffn(conv.ffn_norm(around(y, conv.conv)))
    torch.testing.assert_close(conv(x), y)


def test_the_ffn_of_2022_has_no_residual_around_its_convolution() -> None:
    torch.manual_seed(0)
    ffn = MixFeedForward(4, 6).eval()
    x = torch.randn(2, 3, 5, 4)
    hidden = (x @ ffn.linear1.weight.t() + ffn.linear1.bias).permute(0, 3, 1, 2)
    hidden = F.gelu(F.conv2d(hidden, ffn.depthwise.weight, ffn.depthwise.bias, padding=1, groups=6))
    expected = hidden.permute(0, 2, 3, 1) @ ffn.linear2.weight.t() + ffn.linear2.bias
    torch.testing.assert_close(ffn(x), expected)


def test_kinds_repeat_until_all_blocks_have_one() -> None:
    backbone = dat(depths=[4, 2, 2], spec=[["window", CONV], ["window"], ["neighborhood", "deformable2"]])
    kinds = [[getattr(block, "attention", block) for block in stage.blocks] for stage in backbone.stages]
    assert [[type(one) for one in stage] for stage in kinds] == [
        [WindowAttention, ConvBlock] * 2,
        [WindowAttention] * 2,
        [NeighborhoodAttention, DeformableAttention],
    ]
    assert [stage[0].num_heads for stage in kinds] == [1, 2, 4]


def test_settings_may_differ_from_stage_to_stage() -> None:
    backbone = dat(
        ffn=[PLAIN, ConvFeedForward, PLAIN],
        local_perception=[False, True, False],
        layer_scale=[None, 0.1, 0.2],
        conv_kernel=[3, 5, 7],
        spec=[["window", CONV], ["window", CONV], ["window", CONV, "window"]],
    )
    blocks = [stage.blocks for stage in backbone.stages]
    assert [type(one[0].ffn) for one in blocks] == [FeedForward, ConvFeedForward, FeedForward]
    assert [one[0].local is not None for one in blocks] == [False, True, False]
    assert isinstance(blocks[0][0].ffn_scale, nn.Identity)
    assert [float(one[0].ffn_scale.scale.detach()[0]) for one in blocks[1:]] == pytest.approx([0.1, 0.2])
    assert [one[1].conv.kernel_size for one in blocks] == [(3, 3), (5, 5), (7, 7)]


def test_it_starts_with_pytorchs_own_weights() -> None:
    """In the windows and FFNs too, which start otherwise in a Swin or in an encoder."""
    torch.manual_seed(0)
    backbone = dat(embed_dim=64, num_heads=[2, 4, 8], ffn=PLAIN, spec=[["window"]] * 3)
    for linear in (backbone.stages[1].blocks[0].attention.qkv, backbone.stages[1].blocks[0].ffn.linear2):
        bound = linear.in_features**-0.5
        for values in (linear.weight, linear.bias):
            assert 0.9 * bound < float(values.detach().abs().max()) <= bound
    assert float(backbone.stages[2].blocks[0].attention.position_bias.detach().std()) == pytest.approx(0.01, rel=0.2)


# ------------------------------------------------------------------------------------------------------- any attention


@cache
def encoder_attentions() -> dict[str, DictConfig]:
    names = sorted(path.stem for path in (configs_dir() / "encoder_attention").glob("*.yaml"))
    sizes = ["family=deformable_detr", "model.stages=[5]", "model.num_levels=1"]
    return {name: compose("train", [*sizes, f"encoder_attention={name}"]).encoder_attention for name in names}


@pytest.mark.parametrize("name", sorted(path.stem for path in (configs_dir() / "encoder_attention").glob("*.yaml")))
def test_every_attention_of_an_encoder_can_be_in_a_block(name: str) -> None:
    torch.manual_seed(0)
    attention = {"any": build(encoder_attentions()[name])}
    backbone = dat(
        embed_dim=64, depths=[1, 1], num_heads=[8, 8], spec=[["any"], ["any"]], attention=attention, stages=[2, 3]
    )
    maps = backbone(torch.randn(2, 3, 40, 56))
    assert [one.shape for one in maps] == [(2, 64, 10, 14), (2, 128, 5, 7)]
    sum(one.square().sum() for one in maps).backward()
    for parameter in backbone.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())


def test_dense_and_sampling_attention_see_the_map_as_an_encoder_does() -> None:
    torch.manual_seed(0)
    one_stage = {"depths": [1], "num_heads": [2], "stages": [2], "spec": [["any"]]}
    for make in (
        partial(DenseAttention, dropout=0.0),
        partial(MSDeformAttention, num_levels=1, num_points=2),
    ):
        backbone = moved(dat(attention={"any": make}, **one_stage)).eval()
        attention = backbone.stages[0].blocks[0].attention
        seen = []
        attention.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs))
        backbone(torch.randn(1, 3, 8, 12))
        ((query, source),) = seen
        assert query is source and query.content.shape == (1, 6, 8) and query.grid.shapes == ((2, 3),)
        expected = [[(x + 0.5) / 3, (y + 0.5) / 2] for y in range(2) for x in range(3)]
        torch.testing.assert_close(query.reference_points[0], torch.tensor(expected))


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("frozen_stages", range(5))
def test_frozen_stages(frozen_stages: int) -> None:
    backbone = dat(frozen_stages=frozen_stages)
    for name, parameter in backbone.named_parameters():
        part = name.split(".")
        if part[0] == "stages" and part[2] == "norm":
            assert parameter.requires_grad, name
        else:
            stage = 1 if part[0] == "patches" else int(part[1]) + 2
            assert parameter.requires_grad == (stage > frozen_stages), name


def test_branches_are_left_out_more_often_in_deeper_blocks() -> None:
    """Both branches of a block with one probability, which grows evenly from 0; never in evaluation."""
    torch.manual_seed(0)
    backbone = moved(dat(drop_path=0.6))
    rates = [block.drop_path.p for stage in backbone.stages for block in stage.blocks]
    assert rates == pytest.approx([index / 6 * 0.6 for index in range(7)])
    block = backbone.stages[2].blocks[0]
    x = torch.randn(400, 2, 2, 32)
    with torch.no_grad():
        whole, some = block.eval()(x), block.train()(x)
        left_out = (some - x).flatten(1).abs().amax(1) == 0
    assert float(left_out.float().mean()) == pytest.approx(block.drop_path.p**2, abs=0.06)
    assert not bool(((whole - x).flatten(1).abs().amax(1) == 0).any())


def test_what_is_frozen_loses_no_branch() -> None:
    torch.manual_seed(0)
    backbone = moved(dat(frozen_stages=3, drop_path=0.9))
    pixels = torch.randn(4, 3, 48, 48)
    with torch.no_grad():
        evaluated, trained = backbone.eval()(pixels), backbone.train()(pixels)
    for one, other in zip(trained[:2], evaluated[:2], strict=True):
        assert torch.equal(one, other)
    assert not torch.allclose(trained[2], evaluated[2])


def test_checkpointed_blocks_run_twice_and_give_the_same() -> None:
    torch.manual_seed(0)
    settings = {"drop_path": 0.5, "local_perception": True}
    plain = moved(dat(**settings))
    saving = dat(gradient_checkpointing=True, **settings)
    saving.load_state_dict(plain.state_dict())
    runs: list[nn.Module] = []
    blocks = [block for stage in saving.stages for block in stage.blocks]
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: runs.append(module))
    pixels = torch.randn(3, 3, 40, 48)
    results = []
    for backbone in (plain, saving):
        torch.manual_seed(2)
        maps = backbone(pixels)
        sum(one.square().sum() for one in maps).backward()
        results.append((maps, {name: one.grad for name, one in backbone.named_parameters()}))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(one, other)
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name
    assert len(runs) == 2 * len(blocks)


def test_bfloat16_is_near() -> None:
    torch.manual_seed(0)
    backbone = dat(local_perception=True).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = backbone(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            rough = backbone(pixels)
    for one, other in zip(exact, rough, strict=True):
        torch.testing.assert_close(other.float(), one, rtol=0, atol=0.15)


# ------------------------------------------------------------------------------------------------------------- weights


def official_file(backbone: DAT, detection: bool = False) -> dict[str, Tensor]:
    return dat_adapter(backbone, image_size=32, detection=detection).to_official(backbone.state_dict(), computed=True)


def classifier(backbone: DAT) -> dict[str, Tensor]:
    """A file of ImageNet weights, with all that a classifier has besides."""
    state = {name: value for name, value in official_file(backbone).items() if not name.startswith("norms.")}
    return {**state, "cls_norm.norm.weight": torch.ones(32), "cls_head.weight": torch.ones(5, 32)}


@pytest.mark.parametrize("stages", [[2, 3, 4], [2], [3]])
@pytest.mark.parametrize("wrapped", [True, False])
def test_weights_of_a_classifier(tmp_path: Path, stages: list[int], wrapped: bool) -> None:
    torch.manual_seed(0)
    source = moved(dat(layer_scale=0.5))
    state = classifier(source)
    torch.save({"model": state, "epoch": 3} if wrapped else state, tmp_path / "a.pth")
    backbone = dat(layer_scale=0.5, stages=stages, weights=str(tmp_path / "a.pth"))
    for name, value in backbone.state_dict().items():
        if name.split(".")[2] == "norm":  # which no classifier has
            assert torch.equal(value, torch.full_like(value, float(name.endswith("weight")))), name
        else:
            assert torch.equal(value, source.state_dict()[name]), name


@pytest.mark.parametrize("stages", [[2, 3, 4], [3]])
def test_weights_of_a_detector(tmp_path: Path, stages: list[int]) -> None:
    torch.manual_seed(0)
    source = moved(dat(layer_scale=0.5))
    state = {PREFIX + name: value for name, value in official_file(source, detection=True).items()}
    state |= {"neck.lateral_convs.0.conv.weight": torch.ones(4, 8, 1, 1)}
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, tmp_path / "a.pth")
    backbone = dat(layer_scale=0.5, stages=stages, weights=str(tmp_path / "a.pth"))
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_tables_for_other_sizes_are_interpolated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    source = moved(dat())
    torch.save({"model": classifier(source)}, tmp_path / "a.pth")
    with caplog.at_level(logging.WARNING):
        backbone = dat(attention=attentions(size=12, window=4), weights=str(tmp_path / "a.pth"))
    sizes = ("15 x 15 to 23 x 23", "7 x 7 to 11 x 11", "3 x 3 to 5 x 5", "5 x 5 to 7 x 7")
    assert all(size in caplog.text for size in sizes)
    found, stored = backbone.state_dict(), source.state_dict()
    name = "stages.0.blocks.1.attention.position_bias.table"
    torch.testing.assert_close(found[name], F.interpolate(stored[name][None], size=(23, 23), mode="bicubic")[0])
    name = "stages.1.blocks.0.attention.position_bias"
    for head in range(2):
        grid = stored[name][:, head].reshape(1, 1, 5, 5)
        expected = F.interpolate(grid, size=(7, 7), mode="bicubic").flatten()
        torch.testing.assert_close(found[name][:, head], expected)
    caplog.clear()
    dat(weights=str(tmp_path / "a.pth"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "rpb" not in k}, r"it misses stages\.0\.attns\.0\.rpb, stages\.2"),
        (lambda s: {**s, "stages.0.attns.0.rpb": torch.zeros(1, 9, 9)}, r"another shape stages\.0\.attns\.0\.rpb$"),
        (lambda s: {**s, "stages.0.attns.2.rpb": torch.zeros(1, 5, 5)}, r"a counterpart: stages\.0\.attns\.2\.rpb$"),
        (lambda s: {f"module.{name}": value for name, value in s.items()}, r"without a counterpart: module\."),
        (lambda s: {**s, "epoch": 3}, r"it holds no state dict"),
        (lambda s: [1, 2], r"it holds no state dict"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    torch.save(change(classifier(dat())), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"backbone\.weights='.*a\.pth' cannot be used: .*{message}"):
        dat(weights=str(tmp_path / "a.pth"))


def test_official_names_tell_where_the_file_is() -> None:
    for name, page in PAGES.items():
        with pytest.raises(CheckpointError, match=rf"'{name}' .* {page}; pass backbone\.weights=PATH.*=null"):
            dat(weights=name)
    with pytest.raises(CheckpointError, match=r"no such file.*did you mean.*'dat_pp_tiny_in1k_224'"):
        dat(weights="dat_pp_tiny")


# ------------------------------------------------------------------------------------------------------------- configs

# of the official configs: width, depths, letters, heads, groups, drop path, millions of parameters with a classifier
PUBLISHED = {
    "dat_t": (96, [2, 2, 6, 2], ["LS", "LS", "LDLDLD", "LD"], [3, 6, 12, 24], [3, 6], 0.2, 28.32),
    "dat_s": (96, [2, 2, 18, 2], ["LS", "LS", "LD" * 9, "LD"], [3, 6, 12, 24], [3, 6], 0.3, 49.70),
    "dat_b": (128, [2, 2, 18, 2], ["LS", "LS", "LD" * 9, "LD"], [4, 8, 16, 32], [4, 8], 0.5, 87.88),
    "dat_b_384": (128, [2, 2, 18, 2], ["LS", "LS", "LD" * 9, "LD"], [4, 8, 16, 32], [4, 8], 0.5, 88.18),
    "dat_plus": (64, [2, 4, 18, 2], ["ND", "NDND", "ND" * 9, "DD"], [2, 4, 8, 16], [1, 2, 4, 8], 0.2, 22.77),
    "datpp_t": (64, [2, 4, 18, 2], ["ND", "NDND", "ND" * 9, "DD"], [2, 4, 8, 16], [1, 2, 4, 8], 0.2, 23.96),
    "datpp_s": (96, [2, 4, 18, 2], ["ND", "NDND", "ND" * 9, "DD"], [3, 6, 12, 24], [1, 2, 3, 6], 0.4, 53.13),
    "datpp_b": (128, [2, 4, 18, 2], ["ND", "NDND", "ND" * 9, "DD"], [4, 8, 16, 32], [2, 4, 8, 16], 0.7, 93.69),
}


def letter(attention: nn.Module) -> str:
    if isinstance(attention, WindowAttention):
        assert attention.shift in (0, -(-attention.window_size // 2))
        return "S" if attention.shift else "L"
    return "D" if isinstance(attention, DeformableAttention) else "N"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_is_the_published_network(name: str) -> None:
    width, depths, letters, heads, groups, rate, millions = PUBLISHED[name]
    cfg = compose("train", ["family=deformable_detr", f"backbone={name}", "backbone.weights=null"])
    with torch.device("meta"):
        backbone: DAT = build(cfg.backbone)
    stages = [[block.attention for block in stage.blocks] for stage in backbone.stages]
    assert ["".join(map(letter, stage)) for stage in stages] == letters
    assert [len(stage) for stage in stages] == depths and [stage[0].num_heads for stage in stages] == heads
    deformable = [stage[-1] for stage in stages if isinstance(stage[-1], DeformableAttention)]
    assert [one.num_groups for one in deformable] == groups
    for one, other in pairwise(deformable):  # sizes for images of one side
        assert one.position_bias.table.shape[-1] == 2 * other.position_bias.table.shape[-1] + 1
    assert backbone.channels == [2 * width, 4 * width, 8 * width]
    parameters = sum(p.numel() for n, p in backbone.named_parameters() if n.split(".")[2] != "norm")
    head = 2 * 8 * width + 1000 * 8 * width + 1000
    assert round((parameters + head) / 1e6, 2) == millions
    assert cfg.backbone.drop_path == rate


def test_every_named_file_of_a_config_is_known() -> None:
    named = {
        name: compose("train", ["family=deformable_detr", f"backbone={name}"]).backbone.weights for name in PUBLISHED
    }
    assert named.pop("dat_plus") is None  # none was published
    assert set(named.values()) <= set(PAGES) and len(set(named.values())) == len(named)


SMALL = (
    *("backbone.embed_dim=8", "backbone.depths=[2,2,2,2]", "backbone.num_heads=[1,2,4,8]", "backbone.weights=null"),
    *("model.embed_dim=32", "model.num_heads=4", "model.ffn_dim=16", "model.num_queries=5"),
    *("encoder.num_layers=1", "decoder.num_layers=1"),
)


def step(*choices: str, size: tuple[int, int]) -> None:
    """One of two images with padding, forward and backward."""
    torch.manual_seed(0)
    cfg = compose("train", [*choices, *SMALL])
    detector = build_detector(cfg, 3).train()
    height, width = size
    pixels = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    inside = (height - 30, width - 20)
    mask = torch.zeros(2, height, width, dtype=torch.bool)
    mask[1, inside[0] :] = mask[1, :, inside[1] :] = True
    images = Images(pixels, mask, (size, inside), (size, inside), (1, 2))
    boxes = torch.tensor([[0.5, 0.5, 0.3, 0.4]])
    targets = Targets.from_lists([torch.tensor([1]), torch.tensor([2])], [boxes, boxes])
    total = build_criterion(cfg)(detector(images, targets), targets).total
    total.backward()
    assert bool(total.isfinite())
    for name, parameter in detector.backbone.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("size", [(96, 96), (128, 160)])
def test_a_training_step_of_a_detector_with_dat_plus_plus(size: tuple[int, int]) -> None:
    groups = [f"backbone.attention.deformable_c{stage}.num_groups=1" for stage in range(2, 6)]
    step("family=dino", "backbone=datpp_t", "backbone.gradient_checkpointing=true", *groups, size=size)


def test_a_training_step_of_a_detector_with_dat() -> None:
    groups = [f"backbone.attention.deformable_c{stage}.num_groups=2" for stage in (4, 5)]
    step("family=deformable_detr", "backbone=dat_t", *groups, size=(128, 96))


@pytest.mark.parametrize(("name", "pattern"), [("datpp_t", None), ("dat_t", "norm|position_bias")])
def test_weight_decay_is_that_of_the_official_detectors(name: str, pattern: str | None) -> None:
    """By parts of official names, which the other tables, of neighborhoods, have not."""
    changed = [f"optimizer.groups.no_decay.pattern={pattern}"] if pattern else []
    chosen = ["family=deformable_detr", f"backbone={name}", "backbone.weights=null", "optimizer=adamw_dat", *changed]
    cfg = compose("train", chosen)
    with torch.device("meta"):
        backbone: DAT = build(cfg.backbone)
    groups = build(cfg.optimizer).build(nn.ModuleDict({"backbone": backbone})).param_groups
    assert {group["lr"] for group in groups} == {2e-4}
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    official = dat_adapter(backbone).official_name
    keys = ("norm", "relative_position_bias_table", "rpe_table")
    for ours, parameter in backbone.named_parameters():
        free = any(key in official(ours) for key in keys)
        assert decays[id(parameter)] == (0.0 if free else 0.05), ours


def test_an_attention_is_replaced_on_the_command_line() -> None:
    node = "{_target_:detfamily.attention.DenseAttention,_partial_:true,dropout:0.0}"
    spec = "backbone.spec=[[neighborhood,deformable_c2],[neighborhood,deformable_c3],[neighborhood,dense],[dense]]"
    cfg = compose("train", ["family=detr", "backbone=datpp_t", f"+backbone.attention.dense={node}", spec, *SMALL[:4]])
    with torch.device("meta"):
        backbone: DAT = build(cfg.backbone)
    assert isinstance(backbone.stages[3].blocks[0].attention, DenseAttention)
    assert isinstance(backbone.stages[2].blocks[1].attention, DenseAttention)


def test_there_is_no_dilation() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.dilation"):
        compose("train", ["family=detr", "backbone=datpp_t", "backbone.dilation=true"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": []}, "expected ascending stages out of"),
        ({"stages": [3, 5]}, r"out of \[2, 3, 4\]"),
        ({"frozen_stages": 5}, r"frozen_stages=5: expected 0 \(nothing\) to 4"),
        ({"num_heads": [1, 2]}, r"num_heads=\[1, 2\]: expected a number of blocks and of heads for each stage"),
        ({"num_heads": [3, 2, 4]}, "num_heads=3 does not divide embed_dim=8"),
        ({"drop_path": 1.0}, "drop_path=1.0: expected a probability"),
        ({"spec": [["window"]] * 2}, r"spec lists 2 stages, backbone\.depths 3: expected as many"),
        ({"spec": [["window"] * 3] * 3}, r"spec\[0\] lists 3 kinds for 2 blocks: expected one for each block, or"),
        ({"spec": [["window"], [], ["window"]]}, r"spec\[1\] lists 0 kinds for 2 blocks"),
        ({"spec": [["window", "windows"], *[["window"]] * 2]}, r"spec\[0\] names 'windows', .* did you mean.*'window'"),
        ({"attention": {CONV: DenseAttention}}, r"attention\.conv: this name is taken"),
        ({"merge_kernel": 4}, r"merge_kernel=4: expected 2, or 3 with padding"),
        ({"conv_kernel": 4}, r"conv_kernel=4: expected an odd number"),
        ({"layer_scale": [0.1, 0.1]}, r"layer_scale lists 2 values: expected one, or 3, one for each stage"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dat(**settings)
