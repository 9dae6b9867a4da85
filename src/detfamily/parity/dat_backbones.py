"""Whole DATs and single stages of them: LeapLabTHU/DAT and LeapLabTHU/DAT-Detection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from detfamily.backbones.dat import CONV, DAT, ConvStem, PatchStem
from detfamily.backbones.stages import PATCH, Stage
from detfamily.backbones.weights import fill
from detfamily.checkpoints.adapter import Adapter, Rename
from detfamily.checkpoints.dat import dat_adapter, tables
from detfamily.errors import DataError
from detfamily.parity.case import Case
from detfamily.parity.dat_modules import MIX_FEED_FORWARD, OF_2022, Arguments, build, default_type, kind_of

MODULES = ("TransformerStage", "DAT")
"""The official classes of these cases."""

_DROPPED = ("drop_rate", "attn_drop_rate", "drop_path_rate", "drop", "attn_drop", "proj_drop")
"""Arguments without effect in evaluation."""

_WITHOUT_EFFECT = (
    *("lower_lr_kvs", "init_cfg", "use_checkpoint", "stage_i"),
    *("ns_per_pt", "ns_per_pts", "local_orf", "local_kv_size", "local_kv_sizes", "offset_pes", "deform_groups"),
    *("heads_q", "k_qna", "nq_qna", "ksize_qnas", "nqs", "qna_activation"),
)
"""Arguments of the optimiser, of nothing, or of kinds of blocks that do not run officially."""

_SWITCHES = ("use_pe", "dwc_pe", "fixed_pe", "no_off", "use_dwc_mlp", "use_cmt_mlp", "use_lpu")
_STAGE: dict[str, Any] = {
    **{"stage_spec": None, "depths": None, "heads": None, "window_size": 7, "n_groups": None, "stride": None},
    **{"offset_range_factor": None, "sr_ratio": None, "ksize": None, "nat_ksize": None},
    **{"layer_scale_value": -1, "log_cpb": False, **dict.fromkeys(_SWITCHES, False)},
}
"""Arguments of a stage, and what they are where they are not given."""

_BY_STAGE: dict[str, tuple[str, list[Any]]] = {
    "stage_spec": ("stage_spec", [["L", "D"], ["L", "D"], ["L", "D"] * 3, ["L", "D"]]),
    "depths": ("depths", [2, 2, 6, 2]),
    "heads": ("heads", [3, 6, 12, 24]),
    "window_sizes": ("window_size", [7] * 4),
    "groups": ("n_groups", [-1, -1, 3, 6]),
    "strides": ("stride", [-1] * 4),
    "offset_range_factor": ("offset_range_factor", [1, 2, 3, 4]),
    "sr_ratios": ("sr_ratio", [8, 4, 2, 1]),
    "ksizes": ("ksize", [9, 7, 5, 3]),
    "nat_ksizes": ("nat_ksize", [3] * 4),
    "layer_scale_values": ("layer_scale_value", [-1] * 4),
    "log_cpb": ("log_cpb", [False] * 4),
    **{f"{name}s": (name, [False] * 4) for name in _SWITCHES},
}
"""Arguments of a whole DAT that list one for each stage: what the stage calls them, and the official values."""

_DEFORMABLE = ("n_groups", "stride", "offset_range_factor", "use_pe", "dwc_pe", "fixed_pe", "no_off")
"""Arguments of a stage that its deformable attention takes as they are."""


def results(case: Case) -> dict[str, Tensor]:
    """Outputs in both precisions, gradients in float64, and what was loaded, for all sizes of the case.

    Raises:
        DataError: a value of an argument has no counterpart.
    """
    network = network_of(case)
    network.load(case.weights)
    ours = {f"loaded.{name}": value for name, value in network.official(dict(network.named_parameters())).items()}
    for key in case.io:
        before, _, name = key.rpartition(".")
        if name in ("image", "input"):
            ours |= _of_size(case, network, key, f"{before}." if before else "")
    return {key: value.detach() for key, value in ours.items()}


def _of_size(case: Case, network: Network, key: str, size: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for dtype, ending in ((torch.float32, ".f32"), (torch.float64, "")):
        network.to(dtype).zero_grad()
        x = case.io[key].detach().to(dtype).requires_grad_()
        with default_type(dtype if network.prefix else torch.float32):
            outputs = network(x)
        found |= {f"{size}{name}{ending}": value.detach() for name, value in outputs.items()}
    probes = {name: f"{size}{name.replace('out', 'cotangent', 1)}" for name in outputs}
    terms = [(outputs[name] * case.io[probe].double()).sum() for name, probe in probes.items() if probe in case.io]
    if terms:
        torch.stack(terms).sum().backward()
        assert x.grad is not None
        # copies: the other precision converts gradients in place
        given = {name: one.grad.clone() for name, one in network.named_parameters() if one.grad is not None}
        gradients = {"input": x.grad} | network.official(given)
        found |= {f"{size}grad.{name}": gradient for name, gradient in gradients.items()}
    network.to(torch.float32)
    return found


class Head(nn.Module):
    """The official classifier: norm, mean, linear layer."""

    adapter = Adapter([Rename("norm.{rest}", ("cls_norm.norm.{rest}",)), Rename("linear.{rest}", ("cls_head.{rest}",))])

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, num_classes)"""
        logits: Tensor = self.linear(self.norm(x.permute(0, 2, 3, 1)).mean((1, 2)))
        return logits


