"""Swin against timm's, where that does the same, and properties; odd sizes are compared with DINO's golden case."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.backbones.swin import Swin
from detfamily.backbones.swin_weights import URLS
from detfamily.build import build_criterion, build_detector
from detfamily.checkpoints.adapter import Adapter
from detfamily.checkpoints.swin import rules
from detfamily.config import compose
from detfamily.config.registry import configs_dir
from detfamily.errors import CheckpointError
from detfamily.structures import Images, Targets


def swin(**settings: object) -> Swin:
    given = {
        **{"embed_dim": 8, "depths": [2, 2, 3], "num_heads": [1, 2, 4], "window_size": 2, "stages": [2, 3, 4]},
        **{"drop_path": 0.0, **settings},
    }
    return Swin(**given)


def moved(backbone: Swin) -> Swin:
    """Away from its start, where biases are zero and norms do nothing."""
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone


@pytest.mark.parametrize(
    ("settings", "channels", "strides"),
    [
        ({}, [8, 16, 32], [4, 8, 16]),
        ({"stages": [3]}, [16], [8]),
        ({"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7, "stages": [2, 5]},
         [96, 768], [4, 32]),
        ({"stages": [3, 4], "dilation": True, "num_heads": [1, 2, 2]}, [16, 16], [8, 8]),
    ],
)  # fmt: skip
def test_channels_and_strides(settings: dict[str, object], channels: list[int], strides: list[int]) -> None:
    with torch.device("meta"):
        backbone = swin(**settings)
        maps = backbone(torch.zeros(2, 3, 128, 96))
    assert backbone.channels == channels
    assert [tuple(one.shape) for one in maps] == [
        (2, c, 128 // stride, 96 // stride) for c, stride in zip(channels, strides, strict=True)
    ]


@pytest.mark.parametrize("size", [(65, 50), (1, 1), (33, 7), (31, 32)])
def test_maps_of_any_size(size: tuple[int, int]) -> None:
    """Sizes are rounded up at each step, as with strided convolutions."""
    maps = swin(window_size=3).eval()(torch.randn(1, 3, *size))
    h, w = (-(-side // 4) for side in size)
    for one in maps:
        assert tuple(one.shape[-2:]) == (h, w) and bool(one.isfinite().all())
        h, w = -(-h // 2), -(-w // 2)


def timm_pair(**settings: float) -> tuple[Swin, nn.Module]:
    """Ours and timm's of the same weights; on maps larger than a window, where timm shifts too."""
    models = pytest.importorskip("timm.models.swin_transformer", reason="the oracle")
    torch.manual_seed(0)
    ours = moved(swin(drop_path=settings.get("drop_path_rate", 0.0)))
    theirs = models.SwinTransformer(
        img_size=64, embed_dim=8, depths=(2, 2, 3), num_heads=(1, 2, 4), window_size=2, num_classes=0, **settings
    )
    official = Adapter(rules("", "")).to_official(ours.state_dict())
    # timm merges patches before a stage, not behind it, and has one norm for all
    state = {
        re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", name): value
        for name, value in official.items()
        if not re.match(r"norm\d", name)
    }
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"norm.weight", "norm.bias"}
    return ours, theirs


def timm_maps(ours: Swin, theirs: nn.Module, pixels: Tensor) -> list[Tensor]:
    """timm's maps behind our norms, which are compared by themselves with nothing."""
    raw = theirs.forward_intermediates(pixels, intermediates_only=True)
    norms = [stage.norm for stage in ours.stages]
    return [
        F.layer_norm(one.permute(0, 2, 3, 1), one.shape[1:2], norm.weight, norm.bias).permute(0, 3, 1, 2)
        for one, norm in zip(raw, norms, strict=True)
    ]


