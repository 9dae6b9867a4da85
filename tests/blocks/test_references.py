from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detfamily.blocks.references import CenterReference, LearnedReference, LinearReference, MLPReference

WIDTH = 8


def test_what_they_tell_about_themselves() -> None:
    kinds = {
        "linear": (LinearReference(WIDTH, 5), 2, True, False),
        "perceptron": (MLPReference(WIDTH, 5), 2, True, False),
        "centre": (CenterReference(5), 2, False, False),
        "points": (LearnedReference(5, 2), 2, False, True),
        "boxes": (LearnedReference(5, 4), 4, False, True),
    }
    pos = torch.randn(5, WIDTH)
    for name, (ours, dim, needs_pos, differs) in kinds.items():
        assert (ours.dim, ours.needs_pos, ours.differs) == (dim, needs_pos, differs), name
        points = ours(pos if needs_pos else None)
        assert points.shape == (5, dim) and ((points > 0) & (points < 1)).all(), name
        assert len(points.unique(dim=0)) == (1 if name == "centre" else 5)


def test_linear_reads_points_from_positions_and_starts_without_a_bias() -> None:
    ours, pos = LinearReference(WIDTH, 5), torch.randn(5, WIDTH)
    assert not ours.bias.any() and ours.weight.abs().max() <= (6 / (2 + WIDTH)) ** 0.5
    torch.testing.assert_close(ours(pos), torch.special.expit(pos @ ours.weight.T))


def test_official_conditional_points(goldens: Path) -> None:
    folder = goldens / "conditional_detr" / "base"
    weights, io = load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors")
    ours, place = MLPReference(64, 20), "transformer.decoder.ref_point_head."
    ours.load_state_dict({name.removeprefix(place): x for name, x in weights.items() if name.startswith(place)})
    points = ours(weights["query_embed.weight"])
    torch.testing.assert_close(points.expand(2, -1, -1), io["mid.reference_points"], rtol=0, atol=1e-6)


def test_official_anchors(goldens: Path) -> None:
    folder = goldens / "dab_detr" / "base"
    anchors = load_file(folder / "weights.safetensors")["refpoint_embed.weight"]
    ours = LearnedReference(20)
    ours.load_state_dict({"center_logit": anchors[:, :2], "size_logit": anchors[:, 2:]})
    stored = load_file(folder / "io.safetensors")["mid.reference_points.0"]
    torch.testing.assert_close(ours(None).expand(2, -1, -1), stored, rtol=0, atol=1e-6)


def test_the_centre_stays_the_centre() -> None:
    ours = CenterReference(3)
    assert ours(None).tolist() == [[0.5, 0.5]] * 3
    assert not ours.state_dict() and not list(ours.parameters())


@pytest.mark.parametrize("dim", [2, 4])
def test_learned_anchors_start_from_normal_logits(dim: int) -> None:
    torch.manual_seed(0)
    ours = LearnedReference(4000, dim)
    logits = torch.logit(ours(None)).detach()
    assert abs(float(logits.mean())) < 0.05 and abs(float(logits.std()) - 1) < 0.05
    ours(None).sum().backward()
    names = {"center_logit"} if dim == 2 else {"center_logit", "size_logit"}
    assert {name for name, _ in ours.named_parameters()} == names
    assert all(parameter.grad is not None and parameter.grad.all() for parameter in ours.parameters())


def test_random_centres_are_spread_evenly() -> None:
    torch.manual_seed(0)
    boxes = LearnedReference(8000, 4, random_centers=True)(None).detach()
    for axis in (0, 1):
        ordered = boxes[:, axis].sort().values
        even = (torch.arange(8000) + 0.5) / 8000
        assert float((ordered - even).abs().max()) < 0.025  # Kolmogorov and Smirnov: 2.2 / sqrt(8000)
    sizes = torch.logit(boxes[:, 2:])
    assert abs(float(sizes.std()) - 1) < 0.05


def test_frozen_centres_never_move_and_are_stored() -> None:
    torch.manual_seed(0)
    ours = LearnedReference(6, random_centers=True, freeze_centers=True)
    before = ours(None).detach()
    assert [name for name, _ in ours.named_parameters()] == ["size_logit"]
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, weight_decay=0.1)
    ours(None).square().sum().backward()
    optimizer.step()
    assert torch.equal(ours(None)[:, :2], before[:, :2])
    assert not torch.isclose(ours(None)[:, 2:], before[:, 2:]).any()
    other = LearnedReference(6, random_centers=True, freeze_centers=True)
    assert not torch.equal(other(None)[:, :2], before[:, :2])
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(None), ours(None))
    # weights of learned centres fit in, and the other way round
    LearnedReference(6).load_state_dict(ours.state_dict())


def test_random_centres_without_freezing_move() -> None:
    ours = LearnedReference(6, random_centers=True)
    ours(None).sum().backward()
    assert ours.center_logit.grad is not None and ours.center_logit.grad.all()


@pytest.mark.parametrize("kind", ["linear", "perceptron", "boxes"])
def test_references_have_full_precision(kind: str) -> None:
    ours = {"linear": LinearReference(WIDTH, 5), "perceptron": MLPReference(WIDTH, 5), "boxes": LearnedReference(5)}[
        kind
    ]
    assert ours.bfloat16()(torch.randn(5, WIDTH).bfloat16()).dtype == torch.float32
    assert ours.double()(torch.randn(5, WIDTH).double()).dtype == torch.float64


def test_anchors_are_points_or_boxes() -> None:
    with pytest.raises(ValueError, match=r"query_source\.reference\.dim=3: an anchor is a point \(2\) or a box \(4\)"):
        LearnedReference(5, dim=3)
