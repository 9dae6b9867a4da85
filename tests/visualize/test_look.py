from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from detfamily.attention import DeformableAttention, DenseAttention, MSDeformAttention, WindowAttention
from detfamily.detector import Detector
from detfamily.errors import NonFiniteError
from detfamily.visualize.look import BACKBONE, CROSS, ENCODER, SELF, look_at

from .conftest import DETECTORS, one_image, photo


@pytest.mark.parametrize("name", DETECTORS)
def test_a_look_leaves_no_trace(name: str, detectors: Callable[[str], Detector]) -> None:
    detector, images = detectors(name), one_image(photo())
    with torch.no_grad():
        expected = detector(images)["match"]
    detector.train()
    detector.backbone.eval()
    modes = [module.training for module in detector.modules()]
    states = torch.get_rng_state(), random.getstate()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in detector.modules()]
    try:
        look = look_at(detector, images)
        assert [module.training for module in detector.modules()] == modes
    finally:
        detector.eval()
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in detector.modules()]
    assert not any("on_map" in module.__dict__ for module in detector.modules())
    assert all(one.grad is None for one in detector.parameters())
    assert torch.equal(look.predictions.boxes, expected.boxes) and torch.equal(look.predictions.logits, expected.logits)
    assert len(look.references) == 3
    assert [len(look.layers[place]) for place in (ENCODER, SELF, CROSS)] == [2, 3, 3]


def test_boxes_are_relative_to_the_references_that_are_noted(detectors: Callable[[str], Detector]) -> None:
    look = look_at(detectors("refinement"), one_image(photo()))
    first, second, _ = look.references
    assert first is not None and second is not None and first.shape == (12, 2)
    torch.testing.assert_close(second, look.predictions.boxes[0, 0])
    assert look_at(detectors("detr"), one_image(photo())).references == [None, None, None]


