from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from PIL import Image

from detfamily.blocks.postprocess import SigmoidScores, SoftmaxScores
from detfamily.detector import Detector
from detfamily.errors import ConfigError
from detfamily.structures import Predictions
from detfamily.visualize import canvas, heat, sampling
from detfamily.visualize.explain import KINDS, Request, best_queries, explain, subjects_of
from detfamily.visualize.look import CROSS, ENCODER, Heat, look_at
from detfamily.visualize.sheet import contact_sheet

from .conftest import CLASSES, DETECTORS, one_image, photo

NAMES = CLASSES.by_label()
WORDS = ("what", "layer", "query")


def names_of(
    detector: Detector,
    request: Request,
    scores: torch.nn.Module | None = None,
    monkeypatch: pytest.MonkeyPatch | None = None,
) -> list[str]:
    pixels = photo()
    looks = {"trained": look_at(detector, one_image(pixels))}
    return [name for name, _ in explain(pixels, looks, request, scores or SigmoidScores(), NAMES)]


@pytest.mark.parametrize("name", DETECTORS)
def test_everything_that_a_detector_has_is_drawn(name: str, detectors: Callable[[str], Detector]) -> None:
    scores = SoftmaxScores() if name == "detr" else SigmoidScores()
    pixels = photo()
    looks = {state: look_at(detectors(name), one_image(pixels)) for state in ("trained", "at initialisation")}
    request = Request(query=[3], layer=[-1])
    drawn = dict(explain(pixels, looks, request, scores, NAMES))
    wanted = [
        "boxes",
        "cross_attention-layer2-query3",
        "self_attention-layer2-query3",
        "encoder_attention-layer1-query3",
    ]
    assert list(drawn) == wanted + ["backbone-layer11-query3"] * (name in ("swin", "dat"))
    assert all(isinstance(one, Image.Image) and min(one.size) > 200 for one in drawn.values())


def test_layers_and_queries_are_those_that_were_asked_for(detectors: Callable[[str], Detector]) -> None:
    detector = detectors("deformable_detr")
    only = ["cross_attention"]
    assert names_of(detector, Request(only, "ends", [2])) == [f"{only[0]}-layer{n}-query2" for n in (0, 2)]
    assert names_of(detector, Request(only, "all", [2])) == [f"{only[0]}-layer{n}-query2" for n in (0, 1, 2)]
    assert names_of(detector, Request(only, [-2], [4, 2])) == [f"{only[0]}-layer1-query{n}" for n in (4, 2)]
    names = names_of(detector, Request(["encoder_attention"], [0], place=(0.25, 0.5), level=2))
    assert names == ["encoder_attention-layer0-at-25-50"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(["cross_atention"]), "what='cross_atention': did you mean 'cross_attention'"),
        (
            Request(["backbone"]),
            "what=backbone: this detector has no attention there that could be drawn; there is boxes, cross_attention, "
            "self_attention, encoder_attention",
        ),
        (Request(["encoder_attention"], [2]), "layer=2: encoder_attention has layers 0 to 1, or -2 to -1"),
        (Request(layer=[-4]), "layer=-4: cross_attention has layers 0 to 2"),
        (Request(query=[12]), "query=12: this detector has queries 0 to 11"),
        (
            Request(["encoder_attention"], level=4),
            "level=4: the encoder has levels 0 to 3, of 8x12, 4x6, 2x3, 1x2 cells",
        ),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    request_: Request, message: str, detectors: Callable[[str], Detector]
) -> None:
    with pytest.raises(ConfigError) as caught:
        names_of(detectors("deformable_detr"), request_)
    assert message in str(caught.value)


def test_the_best_queries_answer_for_different_objects() -> None:
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.31, 0.3, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]])
    logits = torch.tensor([[3.0, -9, 9], [1.0, -9, -9], [2.0, -9, -9], [-9, 0.0, -9]])
    predictions = Predictions(torch.stack([-logits, logits])[:, None], torch.stack([boxes * 0, boxes])[:, None])
    assert best_queries(predictions, SigmoidScores(), [0, 1], 5) == [0, 1, 3]  # 2 says what 0 says
    assert best_queries(predictions, SigmoidScores(), [0, 1], 2) == [0, 1]