def test_maps_and_gradients_are_those_of_timm() -> None:
    ours, theirs = timm_pair()
    ours.eval(), theirs.eval()
    pixels = torch.randn(2, 3, 64, 64)
    found, expected = ours(pixels), timm_maps(ours, theirs, pixels)
    weights = [torch.randn_like(one) for one in found]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    parameters = [ours.patches.proj.weight, ours.stages[1].blocks[1].attention.position_bias]
    counterparts = [theirs.patch_embed.proj.weight, theirs.layers[1].blocks[1].attn.relative_position_bias_table]
    for maps, leaves in ((found, parameters), (expected, counterparts)):
        total = sum((one * weight).sum() for one, weight in zip(maps, weights, strict=True))
        for leaf, gradient in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
            leaf.grad = gradient
    for one, other in zip(parameters, counterparts, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_branches_are_left_out_as_by_timm() -> None:
    """The same draws in the same order, at rates that grow evenly with depth over all stages."""
    ours, theirs = timm_pair(drop_path_rate=0.7)
    ours.train(), theirs.train()
    pixels = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        torch.manual_seed(1)
        found = ours(pixels)
        torch.manual_seed(1)
        expected = timm_maps(ours, theirs, pixels)
        whole = ours.eval()(pixels)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    assert not torch.allclose(found[-1], whole[-1])


def test_a_stage_is_the_same_whatever_is_given_besides() -> None:
    torch.manual_seed(0)
    whole = moved(swin()).eval()
    pixels = torch.randn(1, 3, 40, 56)
    for stages in ([2], [3], [2, 3]):
        some = swin(stages=stages).eval()
        state = {name: value for name, value in whole.state_dict().items() if name in some.state_dict()}
        some.load_state_dict(state)  # nothing is missing, and nothing is built that is not used
        maps = some(pixels)
        for stage, one in zip(stages, maps, strict=True):
            assert torch.equal(one, whole(pixels)[stage - 2])
        for parameter in some.parameters():
            parameter.grad = None
        sum(one.sum() for one in maps).backward()
        assert all(parameter.grad is not None for parameter in some.parameters())


@pytest.mark.parametrize("frozen_stages", range(5))
def test_frozen_stages(frozen_stages: int) -> None:
    backbone = swin(frozen_stages=frozen_stages)
    for name, parameter in backbone.named_parameters():
        part = name.split(".")
        if part[0] == "stages" and part[2] == "norm":
            assert parameter.requires_grad, name
        else:
            stage = 1 if part[0] == "patches" else int(part[1]) + 2
            assert parameter.requires_grad == (stage > frozen_stages), name


def test_what_is_frozen_loses_no_branch() -> None:
    torch.manual_seed(0)
    backbone = moved(swin(frozen_stages=3, drop_path=0.9))
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        evaluated = backbone.eval()(pixels)
        trained = backbone.train()(pixels)
    assert backbone.training
    for one, other in zip(trained[:2], evaluated[:2], strict=True):
        assert torch.equal(one, other)
    assert not torch.allclose(trained[2], evaluated[2])


def test_checkpointed_blocks_run_twice_and_give_the_same() -> None:
    torch.manual_seed(0)
    plain = moved(swin(drop_path=0.5))
    saving = swin(drop_path=0.5, gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    runs: list[nn.Module] = []
    blocks = [block for stage in saving.stages for block in stage.blocks]
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: runs.append(module))
    pixels = torch.randn(3, 3, 40, 32)
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
    for mode, gradients in ((False, True), (True, False)):
        runs.clear()
        with torch.set_grad_enabled(gradients):
            saving.train(mode)(pixels)
        assert len(runs) == len(blocks)


# ------------------------------------------------------------------------------------------------------------- weights


def classifier(window_size: int = 2) -> dict[str, Tensor]:
    """A file of ImageNet weights, with all that a classifier has besides."""
    torch.manual_seed(3)
    state = Adapter(rules("", "")).to_official(moved(swin(window_size=window_size)).state_dict(), computed=True)
    state = {name: value for name, value in state.items() if not re.match(r"norm\d", name)}
    rest = {"norm.weight": torch.ones(32), "norm.bias": torch.ones(32), "head.weight": torch.ones(5, 32)}
    return {**state, **rest, "head.bias": torch.ones(5), "layers.0.blocks.1.attn_mask": torch.zeros(16, 4, 4)}


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("stages", [[2, 3, 4], [2], [3]])
def test_weights_of_a_classifier(tmp_path: Path, wrapped: bool, stages: list[int]) -> None:
    state = classifier()
    torch.save({"model": state} if wrapped else state, tmp_path / "a.pth")
    backbone = swin(weights=str(tmp_path / "a.pth"), stages=stages)
    loaded = Adapter(rules("", "")).to_official(backbone.state_dict())
    norms = {name for name in loaded if re.match(r"norm\d", name)}
    assert norms == {f"norm{stage - 2}.{part}" for stage in stages for part in ("weight", "bias")}
    for name, value in loaded.items():
        expected = state[name] if name not in norms else torch.full_like(value, float(name.endswith("weight")))
        assert torch.equal(value, expected), name


def test_weights_for_other_windows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = classifier(window_size=4)
    torch.save(state, tmp_path / "a.pth")
    with caplog.at_level(logging.WARNING):
        backbone = swin(weights=str(tmp_path / "a.pth"), window_size=6)
    assert "a.pth: position biases are interpolated to other sizes (7 x 7 to 11 x 11)" in caplog.text
    for stage, heads in enumerate((1, 2, 4)):
        table = state[f"layers.{stage}.blocks.1.attn.relative_position_bias_table"]
        for head in range(heads):
            grid = table[:, head].reshape(1, 1, 7, 7)
            expected = F.interpolate(grid, size=(11, 11), mode="bicubic")[0, 0]
            found = backbone.stages[stage].blocks[1].attention.position_bias
            torch.testing.assert_close(found.detach()[:, head].reshape(11, 11), expected)
    caplog.clear()
    swin(weights=str(tmp_path / "a.pth"), window_size=4)
    assert not caplog.records


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "layers.1.blocks.0.mlp.fc1.bias"), r"it misses layers\.1\.blocks\.0\.mlp\.fc1\.bias$"),
        (lambda s: {**s, "patch_embed.proj.weight": torch.zeros(9, 3, 4, 4)}, r"another shape patch_embed\.proj\.w"),
        (lambda s: {**s, "layers.1.blocks.2.norm1.bias": torch.zeros(16)}, r"it has also layers\.1\.blocks\.2\.norm1"),
        (lambda s: {**s, "absolute_pos_embed": torch.zeros(1, 9, 8)}, r"without a counterpart: absolute_pos_embed$"),
        (lambda s: {f"backbone.{name}": value for name, value in s.items()}, r"without a counterpart: backbone\."),
        (lambda s: {**s, TABLE: torch.zeros(10, 1)}, r"this one has 10$"),
        (lambda s: {**s, "epoch": 3}, r"it holds no state dict"),
        (lambda s: [1, 2], r"it holds no state dict"),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    torch.save(change(classifier()), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"backbone\.weights='.*a\.pth'.* {message}"):
        swin(weights=str(tmp_path / "a.pth"))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_text("<html>")
    with pytest.raises(CheckpointError, match="is a web page"):
        swin(weights=str(tmp_path / "a.pth"))
    with pytest.raises(CheckpointError, match=r"no such file.*did you mean.*'swin_tiny_patch4_window7_224'"):
        swin(weights="swin_tiny_patch4_window7")


