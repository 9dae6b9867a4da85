"""HDETR/H-Deformable-DETR."""

from __future__ import annotations

import re
from dataclasses import replace

from torch import Tensor

from detfamily.parity import detection
from detfamily.parity.case import Case
from detfamily.parity.families import deformable_detr


def results(case: Case) -> dict[str, Tensor]:
    """A detector in training and evaluation."""
    ours = detection.results(case, overrides(case)) | deformable_detr.units(case)
    plain = {_without_branch(key): value for key, value in ours.items() if "one2many" in key}
    return ours | {key: plain[_without_branch(key)] for key in case.io if _without_branch(key) in plain}


def overrides(case: Case) -> list[str]:
    """The official arguments in our words."""
    args = case.info["args"]
    two_stage, mixed = bool(args.get("two_stage")), bool(args.get("mixed_selection"))
    info = {**case.info, "args": {**args, "num_queries": args["num_queries_one2one"]}}
    common = deformable_detr.overrides(replace(case, info=info))
    refine = bool(args.get("with_box_refine"))
    return [
        "family=h_deformable_detr",
        *(one for one in common[1:] if not one.startswith(("decoder=", "query_source="))),
        f"decoder={'refine' if refine else 'plain'}",
        f"decoder.look_forward={str(refine and bool(args.get('look_forward_twice'))).lower()}",
        f"query_source={('proposals_mixed' if mixed else 'proposals') if two_stage else 'learned_points'}",
        f"model.num_one_to_many={args['num_queries_one2many']}",
        f"one_to_many.repeats={max(1, args['k_one2many'])}",
        # without copies the official loop leaves the branch untrained
        f"one_to_many.weight={args['lambda_one2many'] if args['k_one2many'] else 0.0}",
        f"postprocess.num_select={args['topk']}",
    ]


def _without_branch(key: str) -> str:
    """A key of the one-to-many branch as the same key of the other one, marked: the place of the mark is anyone's."""
    return "one2many:" + re.sub(r"[._]?one2many(?=\.|_|$)", "", key) if "one2many" in key else key