def test_a_subject_has_the_answer_of_the_last_layer(detectors: Callable[[str], Detector]) -> None:
    look = look_at(detectors("refinement"), one_image(photo()))
    ((subject,), places) = subjects_of(Request(query=[5]), look, SigmoidScores(), NAMES)
    probabilities = look.predictions.logits[-1, 0, 5].sigmoid()
    best = int(probabilities.argmax())
    assert subject.label == best and subject.words == f"query 5 ({NAMES[best]} {float(probabilities[best]):.2f})"
    assert subject.box == look.predictions.boxes[-1, 0, 5].tolist() and subject.place == tuple(subject.box[:2])
    assert places == [subject]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures of the pictures that are drawn."""
    seen: list[Figure] = []

    def note(figure: Figure) -> Image.Image:
        seen.append(figure)
        return Image.new("RGB", (10, 10))

    for module in ("sampling", "heat", "refinement", "relations", "keys"):
        monkeypatch.setattr(f"detfamily.visualize.{module}.to_picture", note)
    return seen


def test_points_are_drawn_where_they_are_sampled(detectors: Callable[[str], Detector], figures: list[Figure]) -> None:
    pixels = photo()
    look = look_at(detectors("refinement"), one_image(pixels))
    list(explain(pixels, {"": look}, Request([CROSS], [1], [3]), SigmoidScores(), NAMES))
    found = look.layers[CROSS][1].sampling(3)
    assert found is not None
    order = found.weights.flatten().argsort(stable=True)
    wanted = found.locations.reshape(-1, 2)[order] * torch.tensor([96, 64])
    (figure,) = figures
    for axes in figure.axes[1:]:
        (points,) = [one for one in axes.collections if isinstance(one, PathCollection)]
        offsets = torch.from_numpy(points.get_offsets().data).float()
        torch.testing.assert_close(offsets.sort(0).values, wanted.sort(0).values)
        sizes = torch.tensor(points.get_sizes())
        assert (sizes.diff() >= 0).all() and float(sizes[-1]) == pytest.approx(80)
    by_head, by_level = (figure.axes[at].collections[0].get_facecolors()[:, :3] for at in (1, 2))
    assert len({tuple(color) for color in by_head}) == 4 and len({tuple(color) for color in by_level}) == 4


def test_boxes_layer_by_layer_are_the_predictions(detectors: Callable[[str], Detector], figures: list[Figure]) -> None:
    pixels = photo()
    look = look_at(detectors("refinement"), one_image(pixels))
    list(explain(pixels, {"": look}, Request(["boxes"], query=[3, 8]), SigmoidScores(), NAMES))
    for axes, query in zip(figures[0].axes, (3, 8), strict=False):
        drawn = [(*one.get_xy(), one.get_width(), one.get_height()) for one in axes.patches]
        for (x, y, w, h), box in zip(drawn, look.predictions.boxes[:, 0, query].tolist(), strict=True):
            assert ((x + w / 2) / 96, (y + h / 2) / 64, w / 96, h / 64) == pytest.approx(box, abs=1e-5)
        label = int(look.predictions.logits[-1, 0, query].argmax())
        scores = look.predictions.logits[:, 0, query, label].sigmoid().tolist()
        assert axes.get_xlabel() == "score " + "  ".join(f"{one:.2f}" for one in scores)


def test_heat_of_several_levels_keeps_its_sum() -> None:
    torch.manual_seed(0)
    fine, coarse = torch.rand(3, 8, 12), torch.rand(3, 4, 6)
    total = heat.on_one_map([Heat(fine, 0), Heat(coarse, 1)])
    torch.testing.assert_close(total.sum((1, 2)), fine.sum((1, 2)) + coarse.sum((1, 2)))
    torch.testing.assert_close(total[:, 5, 9], fine[:, 5, 9] + coarse[:, 2, 4] / 4)


def test_a_line_is_drawn_around_what_is_seen() -> None:
    seen = torch.zeros(3, 4, dtype=torch.bool)
    seen[1:, 2] = True
    edges = {frozenset(edge) for edge in heat.outline(seen, 40, 30)}
    corners = [((20, 10), (20, 20)), ((20, 20), (20, 30)), ((30, 10), (30, 20)), ((30, 20), (30, 30))]
    corners += [((20, 10), (30, 10)), ((20, 30), (30, 30))]
    assert edges == {frozenset(edge) for edge in corners}


def test_surroundings_hold_the_points_and_are_not_too_small() -> None:
    pixels = photo()
    left, top, right, bottom = canvas.surroundings(torch.tensor([[0.5, 0.5]]), pixels)
    assert (left, top, right, bottom) == pytest.approx((48 - 9.6, 32 - 9.6, 48 + 9.6, 32 + 9.6))
    left, top, right, bottom = canvas.surroundings(torch.tensor([[0.1, 0.2], [0.6, 7.0]]), pixels)
    assert left < 9.6 and right > 57.6 and top < 12.8 and bottom > 64
    assert right - left == pytest.approx(bottom - top) == pytest.approx(1.5 * 51.2)


def test_a_sheet_has_all_pictures() -> None:
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    sheet = contact_sheet(
        [Image.new("RGB", (1800, 400), colors[0]), *(Image.new("RGB", (300, 300), c) for c in colors[1:])]
    )
    assert sheet.size == (1812, 512)
    assert [sheet.getpixel(at) for at in ((5, 5), (915, 5), (5, 215))] == colors
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([])


def test_kinds_are_in_the_order_of_the_drawing() -> None:
    assert KINDS[0] == "boxes" and Request().kinds([ENCODER, CROSS]) == ["boxes", CROSS, ENCODER]
    assert sampling.KEYS == ("head", "level", "weight")
