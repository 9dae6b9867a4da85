"""Cases of Co-DETR are read whatever auxiliary heads they have, and however many proposals they store."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from detfamily.parity.case import Case
from detfamily.parity.check import check
from detfamily.parity.families.co_detr import overrides, results

Copy = Callable[..., Path]

_LOSS = r"loss\.(?:d\d\.)?(?:loss_[a-z_]+|acc)"
OF_HEADS = {
    "faster_rcnn": rf"(grad\.)?(rpn|rpn_head|roi|roi_head)\.|rng\.0[4-9]|auxq\.0\.|loss\.loss_rpn|{_LOSS}0",
    "atss": rf"(grad\.)?(atss|bbox_head)\.|rng\.1[01]|auxq\.1\.|{_LOSS}1",
}
"""What a case stores of each head, or because of it alone."""

SHARED = r"grad\.(?!rpn_head|roi_head|bbox_head)|loss\.total"
"""What all heads have a part in."""


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file({name: one.contiguous() for name, one in change(load_file(file)).items()}, file)


@pytest.mark.parametrize(("number", "other", "spare"), [(1, "faster_rcnn", True), (0, "atss", False)])
def test_one_head_alone_gives_what_it_gives_beside_the_other(
    copy_of: Copy, number: int, other: str, spare: bool
) -> None:
    """The official code counts heads that are there: ATSS alone is the first, and its draws are the only ones.

    What makes queries of positives may be there for more heads than there are.
    """
    case = copy_of("co_detr/co_dino_train")

    def only_results(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        dropped = re.compile(f"{OF_HEADS[other]}|{SHARED}")
        return {
            re.sub(rf"^(auxq\.|{_LOSS}){number}", r"\g<1>0", key): one
            for key, one in tensors.items()
            if not dropped.match(key)
        }

    def only_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: one for name, one in tensors.items() if not re.match(OF_HEADS[other], name)}
        for name in [name for name in kept if ".aux_pos_trans" in name]:
            del kept[name]
            start, index, end = re.split(r"\.([01])\.", name)
            if int(index) == number or spare:
                kept[f"{start}.{int(int(index) != number)}.{end}"] = tensors[name]
        return kept

    rewrite(case / "io.safetensors", only_results)
    rewrite(case / "weights.safetensors", only_weights)
    (verdict,) = check([case])
    assert verdict.passed, verdict
    stored = load_file(case / "io.safetensors")
    assert {"auxq.0.query", "auxq.0.src_index.1", "loss.loss_cls0", "loss.loss_iou_aux0"} <= set(stored)
    assert not any(key.startswith(("auxq.1.", "loss.loss_cls1")) for key in stored)


def test_proposals_that_become_queries_are_picked_where_only_they_are_stored(goldens: Path) -> None:
    """By the first column, as the case's own list of tokens says."""
    case = Case.load(goldens / "co_detr" / "co_deformable_eval")
    index = case.io["mid.enc.topk_indices"][..., None]
    logits = case.io["mid.enc.all_logits"].take_along_dim(index, 1)
    boxes = case.io["mid.reference_points.0"]
    assert "out.enc.pred_logits" not in case.io
    assert results(case)["out.enc.pred_logits"].shape == case.io["mid.enc.all_logits"].shape
    case.io.update({"out.enc.pred_logits": logits, "out.enc.pred_boxes": boxes})
    ours = results(case)
    torch.testing.assert_close(ours["out.enc.pred_logits"], logits, rtol=0, atol=3e-5)
    torch.testing.assert_close(ours["out.enc.pred_boxes"], boxes, rtol=0, atol=3e-5)


def test_a_decoder_that_looks_forward_once_is_told(copy_of: Copy) -> None:
    folder = copy_of("co_detr/co_deformable_eval")
    assert "decoder.look_forward=True" in overrides(Case.load(folder))
    info = json.loads((folder / "case.json").read_text())
    del info["official_model_dict"]["query_head"]["transformer"]["decoder"]["look_forward_twice"]
    (folder / "case.json").write_text(json.dumps(info))
    assert "decoder.look_forward=False" in overrides(Case.load(folder))


def test_towers_are_as_deep_as_the_weights_say(goldens: Path) -> None:
    case = Case.load(goldens / "co_detr" / "co_dino_train")
    assert "auxiliary.1.depth=1" in overrides(case)
    case.weights["bbox_head.0.cls_convs.1.conv.weight"] = torch.zeros(32, 32, 3, 3)
    assert "auxiliary.1.depth=2" in overrides(case)