class Network(nn.Module):
    """A DAT with what the official module has besides, under its names.

    Args:
        dat: of any number of stages.
        prefix: that official names in the case have not.
        normed: the stages whose maps the official module gives through a norm; None: it gives no maps.
        head: the classifier, if it is one.
    """

    def __init__(
        self, dat: DAT, prefix: str = "", normed: Sequence[int] | None = None, head: Head | None = None
    ) -> None:
        super().__init__()
        self.dat = dat
        self.prefix = prefix
        self.normed = normed
        self.head = head
        for index, stage in enumerate(self._stages()):
            stage.norm = stage.norm if index in (normed or ()) else None
        self.adapter = dat_adapter(dat, "dat.", detection=normed is not None)

    def _stages(self) -> list[Stage]:
        return [cast("Stage", stage) for stage in self.dat.stages]

    def load(self, weights: Mapping[str, Tensor]) -> None:
        official = {self.prefix + name: value for name, value in weights.items()}
        fill(self.dat, official, dat_adapter(self.dat, detection=self.normed is not None), tables(self.dat), "the case")
        if self.head is not None:
            self.head.load_state_dict(Head.adapter.to_ours({k: v for k, v in weights.items() if k.startswith("cls_")}))

    def official(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What goes by our names, under those of the case."""
        parts = [{k: v for k, v in ours.items() if k.startswith(part)} for part in ("dat.", "head.")]
        head = Head.adapter.to_official({name.removeprefix("head."): value for name, value in parts[1].items()})
        return {k.removeprefix(self.prefix): v for k, v in self.adapter.to_official(parts[0]).items()} | head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """What the official module gives, by the keys of cases."""
        with _watched(self._stages()) as maps:
            normed = iter(self.dat(x))
        if self.normed is not None:
            given = [next(normed) if index in self.normed else one for index, one in enumerate(maps)]
            return {f"out.feat.{index}": one for index, one in enumerate(given)}
        if self.head is None:
            return {"out": maps[0]}
        return {f"out.stage.{index}": one for index, one in enumerate(maps)} | {"out.logits": self.head(maps[-1])}


@contextmanager
def _watched(stages: Sequence[Stage]) -> Iterator[list[Tensor]]:
    """The maps of all stages ahead of their norms, (B, C, h, w)."""
    maps: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        maps.append(output.permute(0, 3, 1, 2))

    hooks = [stage.blocks[-1].register_forward_hook(keep) for stage in stages]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


# ------------------------------------------------------------------------------------------------------- from arguments


def network_of(case: Case) -> Network:
    """Ours of the same settings, with weights of its own, in the mode of the case; training is without drops.

    Raises:
        DataError: a value of an argument has no counterpart.
    """
    args = Arguments(case.info["args"])
    training = case.info.get("mode", "eval").startswith("train")
    for name in _DROPPED:
        rate = args.pop(name, 0.0)
        if training and torch.tensor(rate).any():
            raise DataError(f"{name}={rate}: what is dropped at random in training cannot be compared")
    return _network(case, args).train(training)


def _network(case: Case, args: Arguments) -> Network:
    of_2022 = OF_2022 in case.info["reference"]
    for name in _WITHOUT_EFFECT:
        args.pop(name, None)
    if case.info["module"].endswith(":TransformerStage"):
        return Network(_stage_alone(args, of_2022), prefix="stages.0.")
    num_classes, normed = args.pop("num_classes", 1000), args.pop("out_indices", range(4))
    args.one_of("patch_size", PATCH)
    dat = _whole(args, of_2022)
    if "DAT-Detection" in case.info["reference"]:
        return Network(dat, normed=normed)
    return Network(dat, head=Head(dat.channels[-1], num_classes))


def _stage_alone(args: Arguments, of_2022: bool) -> DAT:
    dim_in, dim = args.pop("dim_in"), args.pop("dim_embed")
    side, expansion = args.pop("fmap_size"), args.pop("expansion")
    stage = {name: args.pop(name, value) for name, value in _STAGE.items()}
    stage |= {"stage_idx": args.pop("stage_idx")} if of_2022 else {}
    args.finish()
    return _dat([stage], dim, side, expansion, partial(Entry, in_dim=dim_in), merge_kernel=2)


def _whole(args: Arguments, of_2022: bool) -> DAT:
    dims = args.pop("dims", [96, 192, 384, 768])
    if any(dim != dims[0] * 2**index for index, dim in enumerate(dims)):
        raise DataError(f"dims={dims} has no counterpart: the official code runs with widths that double only")
    given = {one: args.pop(name, usual) for name, (one, usual) in _BY_STAGE.items()}
    stages = [{one: values[index] for one, values in given.items()} for index in range(len(dims))]
    for index, stage in enumerate(stages):
        stage |= {"stage_idx": index} if of_2022 else {}
    convolutions, width = args.pop("use_conv_patches", False), args.pop("dim_stem", 96)
    stem: Callable[..., nn.Module] = partial(ConvStem if convolutions and not of_2022 else PatchStem, stem_dim=width)
    if convolutions and of_2022:
        stem = partial(stem, kernel_size=7, padding=3)
    side, expansion = args.pop("img_size", 224) // PATCH, args.pop("expansion", 4)
    args.finish()
    return _dat(stages, dims[0], side, expansion, stem, merge_kernel=3 if convolutions else 2)


class Entry(nn.Module):
    """What a stage by itself begins with: a layer that changes the width, where it has to."""

    def __init__(self, embed_dim: int, in_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, embed_dim) if in_dim != embed_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, h, w) -> (B, h, w, C)"""
        tokens: Tensor = self.proj(x.permute(0, 2, 3, 1))
        return tokens


def _dat(
    stages: Sequence[dict[str, Any]],
    width: int,
    side: int,
    expansion: float,
    stem: Callable[..., nn.Module],
    merge_kernel: int,
) -> DAT:
    """From the arguments of its stages, and the side of the first's map in tokens."""
    specs = [
        [CONV if letter == "X" else f"{letter} of stage {index}" for letter in stage["stage_spec"][: stage["depths"]]]
        for index, stage in enumerate(stages)
    ]
    attention = {
        kind: partial(_attention, kind[0], stages[index], side // 2**index)
        for index, spec in enumerate(specs)
        for kind in spec
        if kind != CONV
    }
    scales = [stage["layer_scale_value"] for stage in stages]
    return DAT(
        width,
        [stage["depths"] for stage in stages],
        [stage["heads"] for stage in stages],
        specs,
        attention,
        ffn=[partial(_ffn, stage) for stage in stages],
        stem=stem,
        merge_kernel=merge_kernel,
        stages=range(2, len(stages) + 2),
        drop_path=0.0,
        mlp_ratio=expansion,
        local_perception=[stage["use_lpu"] for stage in stages],
        layer_scale=[value if value > 0 else None for value in scales],
        conv_kernel=[stage["window_size"] for stage in stages],
    )


def _attention(kind: str, stage: Mapping[str, Any], side: int, embed_dim: int, num_heads: int) -> nn.Module:
    """What a letter stands for."""
    width = {"dim": embed_dim}
    window = width | {"heads": num_heads, "window_size": stage["window_size"]}
    deformable = {name: stage[name] for name in _DEFORMABLE} | {"q_size": [side, side], "kv_size": [side, side]}
    deformable |= {"n_heads": num_heads, "n_head_channels": embed_dim // num_heads}
    deformable |= {name: stage[name] for name in (("stage_idx",) if "stage_idx" in stage else ("ksize", "log_cpb"))}
    letters = {
        "L": ("LocalAttention", window),
        "S": ("ShiftWindowAttention", window | {"shift_size": math.ceil(stage["window_size"] / 2)}),
        "D": ("DAttentionBaseline", deformable),
        "N": ("NeighborhoodAttention2D", width | {"num_heads": num_heads, "kernel_size": stage["nat_ksize"]}),
        "P": ("PyramidAttention", width | {"num_heads": num_heads, "sr_ratio": stage["sr_ratio"]}),
        "E": ("SlideAttention", width | {"num_heads": num_heads, "ka": 3}),
    }
    if kind not in letters:
        raise DataError(f"stage_spec has {kind!r}: it does not run officially, or has no counterpart")
    name, args = letters[kind]
    return build(kind_of(name, args), args)


def _ffn(stage: Mapping[str, Any], embed_dim: int, hidden_dim: int) -> nn.Module:
    name = "TransformerMLP"
    if stage["use_dwc_mlp"]:
        name = "TransformerMLPWithConv_CMT" if stage["use_cmt_mlp"] else "TransformerMLPWithConv"
        name = MIX_FEED_FORWARD if "stage_idx" in stage else name
    args = {"channels": embed_dim, "expansion": hidden_dim // embed_dim}
    return build(kind_of(name, args), args)
