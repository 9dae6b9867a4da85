"""The CUDA kernels, run thread by thread in an emulator (see simt/simt.h), against the reference in float64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detfamily.ops.reference import ms_deform_attn_reference
from detfamily.structures import Size

SIMT = Path(__file__).parent / "simt"
KERNELS = Path(__file__).parents[2] / "src/detfamily/ops/csrc"
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = ["float64", "float32", "float16", "bfloat16"]
NOWHERE = 16  # address of an empty tensor, which is there all the same
ODD_SHAPES = ((5, 7), (3, 1), (1, 2))


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "queries", "heads", "width", "levels", "points", "parts")),
        ("height_width", ctypes.c_void_p),
        ("narrow", ctypes.c_int64),
        ("deterministic", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("value", "grad_output", "places", "weights", "references")),
        *((name, ctypes.c_void_p) for name in ("output", "grad_value", "grad_places", "grad_weights")),
        ("grad_references", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Case:
    """Tensors of a call; places and weights are offsets and logits where there are references."""

    shapes: tuple[Size, ...]
    value: Tensor
    places: Tensor
    weights: Tensor
    references: Tensor | None
    grad_output: Tensor


Run = Callable[..., list[Tensor]]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the emulator with")
    library = tmp_path_factory.mktemp("simt") / "harness.so"
    flags = [
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        "-U_FORTIFY_SOURCE",
        "-Wno-unknown-pragmas",
        f"-I{KERNELS}",
        f"-I{SIMT}",
    ]
    subprocess.run([compiler, *flags, str(SIMT / "harness.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.divide.restype = ctypes.c_uint
    loaded.run.restype = loaded.run_faulty.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="module")
def run(harness: ctypes.CDLL) -> Run:
    def call(
        case: Case, *, backward: bool, deterministic: bool = False, reference_grad: bool = True, seed: int = 0
    ) -> list[Tensor]:
        """The output, or gradients of value, places, weights and references (if wanted)."""
        batch, queries, heads, levels, points, _ = case.places.shape
        dtype = case.value.dtype
        inputs = [case.value, case.grad_output, case.places, case.weights, case.references]
        inputs = [one if one is None else one.contiguous() for one in inputs]
        if backward:
            references = case.references if reference_grad else None
            results = [one if one is None else torch.empty_like(one) for one in (*inputs[:1], *inputs[2:4], references)]
            outputs = [None, *results]
        else:
            inputs[1] = None
            results = [torch.empty_like(case.grad_output)]
            outputs = [results[0], None, None, None, None]
        sizes = torch.tensor(case.shapes, dtype=torch.int64)
        parts = 0 if case.references is None else case.references.shape[-1]
        narrow = case.references is not None and case.places.dtype != torch.promote_types(dtype, torch.float32)
        arguments = Call(
            *(batch, queries, heads, case.value.shape[-1], levels, points, parts, sizes.data_ptr()),
            *(narrow, deterministic, seed),
            *(None if one is None else one.data_ptr() or NOWHERE for one in (*inputs, *outputs)),
        )
        error = harness.run(ctypes.byref(arguments), TYPES.index(dtype))
        assert error is None, error.decode()
        return [one for one in results if one is not None]

    return call


def make_case(
    dtype: torch.dtype,
    shapes: tuple[Size, ...] = ODD_SHAPES,
    *,
    width: int = 32,
    heads: int = 2,
    points: int = 4,
    queries: int | None = 7,
    batch: int = 2,
    parts: int = 0,
    narrow: bool = False,
    seed: int = 0,
) -> Case:
    """Random tensors; samples lie around their maps, a fifth of them outside, none next to a pixel's centre.

    queries: as many as there are tokens if None. parts: of the references, 0 for the plain form.
    """
    random = torch.Generator().manual_seed(seed)
    compute = torch.promote_types(dtype, torch.float32)
    levels = len(shapes)
    tokens = sum(h * w for h, w in shapes)
    queries = tokens if queries is None else queries
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    reach = torch.rand(batch, queries, heads, levels, points, 2, generator=random, dtype=torch.float64)
    # whole cells and a fraction: the derivative jumps where the fraction is zero
    cells = ((reach * (sizes + 3)) - 2).floor()
    cells += 0.15 + 0.7 * torch.rand(cells.shape, generator=random, dtype=torch.float64)
    value = torch.randn(batch, tokens, heads, width, generator=random)
    grad_output = torch.randn(batch, queries, heads * width, generator=random)
    if parts == 0:
        places, weights, references = (cells + 0.5) / sizes, torch.rand(cells.shape[:-1], generator=random), None
        kind = compute
    else:
        references = 0.2 + 0.6 * torch.rand(batch, queries, levels, parts, generator=random)
        references = references.to(compute)
        centers = references[:, :, None, :, None].double()
        step = 1 / sizes if parts == 2 else centers[..., 2:] * 0.5 / points
        places = ((cells + 0.5) / sizes - centers[..., :2]) / step
        weights = 2 * torch.randn(batch, queries, heads, levels * points, generator=random)
        kind = dtype if narrow else compute
    return Case(shapes, value.to(dtype), places.to(kind), weights.to(kind), references, grad_output.to(dtype))


def locations_and_weights(case: Case, places: Tensor, weights: Tensor, references: Tensor | None) -> list[Tensor]:
    if references is None:
        return [places, weights]
    points = places.shape[4]
    sizes = torch.tensor([(w, h) for h, w in case.shapes], dtype=torch.float64)[:, None]
    boxes = references[:, :, None, :, None]
    step = 1 / sizes if references.shape[-1] == 2 else boxes[..., 2:] * (0.5 / points)
    return [boxes[..., :2] + places * step, weights.softmax(-1).view(places.shape[:-1])]


def expected(case: Case) -> tuple[Tensor, list[Tensor], Tensor]:
    """The output, the gradients of all inputs, and which samples lie next to a pixel's centre."""
    tensors = [one for one in (case.value, case.places, case.weights, case.references) if one is not None]
    leaves = [one.double().requires_grad_() for one in tensors]
    references = leaves[3] if len(leaves) == 4 else None
    locations, weights = locations_and_weights(case, leaves[1], leaves[2], references)
    output = ms_deform_attn_reference(leaves[0], case.shapes, locations, weights)
    gradients = torch.autograd.grad(output, leaves, case.grad_output.double())
    sizes = torch.tensor([(w, h) for h, w in case.shapes], dtype=torch.float64)[:, None]
    cells = locations.detach() * sizes - 0.5
    return output.detach(), list(gradients), ((cells - cells.round()).abs() < 0.01).any(-1)