def test_official_names_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    state, urls = classifier(), []

    def give(url: str, **_: object) -> dict[str, dict[str, Tensor]]:
        urls.append(url)
        return {"model": state}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", give)
    backbone = swin(weights="swin_tiny_patch4_window7_224")
    assert urls == [
        "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth"
    ]
    assert torch.equal(backbone.patches.proj.weight, state["patch_embed.proj.weight"])


@pytest.mark.parametrize("error", [OSError("no route"), URLError("no route"), RuntimeError("invalid hash value")])
def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(CheckpointError, match=r"swin_tiny_.*failed .*backbone\.weights=PATH.*backbone\.weights=null"):
        swin(weights="swin_tiny_patch4_window7_224")


# ------------------------------------------------------------------------------------------------------------- configs

CONFIGS = sorted(path.stem for path in (configs_dir() / "backbone").glob("swin_*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_of_the_network_that_its_weights_are_named_after(name: str) -> None:
    cfg = compose("train", ["family=deformable_detr", f"backbone={name}"]).backbone
    found = re.fullmatch(r"swin_(tiny|small|base|large)_patch4_window(\d+)_\d+(_22k)?", cfg.weights)
    assert found and cfg.weights in URLS
    assert name.startswith(f"swin_{found[1][0]}") and cfg.window_size == int(found[2])
    # table 7 of arXiv 2103.14030
    width, depth = {"tiny": (96, 6), "small": (96, 18), "base": (128, 18), "large": (192, 18)}[found[1]]
    assert (cfg.embed_dim, list(cfg.depths)) == (width, [2, 2, depth, 2])
    assert [width * 2**stage / heads for stage, heads in enumerate(cfg.num_heads)] == [32] * 4
    assert list(cfg.stages) == [3, 4, 5]


# parameters of the classifiers, in millions, without their heads of 1000 classes (table 1)
@pytest.mark.parametrize(("name", "millions"), [("swin_t", 29), ("swin_s", 50), ("swin_b", 88), ("swin_l", 197)])
def test_published_numbers_of_parameters(name: str, millions: int) -> None:
    cfg = compose("train", ["family=deformable_detr", f"backbone={name}"])
    with torch.device("meta"):
        detector = build_detector(cfg, 3, pretrained=False)
    backbone = sum(parameter.numel() for parameter in detector.backbone.parameters())
    head = 8 * cfg.backbone.embed_dim * 1000
    assert round((backbone + head) / 1e6) in (millions - 1, millions)


def test_a_training_step_on_images_with_padding() -> None:
    small = [f"backbone.{key}" for key in ("embed_dim=8", "depths=[1,2,2,1]", "num_heads=[1,2,2,4]", "weights=null")]
    sizes = ["model.embed_dim=32", "model.num_heads=4", "model.ffn_dim=16", "model.num_queries=5"]
    layers = ["encoder.num_layers=1", "decoder.num_layers=1"]
    cfg = compose("train", ["family=deformable_detr", "backbone=swin_t", *small, *sizes, *layers])
    torch.manual_seed(0)
    detector = build_detector(cfg, 3).train()
    pixels = torch.randint(0, 256, (2, 3, 128, 120), dtype=torch.uint8)
    mask = torch.zeros(2, 128, 120, dtype=torch.bool)
    mask[1, 70:] = mask[1, :, 101:] = True
    images = Images(pixels, mask, ((128, 120), (70, 101)), ((128, 120), (70, 101)), (1, 2))
    boxes = torch.tensor([[0.5, 0.5, 0.3, 0.4]])
    targets = Targets.from_lists([torch.tensor([1]), torch.tensor([2])], [boxes, boxes])
    total = build_criterion(cfg)(detector(images), targets).total
    total.backward()
    assert bool(total.isfinite())
    for name, parameter in detector.backbone.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    other = torch.where(mask[:, None], 255 - pixels, pixels)  # the padding's colour is no part of the image
    with torch.no_grad():
        detector.eval()
        changed = Images(other, mask, images.sizes, images.original_sizes, images.image_ids)
        assert torch.equal(detector(images)["match"].logits, detector(changed)["match"].logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": []}, "expected ascending stages out of"),
        ({"stages": [4, 3]}, "expected ascending stages"),
        ({"stages": [3, 5]}, r"out of \[2, 3, 4\]"),
        ({"frozen_stages": 5}, r"frozen_stages=5: expected 0 \(nothing\) to 4"),
        ({"frozen_stages": -1}, "frozen_stages=-1"),
        ({"num_heads": [1, 2]}, r"num_heads=\[1, 2\]: expected a number of blocks and of heads for each stage"),
        ({"depths": [2, 0, 2]}, r"depths=\[2, 0, 2\]"),
        ({"num_heads": [3, 2, 4]}, "num_heads=3 does not divide embed_dim=8"),
        ({"drop_path": 1.0}, "drop_path=1.0: expected a probability"),
        ({"window_size": 0}, "window_size=0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swin(**settings)
