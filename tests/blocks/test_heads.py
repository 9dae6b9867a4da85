from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from detfamily.blocks.heads import BoxHead, Heads, SigmoidClassHead, SoftmaxClassHead

WIDTH, CLASSES, LAYERS = 8, 5, 3


def heads(shared: bool, size_logit: float = 0.0, zero_init: bool = True) -> Heads:
    torch.manual_seed(0)
    return Heads(
        partial(SigmoidClassHead, WIDTH, CLASSES), partial(BoxHead, WIDTH, zero_init), LAYERS, shared, size_logit
    )


def test_class_heads() -> None:
    torch.manual_seed(0)
    assert SoftmaxClassHead(WIDTH, CLASSES).weight.shape == (CLASSES + 1, WIDTH)
    head = SigmoidClassHead(WIDTH, CLASSES)
    torch.testing.assert_close(head.bias.detach(), torch.full((CLASSES,), -4.59511985))
    torch.testing.assert_close(SigmoidClassHead(WIDTH, 1, prior=0.2).bias.sigmoid().detach(), torch.tensor([0.2]))


@pytest.mark.parametrize(("shared", "size_logit"), [(True, -2.0), (False, -2.0), (False, 0.0)])
def test_box_heads_start_by_saying_the_reference(shared: bool, size_logit: float) -> None:
    """Official: only the first (or only) head makes boxes smaller, and none does with two stages."""
    for index, head in enumerate(heads(shared, size_logit).box_heads):
        last = head.layers[-1]
        assert not last.weight.any()
        wanted = size_logit if index == 0 else 0.0
        assert last.bias.tolist() == [0.0, 0.0, wanted, wanted]
    boxes = heads(shared, size_logit)([torch.randn(2, 4, WIDTH)] * LAYERS, [torch.full((2, 4, 2), 0.3)] * LAYERS).boxes
    torch.testing.assert_close(boxes[0, ..., :2], torch.full((2, 4, 2), 0.3))
    torch.testing.assert_close(boxes[0, ..., 2:], torch.full((2, 4, 2), 1 / (1 + math.exp(-size_logit))))


def test_without_zero_init_the_last_layer_is_random() -> None:
    last = heads(True, zero_init=False).box_heads[0].layers[-1]
    assert last.weight.abs().min() > 0 and last.bias.abs().min() > 0


@pytest.mark.parametrize("shared", [True, False])
def test_each_layer_speaks_through_its_head_about_its_reference(shared: bool) -> None:
    ours = heads(shared, zero_init=False)
    assert len(ours.class_heads) == len(ours.box_heads) == (1 if shared else LAYERS)
    hidden = [torch.randn(2, 4, WIDTH) for _ in range(LAYERS)]
    references: list[Tensor | None] = [torch.rand(2, 4, 2), None, torch.rand(2, 4, 4)]
    said = ours(hidden, references)
    assert said.logits.shape == (LAYERS, 2, 4, CLASSES) and said.boxes.shape == (LAYERS, 2, 4, 4)
    for layer in range(LAYERS):
        index = 0 if shared else layer
        torch.testing.assert_close(said.logits[layer], ours.class_heads[index](hidden[layer]))
        logit = ours.box_heads[index](hidden[layer])
        reference = references[layer]
        if reference is not None:
            size = reference.shape[-1]
            logit = torch.cat([logit[..., :size] + torch.logit(reference), logit[..., size:]], -1)
        torch.testing.assert_close(said.boxes[layer], logit.sigmoid(), rtol=1e-4, atol=1e-5)
        refined = ours.refine(layer, hidden[layer], reference)
        torch.testing.assert_close(refined, said.boxes[layer])
        last = ours.box_heads[index].layers[-1].bias
        (gradient,) = torch.autograd.grad(refined.sum(), last)  # whether it is wanted is for the decoder to say
        assert gradient.all()


@pytest.mark.parametrize(("shared", "shared_boxes"), [(True, True), (True, False), (False, True)])
def test_the_heads_of_all_layers_are_there_for_others(shared: bool, shared_boxes: bool) -> None:
    """The very same modules, so that they learn from whoever asks them."""
    ours = Heads(
        partial(SigmoidClassHead, WIDTH, CLASSES),
        partial(BoxHead, WIDTH, False),
        LAYERS,
        shared,
        shared_boxes=shared_boxes,
    )
    assert (len(ours.class_heads), len(ours.box_heads)) == (1 if shared else LAYERS, 1 if shared_boxes else LAYERS)
    if shared:
        assert ours.shared_class_head is ours.class_heads[0]
    if shared_boxes:
        assert ours.shared_box_head is ours.box_heads[0]
    assert not any("shared" in name for name, _ in ours.named_parameters())


def test_sixteen_bit_content_gives_boxes_of_full_precision() -> None:
    ours = heads(True, zero_init=False).bfloat16()
    said = ours([torch.randn(1, 4, WIDTH).bfloat16()] * LAYERS, [torch.rand(1, 4, 2)] * LAYERS)
    assert said.logits.dtype == said.boxes.dtype == torch.float32
    double = heads(True).double()([torch.randn(1, 4, WIDTH).double()] * LAYERS, [None] * LAYERS)
    assert double.boxes.dtype == torch.float64
