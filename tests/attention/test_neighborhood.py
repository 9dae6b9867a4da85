"""Neighborhood attention against loops over single tokens, golden cases of DAT++, and each backend against another."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from detfamily.attention import NeighborhoodAttention
from detfamily.errors import ConfigError
from detfamily.structures import Grid, Tokens

SETTINGS = [
    # (h, w), kernel_size, dilation
    ((6, 9), 3, 1),
    ((9, 17), 3, 1),
    ((7, 8), 5, 1),
    ((7, 11), 4, 1),
    ((7, 10), 3, 2),
    ((9, 13), 3, 3),
    ((3, 4), 1, 1),
]
SMALL = [((2, 3), 5, 1), ((4, 9), 5, 1), ((1, 1), 3, 1), ((5, 8), 3, 2), ((1, 7), 3, 2), ((2, 2), 3, 4)]


def attention(kernel_size: int, dilation: int = 1, embed_dim: int = 6, num_heads: int = 2, **settings: object):
    """In float64, with parameters far from their start."""
    torch.manual_seed(0)
    module = NeighborhoodAttention(embed_dim, num_heads, kernel_size, dilation, **settings).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module


def window(place: int, length: int, kernel_size: int, dilation: int) -> list[int]:
    """The places that one sees, nearest first, as long as there are enough: a window around it, or shifted inside."""
    own = [other for other in range(length) if (other - place) % dilation == 0]
    # of two that are equally far the one before it, as even windows reach further back
    return sorted(own, key=lambda other: (abs(other - place), other > place))[:kernel_size]


def by_loops(module: NeighborhoodAttention, x: Tensor, pos: Tensor | None = None, hidden: Tensor | None = None):
    """Each token with the tokens of its window, one by one."""
    kernel_size, dilation, heads = module.kernel_size, module.dilation, module.num_heads
    batch, h, w, width = x.shape
    depth = width // heads
    padded_h, padded_w = (max(n, kernel_size * dilation) if module.pad_small_maps else n for n in (h, w))

    def at(image: int, y: int, x_: int) -> tuple[Tensor, Tensor]:
        inside = y < h and x_ < w
        token = x[image, y, x_] if inside else torch.zeros(width, dtype=x.dtype)
        code = torch.zeros(width, dtype=x.dtype) if pos is None or not inside else pos[image, y, x_]
        return module.qkv(token + code)[: 2 * width], module.qkv(token)[2 * width :]

    out = torch.zeros_like(x)
    for image in range(batch):
        projected = {(y, x_): at(image, y, x_) for y in range(padded_h) for x_ in range(padded_w)}
        for y in range(h):
            for x_ in range(w):
                seen = [
                    (ky, kx)
                    for ky in window(y, padded_h, kernel_size, dilation)
                    for kx in window(x_, padded_w, kernel_size, dilation)
                ]
                if hidden is not None:
                    visible = [(ky, kx) for ky, kx in seen if ky < h and kx < w and not hidden[image, ky, kx]]
                else:
                    visible = seen
                mixed = []
                for head in range(heads):
                    part = slice(head * depth, (head + 1) * depth)
                    q = projected[y, x_][0][:width][part]
                    logits = []
                    for ky, kx in visible:
                        logit = q @ projected[ky, kx][0][width:][part] / math.sqrt(depth)
                        if module.position_bias is not None:
                            dy, dx = (ky - y) // dilation, (kx - x_) // dilation
                            logit = logit + module.position_bias[head, dy + kernel_size - 1, dx + kernel_size - 1]
                        logits.append(logit)
                    values = torch.stack([projected[place][1][part] for place in visible or seen])
                    weights = torch.stack(logits).softmax(0) if logits else values.new_full((len(seen),), 1 / len(seen))
                    mixed.append(weights @ values)
                out[image, y, x_] = module.proj(torch.cat(mixed))
    return out


@pytest.mark.parametrize(("size", "kernel_size", "dilation"), [*SETTINGS, *SMALL])
@pytest.mark.parametrize("pad_small_maps", [True, False])
def test_each_token_and_its_window(
    size: tuple[int, int], kernel_size: int, dilation: int, pad_small_maps: bool
) -> None:
    module = attention(kernel_size, dilation, pad_small_maps=pad_small_maps)
    x, pos = torch.randn(2, 2, *size, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module.on_map(x), by_loops(module, x), rtol=0, atol=1e-12)
        torch.testing.assert_close(module.on_map(x, pos), by_loops(module, x, pos), rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{"qkv_bias": False}, {"position_bias": False}])
def test_without_biases(settings: dict[str, bool]) -> None:
    module = attention(3, **settings)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module.on_map(x), by_loops(module, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "kernel_size", "dilation"), [((6, 10), 3, 1), ((4, 9), 3, 2), ((2, 6), 5, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients(size: tuple[int, int], kernel_size: int, dilation: int, padded: bool) -> None:
    module = attention(kernel_size, dilation, embed_dim=4)
    mask = hidden_at(*size, (size[0] - 1, size[1] - 2)) if padded else None
    x, pos = torch.randn(2, 1, *size, 4, dtype=torch.float64)
    leaves = [x.requires_grad_(), pos.requires_grad_(), *module.parameters()]
    weights = torch.randn(1, *size, 4, dtype=torch.float64)
    if mask is not None:
        weights[mask] = 0
    ours = torch.autograd.grad((module.on_map(x, pos, mask) * weights).sum(), leaves)
    expected = torch.autograd.grad((by_loops(module, x, pos, mask) * weights).sum(), leaves)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["neighborhood_attention", "neighborhood_attention_k3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_official_results(goldens: Path, case: str, dtype: torch.dtype) -> None:
    folder = goldens / "dat" / case
    record = json.loads((folder / "case.json").read_text())
    args, io = record["args"], load_file(folder / "io.safetensors")
    module = NeighborhoodAttention(args["dim"], args["num_heads"], args["kernel_size"]).to(dtype)
    ours = {
        "position_bias" if name == "rpb" else name: value
        for name, value in load_file(folder / "weights.safetensors").items()
    }
    module.load_state_dict(ours)
    for size in record["input_sizes"]:
        x, cotangent = (io[f"{size}.{name}"].to(dtype).permute(0, 2, 3, 1) for name in ("input", "cotangent"))
        x.requires_grad_()
        out = module.on_map(x)
        torch.testing.assert_close(
            out.permute(0, 3, 1, 2).double(), io[f"{size}.out"], rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6
        )
        names = [name for name, _ in module.named_parameters()]
        found = torch.autograd.grad(out, [x, *module.parameters()], cotangent)
        for name, one in zip(["input", *names], found, strict=True):
            expected = io[f"{size}.grad.{'rpb' if name == 'position_bias' else name}"]
            limit = (1e-13 if dtype == torch.float64 else 2e-6) * float(expected.abs().max())
            one = one.permute(0, 3, 1, 2) if name == "input" else one
            torch.testing.assert_close(one.double(), expected, rtol=0, atol=limit)


# -- padding ----------------------------------------------------------------------------------------------------------


def hidden_at(h: int, w: int, *valid: tuple[int, int]) -> Tensor:
    mask = torch.ones(len(valid), h, w, dtype=torch.bool)
    for image, (y, x) in enumerate(valid):
        mask[image, :y, :x] = False
    return mask


@pytest.mark.parametrize(("size", "kernel_size", "dilation"), [((7, 8), 3, 1), ((9, 11), 3, 2), ((3, 8), 5, 1)])
@pytest.mark.parametrize("position_bias", [True, False])
@pytest.mark.parametrize("pad_small_maps", [True, False])
def test_hidden_tokens_are_as_if_they_were_not_there(
    size: tuple[int, int], kernel_size: int, dilation: int, position_bias: bool, pad_small_maps: bool
) -> None:
    module = attention(kernel_size, dilation, position_bias=position_bias, pad_small_maps=pad_small_maps)
    mask = hidden_at(*size, (size[0], size[1] - 3), (size[0] - 1, size[1]))
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    with torch.no_grad():
        found, expected = module.on_map(x, padding_mask=mask), by_loops(module, x, hidden=mask)
    torch.testing.assert_close(found[~mask], expected[~mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("backend", ["pytorch", "flex"])
def test_garbage_in_the_padding_changes_nothing(dilation: int, backend: str) -> None:
    module = attention(3, dilation, backend=backend).float()
    mask = hidden_at(9, 13, (9, 13), (6, 5), (1, 1))
    x = torch.randn(3, 9, 13, 6)
    other = torch.where(mask[..., None], 1e6 * torch.randn_like(x), x)
    with torch.no_grad():
        assert torch.equal(module.on_map(x, padding_mask=mask)[~mask], module.on_map(other, padding_mask=mask)[~mask])
    if backend == "flex":
        return
    other.requires_grad_()
    (gradient,) = torch.autograd.grad(module.on_map(other, padding_mask=mask)[~mask].square().sum(), other)
    assert bool((gradient[mask] == 0).all()) and bool(gradient[~mask].any())


def test_a_window_of_nothing_but_padding_is_its_mean() -> None:
    module = attention(3)
    mask = hidden_at(9, 9, (2, 2))
    x = torch.randn(1, 9, 9, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            module.on_map(x, padding_mask=mask), by_loops(module, x, hidden=mask), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_windows_of_nothing_but_padding_give_numbers(dtype: torch.dtype) -> None:
    module = attention(3).to(dtype)
    x = torch.randn(1, 9, 9, 6, dtype=dtype, requires_grad=True)
    out = module.on_map(x, padding_mask=torch.ones(1, 9, 9, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(out.float().sum(), x)
    assert bool(out.isfinite().all()) and bool(gradient.isfinite().all())


# -- encoders, types, compilers ---------------------------------------------------------------------------------------


def test_levels_of_an_encoder_are_maps_of_their_own() -> None:
    module = attention(3, pad_small_maps=False)
    shapes = ((8, 9), (4, 5), (2, 2))
    masks = [hidden_at(h, w, (h, w), (h - 1, w)) for h, w in shapes]
    maps = [torch.randn(2, h, w, 6, dtype=torch.float64) for h, w in shapes]
    codes = [torch.randn_like(one) for one in maps]
    grid = Grid(shapes, torch.cat([one.flatten(1) for one in masks], 1), torch.ones(2, 3, 2))
    tokens = Tokens(*(torch.cat([one.flatten(1, 2) for one in these], 1) for these in (maps, codes)), grid=grid)
    expected = [module.on_map(*one).flatten(1, 2) for one in zip(maps, codes, masks, strict=True)]
    torch.testing.assert_close(module(tokens, tokens), torch.cat(expected, 1), rtol=0, atol=0)


def test_sixteen_bits() -> None:
    module = attention(3, embed_dim=16).float()
    x = torch.randn(2, 5, 7, 16, requires_grad=True)
    mask = hidden_at(5, 7, (5, 7), (3, 4))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = module.on_map(x, padding_mask=mask)[~mask]
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        results.append([out.float(), *torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.detach().abs().max()))


def test_float32_inside_autocast_stays_float32() -> None:
    """Whoever projects without autocast wants the attention so, too."""
    from detfamily.ops.neighborhood import neighborhood_attn

    qkv = torch.randn(1, 5, 6, 3, 2, 4)
    expected = neighborhood_attn(qkv, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(neighborhood_attn(qkv, 3), expected)


def test_an_evaluation_does_not_spoil_the_training_after_it() -> None:
    """Tiles are kept from one call to the next."""
    module = attention(3)
    x = torch.randn(1, 10, 11, 6, dtype=torch.float64)
    with torch.inference_mode():
        expected = module.on_map(x)
    module.on_map(x).sum().backward()
    assert module.qkv.weight.grad is not None
    torch.testing.assert_close(module.on_map(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(dynamic: bool) -> None:
    module = attention(3)
    compiled = torch.compile(module.on_map, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((6, 9), (7, 5)):
        x = torch.randn(1, *size, 6, dtype=torch.float64, requires_grad=True)
        mask = hidden_at(*size, (5, 5))
        results = [one(x, padding_mask=mask) for one in (module.on_map, compiled)]
        grads = [torch.autograd.grad(one.square().sum(), [x, *module.parameters()]) for one in results]
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-12)


def test_only_parameters_are_stored() -> None:
    module = attention(5)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "qkv.weight": (18, 6),
        "qkv.bias": (18,),
        "proj.weight": (6, 6),
        "proj.bias": (6,),
        "position_bias": (2, 9, 9),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((6, 4, 3), "num_heads=4 does not divide embed_dim=6"),
        ((6, 2, 0), "kernel_size=0, dilation=1: expected at least 1"),
        ((6, 2, 3, 0), "kernel_size=3, dilation=0: expected at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention(*settings)


def test_a_backend_that_cannot() -> None:
    x = torch.randn(1, 5, 6, 6, dtype=torch.float64)
    with pytest.raises(ConfigError, match="backend='flex' cannot .* no gradients on cpu; use 'auto'"):
        attention(3, backend="flex").on_map(x)