def test_sampling_is_what_the_attention_did(detectors: Callable[[str], Detector]) -> None:
    """The points, read from the values by hand, give the output of the attention."""
    detector = detectors("two_stages")
    layer = detector.decoder.layers[1]
    given: list[torch.Tensor] = []
    handle = layer.cross_attention.register_forward_hook(lambda module, inputs, output: given.append(output))
    look = look_at(detector, one_image(photo()))
    handle.remove()
    noted = look.layers[CROSS][1]
    attention, memory = noted.attention, noted.calls[0].source
    assert isinstance(attention, MSDeformAttention) and attention is layer.cross_attention
    sampling = noted.sampling(7)
    assert sampling is not None
    values, start, out = attention.value_proj(memory.content)[0].view(-1, 4, 8), 0, torch.zeros(4, 8)
    for level, (h, w) in enumerate(noted.shapes):
        cells = values[start : start + h * w].view(h, w, 4, 8)
        start += h * w
        for head in range(4):
            for point in range(4):
                x, y = (sampling.locations[0, head, level, point] * torch.tensor([w, h]) - 0.5).tolist()
                for row in (int(y // 1), int(y // 1) + 1):
                    for column in (int(x // 1), int(x // 1) + 1):
                        if 0 <= row < h and 0 <= column < w:
                            share = (1 - abs(y - row)) * (1 - abs(x - column))
                            out[head] += share * sampling.weights[0, head, level, point] * cells[row, column, head]
    torch.testing.assert_close(attention.output_proj(out.flatten()), given[0][0, 7], rtol=1e-4, atol=1e-5)


def test_heat_is_pytorchs_and_lies_where_the_tokens_lie(detectors: Callable[[str], Detector]) -> None:
    look = look_at(detectors("detr"), one_image(photo()))
    layer = look.layers[CROSS][2]
    assert isinstance(layer.attention, DenseAttention) and layer.shapes == ((4, 6),)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(layer.attention.in_proj.weight)
        theirs.in_proj_bias.copy_(layer.attention.in_proj.bias)
    query, source = layer.calls[0].query, layer.calls[0].source
    weights = theirs(query.with_pos(), source.with_pos(), source.content, average_attn_weights=False)[1]
    (heat,) = layer.heat(5)
    torch.testing.assert_close(heat.weights, weights[0, :, 5].view(4, 4, 6), rtol=1e-5, atol=1e-6)
    among = look.layers[SELF][0]
    assert among.shapes == () and among.weights(5).shape == (4, 12)


def test_tokens_are_counted_level_by_level_row_by_row(detectors: Callable[[str], Detector]) -> None:
    layer = look_at(detectors("deformable_detr"), one_image(photo())).layers[ENCODER][0]
    assert layer.shapes == ((8, 12), (4, 6), (2, 3), (1, 2))
    assert layer.token(0.0, 0.0, 0) == (0, (0, 0))
    assert layer.token(0.99, 0.5, 1) == (96 + 2 * 6 + 5, (2, 5))
    assert layer.token(1.2, -0.1, 2) == (96 + 24 + 2, (0, 2))  # a box's centre may lie outside of the image
    for index in (0, 17, 96, 113, 119, 127):
        x, y = layer.center(index)
        torch.testing.assert_close(torch.tensor([x, y]), layer.reference_points[index])
        level = next(at for at, end in enumerate((96, 120, 126, 128)) if index < end)
        assert layer.token(x, y, level)[0] == index


def test_windows_of_a_backbone_are_seen(detectors: Callable[[str], Detector]) -> None:
    look = look_at(detectors("swin"), one_image(photo()))
    layers = look.layers[BACKBONE]
    assert all(isinstance(layer.attention, WindowAttention) for layer in layers) and len(layers) == 12
    assert layers[0].shapes == ((16, 24),) and layers[-1].shapes == ((2, 3),)
    (heat,) = layers[0].heat(2 * 24 + 9)
    assert heat.weights.shape == (3, 16, 24)
    seen = (heat.weights > 0).all(0)
    assert seen[:7, 7:14].all() and seen.sum() == 49


def test_moved_keys_of_a_backbone_are_seen(detectors: Callable[[str], Detector]) -> None:
    layers = look_at(detectors("dat"), one_image(photo())).layers[BACKBONE]
    kinds = [isinstance(layer.attention, DeformableAttention) for layer in layers]
    assert kinds == [False] * 4 + [False, True] * 4
    keys = layers[5].keys(7)
    assert layers[5].shapes == ((4, 6),) and keys is not None
    assert keys.start.shape == (24, 2) and keys.places.shape == (3, 24, 2) and keys.weights.shape == (12, 24)
    torch.testing.assert_close(keys.weights.sum(-1), torch.ones(12))


def test_hooks_reach_a_compiled_detector(detectors: Callable[[str], Detector]) -> None:
    detector, images = detectors("detr"), one_image(photo())
    expected = look_at(detector, images)
    compiled = copy.deepcopy(detector)
    compiled.compile(backend="eager")
    with torch.no_grad():
        compiled(images)
    found = look_at(compiled, images)
    assert [len(layers) for layers in found.layers.values()] == [2, 3, 3]
    torch.testing.assert_close(found.layers[CROSS][0].heat(3)[0].weights, expected.layers[CROSS][0].heat(3)[0].weights)


def test_attentions_on_maps_of_an_encoder_are_seen_level_by_level(detectors: Callable[[str], Detector]) -> None:
    look = look_at(detectors("on_maps"), one_image(photo()))
    neighbours, moved = look.layers[ENCODER]
    assert neighbours.shapes == moved.shapes == ((8, 12), (4, 6), (2, 3), (1, 2))
    index, _ = neighbours.token(0.5, 0.5, 0)
    (heat,) = neighbours.heat(index)
    assert heat.level == 0 and heat.weights.shape == (4, 8, 12) and int((heat.weights > 0).all(0).sum()) == 49
    (heat,) = neighbours.heat(96 + 7)
    assert heat.level == 1 and int((heat.weights > 0).all(0).sum()) == 24
    keys = moved.keys(index)
    assert keys is not None and neighbours.keys(index) is None and moved.sampling(index) is None
    assert keys.start.shape == (2 * 3, 2) and keys.places.shape == (2, 6, 2) and keys.weights.shape == (4, 6)


def test_what_is_not_finite_is_named(detectors: Callable[[str], Detector]) -> None:
    detector = detectors("deformable_detr")
    before = detector.decoder.layers[0].cross_attention.value_proj.weight[0, 0].item()
    with torch.no_grad():
        detector.decoder.layers[0].cross_attention.value_proj.weight[0, 0] = float("nan")
    try:
        with pytest.raises(NonFiniteError, match="its weights are spoilt"):
            look_at(detector, one_image(photo()))
    finally:
        with torch.no_grad():
            detector.decoder.layers[0].cross_attention.value_proj.weight[0, 0] = before
