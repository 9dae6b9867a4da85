"""Weights to start from: torchvision's classifiers give its scores, and heads go over by the classes' names."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from detfamily.backbones.resnet import ResNet
from detfamily.backbones.small import SmallBackbone
from detfamily.backbones.swin import Swin
from detfamily.blocks.normalize import Normalize
from detfamily.checkpoints.classifiers import classifier_adapter
from detfamily.classification.build import build_classifier
from detfamily.classification.classifier import Classifier
from detfamily.classification.weights import read_initial, start_from
from detfamily.config import compose
from detfamily.data.labels import LabelMap
from detfamily.engine import checkpoint
from detfamily.errors import CheckpointError
from detfamily.structures import Images


def labels(*names: str) -> LabelMap:
    return LabelMap.contiguous({"id": index, "name": name} for index, name in enumerate(names))


def swin(window: int = 7) -> Swin:
    return Swin(12, [1, 1, 1, 1], [1, 1, 2, 2], window, [5])


def classifier(backbone: nn.Module, classes: int = 3, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(Normalize(), backbone, classes).eval()


def saved(path, net: Classifier, label_map: LabelMap):
    config = {"classifier": {}}
    content = {"config": config, "template": config, "label_map": label_map.state_dict(), "model": net.state_dict()}
    checkpoint.save(path, content)
    return path


def test_a_resnet_of_torchvision_gives_its_scores(tmp_path, batch):
    torch.manual_seed(1)
    official = torchvision.models.resnet18(num_classes=3).eval()
    torch.save(official.state_dict(), tmp_path / "resnet18.pth")
    ours = classifier(ResNet("resnet18", [5], nn.BatchNorm2d, 0, weights=None))
    report = start_from(ours, read_initial(tmp_path / "resnet18.pth"), labels("a", "b", "c"))
    assert not report.warnings and "taken to be those of the folders" in dict(report.rows)["classes"]
    images, _ = batch(torch.tensor([0, 1]))
    expected = official(ours.normalize(images.pixels, None))
    torch.testing.assert_close(ours(images).logits, expected, atol=1e-5, rtol=1e-5)


def test_official_names_of_swin_go_there_and_back(tmp_path):
    net = classifier(swin())
    official = classifier_adapter(net.backbone).to_official(net.state_dict())
    assert {"norm.weight", "head.bias", "layers.3.blocks.0.attn.proj.weight"} <= official.keys()
    torch.save({"model": official}, tmp_path / "swin.pth")
    other = classifier(swin(), seed=1)
    start_from(other, read_initial(tmp_path / "swin.pth"), labels("a", "b", "c"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


def test_tables_for_other_windows_are_interpolated(tmp_path):
    net = classifier(swin())
    torch.save(classifier_adapter(net.backbone).to_official(net.state_dict()), tmp_path / "swin.pth")
    other = classifier(swin(window=5))
    report = start_from(other, read_initial(tmp_path / "swin.pth"), labels("a", "b", "c"))
    assert dict(report.rows)["tables"] == "4 of position biases, interpolated to another size"
    before, after = (one.backbone.stages[0].blocks[0].attention.position_bias for one in (net, other))
    assert before.shape == (169, 1) and after.shape == (81, 1) and after.abs().sum() > 0
    # Both are fields of the same displacements; bicubic sampling keeps the value in the middle.
    assert after[40].item() == pytest.approx(before[84].item(), rel=1e-5)


def test_rows_of_the_head_go_over_by_name(tmp_path):
    path = saved(tmp_path / "a.pt", classifier(swin()), labels("bird", "cat", "dog"))
    other = classifier(swin(), classes=2, seed=1)
    fresh = other.head.weight[0].clone()
    report = start_from(other, read_initial(path), labels("ant", "cat"))
    weights = checkpoint.load_model(path).weights["head.weight"]
    assert torch.equal(other.head.weight, torch.stack([fresh, weights[1]]))
    assert dict(report.rows)["classes"] == "1 of 2 by name"


def test_what_does_not_fit_is_named(tmp_path):
    path = saved(tmp_path / "a.pt", classifier(swin()), labels("a", "b", "c"))
    small = classifier(SmallBackbone(8, [8, 8, 8, 24], [5]))
    with pytest.raises(CheckpointError, match=r"missing: backbone\.stem.*not in this model.*head\.weight \[3, 96\]"):
        start_from(small, read_initial(path), labels("a", "b", "c"))
    with pytest.raises(CheckpointError, match="official classifiers are known of Swin, DAT and ResNet"):
        torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "b.pth")
        start_from(small, read_initial(tmp_path / "b.pth"), labels("a", "b", "c"))
    torch.save([1], tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_initial(tmp_path / "c.pth")


def test_a_part_may_be_taken(tmp_path):
    net = classifier(swin())
    path = saved(tmp_path / "a.pt", net, labels("a", "b", "c"))
    deeper = classifier(Swin(12, [1, 1, 2, 1], [1, 1, 2, 2], 7, [5]), seed=1)
    with pytest.raises(CheckpointError, match="init_partial=true"):
        start_from(deeper, read_initial(path), labels("a", "b", "c"))
    report = start_from(deeper, read_initial(path), labels("a", "b", "c"), partial=True)
    assert report.warnings[0].startswith("missing: backbone.stages.2.blocks.1.")
    assert torch.equal(deeper.head.weight, net.head.weight)


@pytest.mark.parametrize("stages", [[3, 4, 5], [2, 3]])
def test_a_detector_starts_its_backbone_from_a_classifier(tmp_path, stages):
    net = classifier(swin())
    path = saved(tmp_path / "a.pt", net, labels("a", "b", "c"))
    torch.manual_seed(1)
    backbone = Swin(12, [1, 1, 1, 1], [1, 1, 2, 2], 7, stages, weights=str(path))
    theirs = net.backbone.state_dict()
    for name, value in backbone.state_dict().items():
        if name in theirs:
            assert torch.equal(value, theirs[name]), name
        else:
            assert name.startswith(tuple(f"stages.{stage - 2}.norm." for stage in stages))


def test_averaged_weights_are_there_or_not(tmp_path):
    path = saved(tmp_path / "a.pt", classifier(swin()), labels("a", "b", "c"))
    with pytest.raises(CheckpointError, match="no averaged weights"):
        read_initial(path, averaged=True)


def test_classifiers_start_from_the_weights_that_the_config_names_only_where_that_is_asked_for():
    cfg = compose("classify", ["data=shapes"])
    assert cfg.backbone.weights == "swin_tiny_patch4_window7_224" and not cfg.pretrained


SMALL = {
    # golden case: its recipe, and the numbers that make the published network as small
    "tiny_backbone": [
        *("experiment=datpp_t", "backbone.embed_dim=8"),
        *(
            f"backbone.attention.deformable_c{n}.position_bias.size=[{2 ** (6 - n)},{2 ** (6 - n)}]"
            for n in (2, 3, 4, 5)
        ),
    ],
    "tiny_backbone_2022": [
        *("experiment=dat_t", "backbone.embed_dim=8", "backbone.num_heads=[1,2,4,8]"),
        "backbone.attention.window.window_size=3",
        *("backbone.attention.shifted_window.window_size=3", "backbone.attention.shifted_window.shift=2"),
        *("backbone.attention.deformable_c4.num_groups=2", "backbone.attention.deformable_c5.num_groups=4"),
        "backbone.attention.deformable_c4.position_bias.size=[6,6]",
        "backbone.attention.deformable_c5.position_bias.size=[3,3]",
    ],
}


@pytest.mark.parametrize("name", SMALL)
def test_official_classifiers_of_dat_give_their_scores(goldens, tmp_path, name):
    folder = goldens / "dat" / name
    case = json.loads((folder / "case.json").read_text())
    cfg = compose("classify", [*SMALL[name], "data.root=."])
    net = build_classifier(cfg, case["num_classes"], pretrained=False).eval()
    torch.save({"model": load_file(folder / "weights.safetensors")}, tmp_path / "dat.pth")
    names = labels(*(str(index) for index in range(case["num_classes"])))
    assert not start_from(net, read_initial(tmp_path / "dat.pth"), names).warnings
    values = load_file(folder / "io.safetensors")
    pixels = values["image"]
    size = tuple(pixels.shape[-2:])
    images = Images(pixels, torch.zeros(len(pixels), *size, dtype=torch.bool), (size,) * 2, (size,) * 2, (0, 1))
    with torch.no_grad():
        torch.testing.assert_close(net(images).logits, values["out.logits"].float(), atol=5e-5, rtol=1e-4)