def assert_near(name: str, actual: Tensor, wanted: Tensor, ignored: Tensor | None = None) -> None:
    """To a few roundings of the type, of each number and of the largest one."""
    assert torch.isfinite(actual).all(), f"{name}: not all were written"
    assert actual.shape == wanted.shape, name
    step = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[actual.dtype]
    floor = 1e-13 if actual.dtype == torch.float64 else 4e-6
    error = (actual.double() - wanted).abs()
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    wrong = error > step * wanted.abs() + 4 * floor * largest + floor * 1e-3
    if ignored is not None:
        wrong &= ~ignored
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, by {float(error[wrong].max()):.2e}"


def check(run: Run, case: Case, **options: bool) -> None:
    output, gradients, near_centre = expected(case)
    assert_near("output", run(case, backward=False)[0], output)
    names = ("value", "places", "weights", "references")
    results = run(case, backward=True, **options)
    narrow = case.references is not None and case.places.dtype.itemsize == 2
    assert narrow or not near_centre.any()
    for name, actual, wanted in zip(names, results, gradients, strict=False):
        ignored = None
        if narrow and name == "places":  # rounded offsets: some came to lie next to a pixel's centre
            ignored = near_centre[..., None].expand_as(wanted)
        if narrow and name == "references":
            ignored = near_centre.any(-1).any(2)[..., None].expand_as(wanted)
        assert_near(f"gradient of {name}", actual, wanted, ignored)


