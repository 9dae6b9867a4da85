from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from detfamily.blocks.query_position import AnchorPosition, CenterSine, FixedPosition, anchor_code
from detfamily.blocks.query_scale import ElementwiseScale
from detfamily.structures import Grid, Queries, Tokens

WIDTH = 8
RATIOS = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.8, 0.75], [0.6, 0.5]]])


def memory() -> Tokens:
    """Of two levels and two images, of which the second is smaller."""
    return Tokens(torch.zeros(2, 4, WIDTH), grid=Grid(((1, 3), (1, 1)), None, RATIOS))


def object_queries(reference_dim: int = 4) -> Queries:
    torch.manual_seed(0)
    content, pos = torch.randn(2, 2, 3, WIDTH)
    return Queries(content, pos, 0.1 + 0.8 * torch.rand(2, 3, reference_dim))


def naive_code(numbers: list[float], width: int) -> list[float]:
    """Sines and cosines of each number, 2 pi for the whole image, half the width for each."""
    features = width // 2
    code = []
    for x in numbers:
        for i in range(features):
            angle = x * 2 * math.pi / 10000 ** (2 * (i // 2) / features)
            code.append(math.sin(angle) if i % 2 == 0 else math.cos(angle))
    return code


def naive_codes(references: Tensor, width: int = WIDTH) -> Tensor:
    """(B, N, R) to (B, N, R * C / 2): y, x, w, h."""
    codes = [
        [naive_code([one[k] for k in (1, 0, 2, 3)[: len(one)]], width) for one in image]
        for image in references.tolist()
    ]
    return torch.tensor(codes, dtype=references.dtype)


class Recorder(nn.Module):
    """A scale that notes what it is asked, and answers with thrice the code plus the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, Tensor, Tensor]] = []

    def forward(self, layer_index: int, content: Tensor, code: Tensor) -> Tensor:
        self.asked.append((layer_index, content, code))
        return 3 * code + layer_index


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=3),
    st.sampled_from([2, 4]),
    st.sampled_from([4, 8, 12, 64]),
)
def test_codes_are_of_y_x_w_h(anchors: list[list[float]], dim: int, width: int) -> None:
    references = torch.tensor([anchors], dtype=torch.float64)[..., :dim]
    code = anchor_code(references, width)
    assert code.shape == (1, len(anchors), dim * width // 2)
    torch.testing.assert_close(code, naive_codes(references, width), rtol=0, atol=1e-6)


def test_fixed_is_the_same_in_every_layer() -> None:
    for layer in range(3):
        for queries in (object_queries(), Queries(torch.zeros(1, 3, WIDTH))):
            assert FixedPosition()(layer, queries, memory()) is queries
    assert FixedPosition().reads_pos and FixedPosition().reference_dim is None and FixedPosition().needs_reference == 0


def test_fixed_is_refused_by_what_reads_a_code() -> None:
    with pytest.raises(ValueError, match="query_position=center or query_position=anchor, or cross_attention=dense"):
        FixedPosition(cross_sine=True)


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_center_adds_the_code_of_the_centre(reference_dim: int) -> None:
    queries = object_queries(reference_dim)
    given = CenterSine(WIDTH)(1, queries, memory())
    assert given.content is queries.content and given.pos is queries.pos
    assert given.reference_points is queries.reference_points and given.sine is not None
    assert queries.reference_points is not None
    torch.testing.assert_close(given.sine, naive_codes(queries.reference_points[..., :2]), rtol=0, atol=1e-6)


def test_center_is_scaled_by_the_content_of_the_layer() -> None:
    ours, queries = CenterSine(WIDTH, Recorder), object_queries(2)
    given = ours(2, queries, memory())
    assert isinstance(ours.scale, Recorder) and given.sine is not None
    ((layer, content, code),) = ours.scale.asked
    assert layer == 2 and content is queries.content
    torch.testing.assert_close(given.sine, 3 * code + 2, rtol=0, atol=0)


def test_center_that_nothing_reads_is_fixed() -> None:
    ours, queries = CenterSine(WIDTH, partial(ElementwiseScale, WIDTH), cross_sine=False), object_queries(2)
    assert ours(1, queries, memory()) is queries
    assert not list(ours.parameters())


def test_references_learn_through_codes() -> None:
    """Officially nothing is detached here."""
    for ours in (CenterSine(WIDTH), AnchorPosition(WIDTH, dim=2, cross_sine=True)):
        queries = object_queries(2)
        assert queries.reference_points is not None
        queries.reference_points.requires_grad_()
        sine = ours(0, queries, memory()).sine
        (gradient,) = torch.autograd.grad(sine.sum(), queries.reference_points)
        assert gradient.abs().min() > 0


def mlp(x: Tensor, module: nn.Module) -> Tensor:
    state = module.state_dict()
    hidden = (x @ state["layers.0.weight"].T + state["layers.0.bias"]).clamp(min=0)
    return hidden @ state["layers.1.weight"].T + state["layers.1.bias"]


@pytest.mark.parametrize("dim", [2, 4])
@torch.no_grad()
def test_anchors_give_positions_and_a_code_of_their_centre(dim: int) -> None:
    ours, queries = AnchorPosition(WIDTH, dim, cross_sine=True), object_queries(dim)
    assert not ours.reads_pos and ours.reference_dim == ours.needs_reference == dim
    given = ours(0, queries, memory())
    assert queries.reference_points is not None and given.pos is not None and given.sine is not None
    codes = naive_codes(queries.reference_points)
    torch.testing.assert_close(given.pos, mlp(codes, ours.position_head), rtol=0, atol=1e-6)
    torch.testing.assert_close(given.sine, codes[..., :WIDTH], rtol=0, atol=1e-6)


@torch.no_grad()
def test_points_read_the_centres_of_boxes() -> None:
    ours, boxes = AnchorPosition(WIDTH, 2, cross_sine=True), object_queries(4)
    assert boxes.reference_points is not None
    points = Queries(boxes.content, boxes.pos, boxes.reference_points[..., :2])
    given, expected = ours(0, boxes, memory()), ours(0, points, memory())
    assert given.pos is not None and given.sine is not None and given.reference_points is boxes.reference_points
    torch.testing.assert_close(given.pos, expected.pos)
    torch.testing.assert_close(given.sine, expected.sine)


@pytest.mark.parametrize("cross_sine", [False, True])
@torch.no_grad()
def test_the_scale_goes_to_the_code_where_it_is_read_and_to_the_position_elsewhere(cross_sine: bool) -> None:
    ours = AnchorPosition(WIDTH, scale=Recorder, cross_sine=cross_sine)
    queries = object_queries()
    given = ours(2, queries, memory())
    assert isinstance(ours.scale, Recorder) and queries.reference_points is not None and given.pos is not None
    ((layer, content, code),) = ours.scale.asked
    assert layer == 2 and content is queries.content
    codes = naive_codes(queries.reference_points)
    pos = mlp(codes, ours.position_head)
    torch.testing.assert_close(code, codes[..., :WIDTH] if cross_sine else pos, rtol=0, atol=1e-6)
    torch.testing.assert_close(given.pos, pos if cross_sine else 3 * pos + 2, rtol=0, atol=1e-5)
    if cross_sine:
        assert given.sine is not None
        torch.testing.assert_close(given.sine, 3 * codes[..., :WIDTH] + 2, rtol=0, atol=1e-5)
    else:
        assert given.sine is None


@torch.no_grad()
def test_modulation_divides_rows_by_heights_and_columns_by_widths() -> None:
    """Equation 6, with sizes that the content says in the place of w_ref and h_ref."""
    ours, queries = AnchorPosition(WIDTH, modulate_wh=True, cross_sine=True), object_queries()
    given = ours(1, queries, memory())
    assert ours.size_head is not None and queries.reference_points is not None and given.sine is not None
    codes = naive_codes(queries.reference_points)
    for image, n in itertools.product(range(2), range(3)):
        said = mlp(queries.content[image, n], ours.size_head)
        _, _, w, h = queries.reference_points[image, n].tolist()
        wide, high = (1 / (1 + math.exp(-float(x))) for x in said)
        code = codes[image, n]
        expected = [float(code[i]) * (high / h if i < WIDTH // 2 else wide / w) for i in range(WIDTH)]
        torch.testing.assert_close(given.sine[image, n], torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_modulation_by_no_size_at_all_stays_finite() -> None:
    ours, queries = AnchorPosition(WIDTH, modulate_wh=True, cross_sine=True), object_queries()
    assert queries.reference_points is not None
    queries.reference_points[0, 0] = 0
    sine = ours(1, queries, memory()).sine
    assert sine is not None and sine.isfinite().all()
    sine.sum().backward()
    assert all(one.grad is None or one.grad.isfinite().all() for one in ours.parameters())


@pytest.mark.parametrize("dim", [2, 4])
@torch.no_grad()
def test_places_in_the_padded_batch(dim: int) -> None:
    """Anchors are multiplied by the finest level's valid ratios, their sizes, too."""
    ours, queries = AnchorPosition(WIDTH, dim, scale_by_valid=True), object_queries(dim)
    given = ours(0, queries, memory())
    assert queries.reference_points is not None and given.pos is not None
    scaled = queries.reference_points.clone()
    for image, axis in itertools.product(range(2), range(dim)):
        scaled[image, :, axis] *= RATIOS[image, 0, axis % 2]
    torch.testing.assert_close(given.pos, mlp(naive_codes(scaled), ours.position_head), rtol=0, atol=1e-6)
    assert given.reference_points is queries.reference_points


def test_what_is_not_read_has_no_parameters() -> None:
    names = {name.split(".")[0] for name, _ in AnchorPosition(WIDTH, modulate_wh=True).named_parameters()}
    assert names == {"position_head"}
    ours = AnchorPosition(WIDTH, scale=partial(ElementwiseScale, WIDTH), modulate_wh=True, cross_sine=True)
    assert {name.split(".")[0] for name, _ in ours.named_parameters()} == {"position_head", "scale", "size_head"}


def test_anchors_are_points_or_boxes() -> None:
    with pytest.raises(ValueError, match=r"query_position\.dim=3: an anchor is a point \(2\) or a box \(4\)"):
        AnchorPosition(WIDTH, dim=3)
    with pytest.raises(ValueError, match=r"modulate_wh=true needs anchors with a size: model\.anchor_dim=4"):
        AnchorPosition(WIDTH, dim=2, modulate_wh=True)


def weights_of(folder: Path, names: dict[str, str]) -> dict[str, Tensor]:
    """Official weights of the decoder by our names: ours -> theirs, without the perceptron's own part."""
    state = load_file(folder / "weights.safetensors")
    return {
        f"{ours}.layers.{layer}.{kind}": state[f"transformer.decoder.{theirs}.layers.{layer}.{kind}"]
        for ours, theirs in names.items()
        for layer, kind in itertools.product(range(2), ("weight", "bias"))
    }


def assert_as_stored(ours: Tensor | None, stored: Tensor) -> None:
    """Limits of the golden cases; modulation by tiny sizes makes codes large."""
    assert ours is not None
    torch.testing.assert_close(ours, stored, rtol=0, atol=3e-5 * max(1.0, float(stored.abs().max())))


@torch.no_grad()
def test_official_conditional_codes(goldens: Path) -> None:
    folder = goldens / "conditional_detr" / "base"
    io = load_file(folder / "io.safetensors")
    ours = CenterSine(64, partial(ElementwiseScale, 64))
    ours.load_state_dict(weights_of(folder, {"scale.mlp": "query_scale"}))
    for layer in range(3):
        content = torch.zeros(2, 20, 64) if layer == 0 else io[f"mid.decoder_raw.{layer - 1}"]
        given = ours(layer, Queries(content, None, io["mid.reference_points"]), memory())
        assert_as_stored(given.sine, io[f"mid.query_sine_embed.{layer}"])


DAB = {"position_head": "ref_point_head", "scale.mlp": "query_scale", "size_head": "ref_anchor_head"}


@torch.no_grad()
def test_official_dab_positions_codes_and_sizes(goldens: Path) -> None:
    folder = goldens / "dab_detr" / "base"
    io = load_file(folder / "io.safetensors")
    ours = AnchorPosition(64, scale=partial(ElementwiseScale, 64), modulate_wh=True, cross_sine=True)
    ours.load_state_dict(weights_of(folder, DAB))
    for layer in range(3):
        content = torch.zeros(2, 20, 64) if layer == 0 else io[f"mid.decoder_raw.{layer - 1}"]
        given = ours(layer, Queries(content, None, io[f"mid.reference_points.{layer}"]), memory())
        assert_as_stored(given.pos, io[f"mid.query_pos.{layer}"])
        assert_as_stored(given.sine, io[f"mid.query_sine_embed.{layer}"])
        assert ours.size_head is not None
        assert_as_stored(ours.size_head(content).sigmoid(), io[f"mid.refHW_cond.{layer}"])


@pytest.mark.parametrize(("case", "layers"), [("base", 3), ("empty_image", 2)])
@torch.no_grad()
def test_official_dn_positions_and_codes(goldens: Path, case: str, layers: int) -> None:
    """Noised copies before the other queries; unused ones have the content 0 and a box of a half."""
    folder = goldens / "dn_dab_detr" / case
    io = load_file(folder / "io.safetensors")
    ours = AnchorPosition(64, scale=partial(ElementwiseScale, 64), modulate_wh=True, cross_sine=True)
    ours.load_state_dict(weights_of(folder, DAB))
    for layer in range(layers):
        content = io["dn.input_query_label"] if layer == 0 else io[f"mid.decoder.{layer - 1}"]
        given = ours(layer, Queries(content, None, io["mid.references"][layer]), memory())
        assert_as_stored(given.pos, io[f"mid.decoder_query_pos.{layer}"])
        assert_as_stored(given.sine, io[f"mid.decoder_query_sine_embed.{layer}"])


@torch.no_grad()
def test_official_dab_deformable_positions(goldens: Path) -> None:
    folder = goldens / "dab_deformable_detr" / "base"
    io = load_file(folder / "io.safetensors")
    ours = AnchorPosition(64, scale=partial(ElementwiseScale, 64), scale_by_valid=True)
    ours.load_state_dict(weights_of(folder, {name: DAB[name] for name in ("position_head", "scale.mlp")}))
    levels, padding = io["mid.spatial_shapes"].tolist(), io["mid.mask_flatten"]
    h, w = levels[0]
    finest = ~padding[:, : h * w].view(-1, h, w)
    ratios = torch.stack([finest[:, 0].sum(1) / w, finest[:, :, 0].sum(1) / h], -1)[:, None]
    source = Tokens(io["mid.encoder_memory"], grid=Grid(((h, w),), None, ratios))
    for layer in range(3):
        content = io["mid.decoder_tgt"] if layer == 0 else io[f"mid.decoder.{layer - 1}"]
        references = io["mid.init_reference"].expand(2, -1, -1) if layer == 0 else io["mid.inter_references"][layer - 1]
        given = ours(layer, Queries(content, None, references), source)
        assert_as_stored(given.pos, io[f"mid.decoder_query_pos.{layer}"])
        assert given.sine is None
