from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from detfamily.attention import MSDeformAttention, OwnLevelDeformAttention
from detfamily.structures import Grid, Tokens

SHAPES = ((4, 5), (2, 3))
WIDTH = 16
PADDED = [torch.zeros(2, 4, 5, dtype=torch.bool), torch.zeros(2, 2, 3, dtype=torch.bool)]
PADDED[0][1, 3:] = PADDED[0][1, :, 4:] = True
PADDED[1][1, :, 2:] = True
RATIOS = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.8, 0.75], [2 / 3, 1.0]]], dtype=torch.float64)


def randomized(attention: torch.nn.Module) -> torch.nn.Module:
    """Offsets and weights start independent of the content; here they must depend on it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attention.double()


def map_tokens(padded: bool = True) -> Tokens:
    torch.manual_seed(2)
    tokens = sum(h * w for h, w in SHAPES)
    mask = torch.cat([one.flatten(1) for one in PADDED], 1) if padded else None
    grid = Grid(SHAPES, mask, RATIOS if padded else torch.ones_like(RATIOS))
    content, pos = torch.randn(2, 2, tokens, WIDTH, dtype=torch.float64)
    return Tokens(content, pos, torch.rand(2, tokens, 2, dtype=torch.float64), grid)


def object_queries(reference_dim: int) -> Tokens:
    content, pos = torch.randn(2, 2, 6, WIDTH, dtype=torch.float64)
    return Tokens(content, pos, torch.rand(2, 6, reference_dim, dtype=torch.float64))


@pytest.mark.parametrize(("heads", "levels", "points"), [(8, 4, 4), (3, 2, 3), (1, 1, 1), (6, 1, 2)])
def test_heads_start_out_looking_around_a_square(heads: int, levels: int, points: int) -> None:
    attention = MSDeformAttention(heads * 4, heads, levels, points)
    bias = attention.sampling_offsets.bias.view(heads, levels, points, 2)
    for head in range(heads):
        angle = 2 * math.pi * head / heads
        scale = max(abs(math.cos(angle)), abs(math.sin(angle)))
        for step in range(1, points + 1):
            wanted = torch.tensor([math.cos(angle) / scale * step, math.sin(angle) / scale * step])
            torch.testing.assert_close(bias[head, :, step - 1], wanted.expand(levels, 2), rtol=0, atol=1e-5)
    for zero in (attention.sampling_offsets.weight, attention.attention_weights.weight):
        assert not zero.any()
    assert not attention.attention_weights.bias.any()
    assert not attention.value_proj.bias.any() and not attention.output_proj.bias.any()


def test_official_initial_offsets(goldens: Path) -> None:
    io = load_file(goldens / "ms_deform_attn" / "module" / "io.safetensors")
    for key, arguments in {"init_256_4_8_4": (256, 8, 4, 4), "init_30_2_3_3": (30, 3, 2, 3)}.items():
        bias = MSDeformAttention(*arguments).sampling_offsets.bias
        torch.testing.assert_close(bias.detach(), io[f"{key}.sampling_offsets.bias"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("reference_dim", [2, 4])
@pytest.mark.parametrize("prefix", ["", "b."])
def test_official_module(goldens: Path, prefix: str, reference_dim: int) -> None:
    """Output and all gradients of the official module, with a padding mask."""
    folder = goldens / "ms_deform_attn" / "module"
    io = load_file(folder / "io.safetensors")
    levels, heads, points = (3, 4, 4) if not prefix else (4, 8, 2)
    attention = MSDeformAttention(io[f"{prefix}query"].shape[-1], heads, levels, points)
    state = {k.removeprefix("b.state."): v for k, v in io.items() if k.startswith("b.state.")}
    attention.load_state_dict(state if prefix else load_file(folder / "weights.safetensors"))
    shapes = tuple((int(h), int(w)) for h, w in io[f"{prefix}spatial_shapes"].tolist())
    names = ("query", f"reference_points_{reference_dim}d", "input_flatten")
    query, references, source = (io[prefix + name].requires_grad_() for name in names)
    grid = Grid(shapes, io[f"{prefix}padding_mask"], torch.ones(2, levels, 2))
    output = attention.sample(query, references, source, grid)
    stored = f"{prefix}ref{reference_dim}_mask."
    torch.testing.assert_close(output, io[f"{stored}output"], rtol=0, atol=3e-5)
    (output * io[f"{prefix}grad_output"]).sum().backward()
    gradients = {"query": query.grad, "reference_points": references.grad, "input_flatten": source.grad}
    gradients |= {name: parameter.grad for name, parameter in attention.named_parameters()}
    compared = 0
    for name, gradient in gradients.items():
        expected = io[f"{stored}grad.{name}"]
        assert gradient is not None
        limit = 2e-4 * float(expected.abs().max()) + 1e-6
        torch.testing.assert_close(gradient, expected, rtol=0, atol=limit)
        compared += 1
    assert compared == 11


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_references_are_scaled_to_each_padded_level(reference_dim: int) -> None:
    attention = randomized(MSDeformAttention(WIDTH, 4, 2, 3))
    source, query = map_tokens(), object_queries(reference_dim)
    assert source.grid is not None and query.reference_points is not None
    scaled = torch.empty(2, 6, 2, reference_dim, dtype=torch.float64)
    for image in range(2):
        for level in range(2):
            for axis in range(reference_dim):
                ratio = RATIOS[image, level, axis % 2]
                scaled[image, :, level, axis] = query.reference_points[image, :, axis] * ratio
    expected = attention.sample(query.with_pos(), scaled, source.content, source.grid)
    torch.testing.assert_close(attention(query, source), expected, rtol=0, atol=1e-12)


def test_what_lies_in_the_padding_is_never_read() -> None:
    attention = randomized(MSDeformAttention(WIDTH, 4, 2, 3))
    source, query = map_tokens(), object_queries(2)
    before = attention(query, source)
    assert source.grid is not None and source.grid.padding_mask is not None
    source.content[source.grid.padding_mask] = 1e6
    torch.testing.assert_close(attention(query, source), before, rtol=0, atol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_own_level_is_each_level_run_alone(padded: bool) -> None:
    attention = randomized(OwnLevelDeformAttention(WIDTH, 4, 3))
    assert isinstance(attention, OwnLevelDeformAttention)
    tokens = map_tokens(padded)
    output = attention(tokens, tokens)
    start = 0
    for level, (h, w) in enumerate(SHAPES):
        part = slice(start, start + h * w)
        assert tokens.grid is not None and tokens.pos is not None and tokens.reference_points is not None
        mask = PADDED[level].flatten(1) if padded else None
        grid = Grid(((h, w),), mask, tokens.grid.valid_ratios[:, level : level + 1])
        alone = Tokens(tokens.content[:, part], tokens.pos[:, part], tokens.reference_points[:, part], grid)
        torch.testing.assert_close(output[:, part], attention.attention(alone, alone), rtol=0, atol=1e-12)
        start += h * w


def test_own_level_does_not_see_the_other_levels() -> None:
    attention = randomized(OwnLevelDeformAttention(WIDTH, 4, 3))
    tokens = map_tokens()
    before = attention(tokens, tokens)
    changed = replace(tokens, content=tokens.content.clone())
    changed.content[:, 20:] += 1
    after = attention(changed, changed)
    torch.testing.assert_close(after[:, :20], before[:, :20], rtol=0, atol=0)
    assert not torch.allclose(after[:, 20:], before[:, 20:])


def test_errors_say_what_is_missing() -> None:
    attention = MSDeformAttention(WIDTH, 4, 3, 2).double()
    source, query = map_tokens(), object_queries(2)
    with pytest.raises(ValueError, match="num_heads=3 does not divide embed_dim=16"):
        MSDeformAttention(WIDTH, 3, 2, 2)
    with pytest.raises(ValueError, match="got 2 feature levels, built for num_levels=3"):
        attention(query, source)
    with pytest.raises(ValueError, match="needs reference points"):
        attention(replace(query, reference_points=None), source)
    with pytest.raises(ValueError, match="reads from feature maps; object queries are none"):
        attention(query, query)
    with pytest.raises(ValueError, match="for encoders"):
        OwnLevelDeformAttention(WIDTH, 4, 2).double()(query, source)


def test_no_parameter_is_left_without_a_gradient() -> None:
    attention = randomized(MSDeformAttention(WIDTH, 4, 2, 3))
    query: Tensor = attention(object_queries(4), map_tokens())
    query.square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