FAULTS = [
    None,
    "read outside of all buffers",
    "write to an input",
    "misaligned access",
    "a lane has left before the others meet",
    "lanes meet in different operations",
    "",
    "memory around a buffer, or an input, was written",
]


@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_the_emulator_finds_faults(harness: ctypes.CDLL, fault: int) -> None:
    numbers, reversed_ = torch.arange(32.0), torch.empty(32)
    error = harness.run_faulty(fault, ctypes.c_void_p(numbers.data_ptr()), ctypes.c_void_p(reversed_.data_ptr()))
    if FAULTS[fault] is None:
        assert error is None
        assert torch.equal(reversed_, numbers.flip(0))
    elif FAULTS[fault]:
        assert error is not None
        assert error.decode().startswith(FAULTS[fault])
    else:  # shared memory is read before it is written
        assert reversed_.isnan().any()


def test_division_of_large_numbers(harness: ctypes.CDLL) -> None:
    largest = 2**31 - 1
    for divisor in (1, 2, 3, 7, 8, 31, 300, 10723, 65537, 2**29 + 1, largest):
        for number in (0, 1, divisor - 1, divisor, 2 * divisor - 1, largest - largest % divisor - 1, largest):
            number = min(number, largest)
            assert harness.divide(number, divisor) == number // divisor, (number, divisor)


@pytest.mark.parametrize("dtype", TYPES, ids=NAMES)
@pytest.mark.parametrize("width", [16, 32, 64, 40, 72, 1, 33])
def test_channel_counts(run: Run, dtype: torch.dtype, width: int) -> None:
    check(run, make_case(dtype, width=width, queries=5, seed=width))


@pytest.mark.parametrize("width", [16, 32, 64, 24, 7])
@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [(dtype, False) for dtype in TYPES] + [(torch.float16, True), (torch.bfloat16, True)],
    ids=[*NAMES, "all float16", "all bfloat16"],
)
@pytest.mark.parametrize("parts", [2, 4], ids=["points", "boxes"])
def test_projected_form(run: Run, dtype: torch.dtype, narrow: bool, parts: int, width: int) -> None:
    check(run, make_case(dtype, width=width, queries=5, parts=parts, narrow=narrow, seed=parts))


@pytest.mark.parametrize("points", [1, 2, 3, 8])
@pytest.mark.parametrize("shapes", [((6, 3),), ((4, 4), (2, 3), (1, 1), (3, 2), (1, 4))], ids=["1 level", "5 levels"])
@pytest.mark.parametrize("parts", [0, 4], ids=["plain", "boxes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_levels_and_points(run: Run, dtype: torch.dtype, parts: int, shapes: tuple[Size, ...], points: int) -> None:
    check(run, make_case(dtype, shapes, points=points, parts=parts, queries=3, batch=1, seed=points))


def test_sixteen_levels(run: Run) -> None:
    shapes = tuple((1 + i % 3, 1 + i % 4) for i in range(16))
    check(run, make_case(torch.float32, shapes, points=1, queries=3))


@pytest.mark.parametrize("shapes", [((9, 17), (5, 3), (1, 1)), ((8, 8), (16, 1))], ids=["odd", "whole"])
@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "parts"),
    [(torch.float32, 0), (torch.float32, 2), (torch.bfloat16, 2)],
    ids=["plain", "float32", "bfloat16"],
)
def test_encoder_tiles(run: Run, dtype: torch.dtype, parts: int, heads: int, shapes: tuple[Size, ...]) -> None:
    width = 16 if dtype == torch.float32 else 32
    check(run, make_case(dtype, shapes, queries=None, width=width, heads=heads, points=1, parts=parts, batch=1))


def test_three_images_of_a_tiled_encoder(run: Run) -> None:
    check(run, make_case(torch.bfloat16, ((3, 10),), queries=None, points=2, batch=3, parts=4))


