"""The Swin of IDEA-Research/DINO by itself, in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from detfamily.backbones.stages import Stage
from detfamily.backbones.swin import Swin
from detfamily.backbones.weights import is_beyond
from detfamily.blocks.tokens import resize_mask
from detfamily.checkpoints.adapter import Adapter
from detfamily.checkpoints.swin import rules
from detfamily.errors import DataError
from detfamily.parity.case import Case

_FIXED: dict[str, tuple[Any, ...]] = {
    "patch_size": (4, [4, 4]),
    "in_chans": (3,),
    "qk_scale": (None,),
    "ape": (False,),
}
"""Arguments that have one value in all published models."""

_WITHOUT_EFFECT = ("pretrain_img_size", "drop_rate", "attn_drop_rate")
"""Arguments of training, or of what is not there."""


def results(case: Case) -> dict[str, Tensor]:
    """Maps, masks, loss and gradients, and what lies between the blocks."""
    swin = _swin(case)
    adapter = Adapter(rules("", ""))
    last = len(swin.stages) - 1
    ours = {name: value for name, value in adapter.to_ours(case.weights).items() if not is_beyond(name, last)}
    swin.load_state_dict(ours)
    swin.to(case.dtype).eval()
    with _watched(swin) as found:
        maps = swin(case.io["image"])
    names = _names(case, len(maps))
    probes = (case.io[f"probe.{name}"] for name in names)
    loss = torch.stack([(one * probe).sum() for one, probe in zip(maps, probes, strict=True)]).sum() / 10
    loss.backward()
    found["loss.total"] = loss
    found |= {f"out.{name}": one for name, one in zip(names, maps, strict=True)}
    found |= {
        f"out.mask.{name}": resize_mask(case.io["mask"], one.shape[-2:]) for name, one in zip(names, maps, strict=True)
    }
    return {key: value.detach() for key, value in (found | _gradients(case, swin, adapter)).items()}


def _swin(case: Case) -> Swin:
    args = dict(case.info["args"])
    for name, values in _FIXED.items():
        if args.pop(name, values[0]) not in values:
            raise DataError(f"{case.name}: {name}={case.info['args'][name]} has no counterpart, only {values[0]} has")
    for name in _WITHOUT_EFFECT:
        args.pop(name, None)
    frozen = args.pop("frozen_stages", -1)
    swin = Swin(
        embed_dim=args.pop("embed_dim", 96),
        depths=args.pop("depths", [2, 2, 6, 2]),
        num_heads=args.pop("num_heads", [3, 6, 12, 24]),
        window_size=args.pop("window_size", 7),
        stages=[index + 2 for index in args.pop("out_indices", range(4))],
        # 0 and 1 both mean the patches alone, of which ours is 1
        frozen_stages=0 if frozen < 0 else max(frozen, 1),
        drop_path=args.pop("drop_path_rate", 0.2),
        mlp_ratio=args.pop("mlp_ratio", 4.0),
        qkv_bias=args.pop("qkv_bias", True),
        patch_norm=args.pop("patch_norm", True),
        dilation=args.pop("dilation", False),
        gradient_checkpointing=args.pop("use_checkpoint", False),
    )
    if args:
        raise DataError(f"{case.name}: there is no counterpart for {', '.join(args)}")
    return swin


def _names(case: Case, count: int) -> list[int]:
    """What the case calls the maps: by their stages, or else in their order."""
    stages = list(case.info["args"].get("out_indices", range(count)))
    return stages if all(f"probe.{stage}" in case.io for stage in stages) else list(range(count))


@contextmanager
def _watched(swin: Swin) -> Iterator[dict[str, Tensor]]:
    """What the patches, the blocks and the merging of patches give."""
    found: dict[str, Tensor] = {}
    named: dict[str, nn.Module] = {}
    for index, stage in enumerate(cast("Stage", one) for one in swin.stages):
        named |= {f"mid.layer{index}.block{number}": block for number, block in enumerate(stage.blocks)}
        named |= {f"mid.layer{index}.downsample": stage.merge} if stage.merge is not None else {}

    def keep(key: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        found[key] = output.flatten(1, 2)

    def keep_map(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found["mid.patch_embed"] = output.permute(0, 3, 1, 2)

    hooks = [swin.patches.register_forward_hook(keep_map)]
    hooks += [module.register_forward_hook(partial(keep, key)) for key, module in named.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _gradients(case: Case, swin: Swin, adapter: Adapter) -> dict[str, Tensor]:
    """Those of frozen parameters, and of stages behind the last map, are zero."""
    given = {name: one.grad for name, one in swin.named_parameters() if one.grad is not None}
    official = adapter.to_official(given)
    found: dict[str, Tensor] = {}
    for name, weight in case.weights.items():
        gradient = official.get(name, torch.zeros(weight.shape, dtype=case.dtype))
        found |= {f"grad.{name}": gradient, f"grad_norm.{name}": gradient.norm()}
    return found