@pytest.mark.parametrize("queries", [1, 31, 67])
def test_query_counts(run: Run, queries: int) -> None:
    check(run, make_case(torch.float32, ((4, 5),), queries=queries, points=2, heads=3, batch=3))


def test_more_channels_than_a_warp_has_lanes(run: Run) -> None:
    for width in (256, 1025):
        check(run, make_case(torch.float32, ((2, 3),), width=width, heads=1, queries=2, points=2, batch=1))
        check(run, make_case(torch.float16, ((2, 3),), width=width, heads=1, queries=2, points=2, batch=1, parts=2))


def test_more_samples_than_shared_memory_holds(run: Run) -> None:
    for dtype, width in ((torch.float32, 32), (torch.float64, 3)):
        case = make_case(dtype, ((3, 4), (2, 2)), width=width, heads=1, points=1600, queries=2, batch=1, parts=4)
        check(run, case)


def test_reference_gradients_only_where_asked(run: Run) -> None:
    case = make_case(torch.float32, parts=4)
    everything = run(case, backward=True)
    without = run(case, backward=True, reference_grad=False)
    assert len(everything) == 4
    assert len(without) == 3
    for name, one, other in zip(("places", "weights"), everything[1:3], without[1:], strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("dtype", TYPES, ids=NAMES)
@pytest.mark.parametrize("parts", [0, 2, 4], ids=["plain", "points", "boxes"])
def test_deterministic_sums_do_not_depend_on_the_order(run: Run, dtype: torch.dtype, parts: int) -> None:
    case = make_case(dtype, ((4, 3), (2, 2)), width=32, queries=19, parts=parts)
    first = run(case, backward=True, deterministic=True, seed=1)
    for seed in (2, 3):
        again = run(case, backward=True, deterministic=True, seed=seed)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    check(run, case, deterministic=True)


def test_default_sums_differ_from_run_to_run_only_by_rounding(run: Run) -> None:
    case = make_case(torch.float32, ((4, 3), (2, 2)), queries=19, parts=2)
    first, again = (run(case, backward=True, seed=seed) for seed in (1, 2))
    assert not torch.equal(first[0], again[0])  # else the emulator did not change the order
    torch.testing.assert_close(first[0], again[0], rtol=1e-4, atol=1e-5)
    for one, other in zip(first[1:], again[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_fixed_point_adapts_to_the_size_of_gradients(run: Run, scale: float) -> None:
    case = make_case(torch.float32)
    case = replace(case, grad_output=case.grad_output * scale)
    check(run, case, deterministic=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["grad_output", "weights"])
def test_fixed_point_without_a_bound_is_nan(run: Run, tensor: str, bad: float) -> None:
    case = make_case(torch.float32)
    poisoned = getattr(case, tensor).clone()
    poisoned.view(-1)[3] = bad
    assert run(replace(case, **{tensor: poisoned}), backward=True, deterministic=True)[0].isnan().all()


@pytest.mark.parametrize("dtype", TYPES, ids=NAMES)
@pytest.mark.parametrize("width", [32, 24, 3])
def test_nothing_outside_a_map_is_read(run: Run, dtype: torch.dtype, width: int) -> None:
    """Samples of one level are all outside, and its values NaN; other levels must not notice."""
    case = make_case(dtype, ((4, 5), (3, 3)), width=width, queries=6)
    places = case.places.clone()
    far = torch.tensor([-3.0, -0.5, 1.5, 4.0], dtype=places.dtype)
    places[:, :, :, 1, :, 0] = far
    places[:, ::2, :, 1, 0] = float("nan")
    weights = case.weights.clone()
    weights[:, :, :, 1, 1] = float("inf")  # a weight of nothing
    clean = replace(case, places=places.nan_to_num(-9.0), weights=weights.nan_to_num(1.0, 1.0, 1.0))
    value = case.value.clone()
    value[:, 20:] = float("nan")
    value[:, 20, 0] = float("inf")
    poisoned = replace(case, value=value, places=places, weights=weights)
    assert torch.equal(run(poisoned, backward=False)[0], run(clean, backward=False)[0])
    for name, one, other in zip(
        ("value", "places", "weights"), run(poisoned, backward=True), run(clean, backward=True), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("width", [32, 24, 3])
def test_a_query_with_no_sample_inside_gives_zeros(run: Run, width: int) -> None:
    case = make_case(torch.float32, width=width)
    case = replace(case, value=torch.full_like(case.value, float("nan")), places=torch.full_like(case.places, 7.0))
    assert run(case, backward=False)[0].eq(0).all()
    for gradient in run(case, backward=True):
        assert gradient.eq(0).all()


@pytest.mark.parametrize("width", [32, 24, 3])
def test_samples_on_the_border_read_only_their_corners_in_the_map(run: Run, width: int) -> None:
    """Around a map of one pixel all samples touch it, and around them lie NaN of other levels."""
    case = make_case(torch.float32, ((2, 2), (1, 1), (2, 2)), width=width)
    value = case.value.clone()
    value[:, :4] = value[:, 5:] = float("nan")
    places = torch.full_like(case.places, 9.0)
    places[:, :, :, 1] = torch.rand(places[:, :, :, 1].shape, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.4
    case = replace(case, value=value, places=places)
    clean = replace(case, value=value.nan_to_num(0.0))
    output, gradients, _ = expected(clean)
    assert_near("output", run(case, backward=False)[0], output)
    for name, actual, wanted in zip(("value", "places", "weights"), run(case, backward=True), gradients, strict=True):
        assert_near(name, actual, wanted)


def test_derivatives_at_whole_pixels_are_those_to_the_right(run: Run) -> None:
    shape = (4, 8)
    h, w = shape
    value = torch.randn(1, h * w, 1, 32, generator=torch.Generator().manual_seed(0))
    ys, xs = (one.flatten() for one in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    places = torch.stack(((xs + 0.5) / w, (ys + 0.5) / h), -1)[None, :, None, None, None]
    weights = torch.ones(1, h * w, 1, 1, 1)
    case = Case((shape,), value, places, weights, None, torch.ones(1, h * w, 32))
    assert torch.equal(run(case, backward=False)[0], value.flatten(2))
    grid = torch.zeros(h + 1, w + 1)
    grid[:h, :w] = value.sum((0, 2, 3)).view(h, w)
    right = torch.stack(((grid[:h, 1:] - grid[:h, :w]) * w, (grid[1:, :w] - grid[:h, :w]) * h), -1)
    torch.testing.assert_close(run(case, backward=True)[1].view(h, w, 2), right, rtol=1e-5, atol=1e-4)


def test_weights_that_overflow_float32_exponentials(run: Run) -> None:
    case = make_case(torch.float32, parts=2)
    logits = case.weights.clone()
    logits[..., 0] += 300
    logits[..., 3] = -float("inf")
    check(run, replace(case, weights=logits))


@pytest.mark.parametrize("parts", [0, 2])
def test_no_queries_and_no_images(run: Run, parts: int) -> None:
    empty = make_case(torch.bfloat16, queries=0, parts=parts)
    assert run(empty, backward=False)[0].shape == (2, 0, 64)
    assert run(empty, backward=True)[0].eq(0).all()
    assert run(make_case(torch.float32, batch=0, parts=parts), backward=True)[0].numel() == 0


def test_an_empty_level_holds_nothing(run: Run) -> None:
    case = make_case(torch.float32, ((3, 4), (0, 5), (2, 0)), queries=4)
    rest = replace(case, shapes=((3, 4),), places=case.places[:, :, :, :1], weights=case.weights[:, :, :, :1])
    places = case.places.nan_to_num(0.3)
    case = replace(case, places=places)
    assert_near("output", run(case, backward=False)[0], expected(rest)[0])
    gradients = run(case, backward=True)
    assert_near("gradient of value", gradients[0], expected(rest)[1][0])
    assert gradients[1][:, :, :, 1:].eq(0).all()
