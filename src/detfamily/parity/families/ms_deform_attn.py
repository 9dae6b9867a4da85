"""fundamentalvision/Deformable-DETR, ``models/ops``: the op by itself, and the module around it.

Each sub-case runs in float64 and in float32. The keys of the case stand for the precision that it is stored in; the
other precision has keys of its own ("d8.output in float32"), with float32's limits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from detfamily.attention.ms_deform import MSDeformAttention
from detfamily.ops import ms_deform_attn
from detfamily.parity.case import MUST_COMPARE, Case, role_of
from detfamily.structures import Grid, Size

ANY_DEVICE = True

_SCENARIO = re.compile(r"(?P<scenario>ref(?P<numbers>\d)(?P<mask>_mask)?)\.")
_DRAWN = ("value_proj.weight", "output_proj.weight")
"""What the official constructor draws at random."""


def expected(case: Case) -> dict[str, tuple[Tensor, str]]:
    """Initial values, which are for information otherwise, and all results again for the other precision."""
    initial = {key: (case.io[key], "output") for key in _initial_keys(case)}
    other = _other_precision(case)
    again = {
        f"{key} in {_name(other)}": (value.float(), role)
        for key, value in case.io.items()
        if (role := role_of(key, case.folder)) in MUST_COMPARE and not _ill_conditioned(key, case.io, other)
    }
    return initial | again


def results(case: Case) -> dict[str, Tensor]:
    """The op and the module in the precision that the case is stored in, and in the other one."""
    stored, other = _stored_precision(case), _other_precision(case)
    ours = _initial(case) | _in_precision(case, stored)
    return ours | {f"{key} in {_name(other)}": value for key, value in _in_precision(case, other).items()}


# ---------------------------------------------------------------------------------------------------------- precisions


def _stored_precision(case: Case) -> torch.dtype:
    return torch.float64 if any(value.dtype == torch.float64 for value in case.io.values()) else torch.float32


def _other_precision(case: Case) -> torch.dtype:
    return torch.float32 if _stored_precision(case) == torch.float64 else torch.float64


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ill_conditioned(key: str, io: dict[str, Tensor], dtype: torch.dtype) -> bool:
    """At whole pixels gradients by location have two sides; float32 falls on either, so only float64 can compare."""
    prefix, _, name = key.rpartition(".")
    exact = prefix.rpartition(".")[2].startswith("exact_") or f"{prefix}.disagree" in io
    return dtype == torch.float32 and exact and name == "grad_sampling_locations"


def _in_precision(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    io = {key: value.to(dtype) if value.is_floating_point() else value for key, value in case.io.items()}
    ours: dict[str, Tensor] = {}
    for prefix in _prefixes(io, "value", "sampling_locations"):
        ours |= {prefix + name: value for name, value in _of_op(_under(prefix, io)).items()}
    for setting in _settings(case):
        module = setting.module()
        module.load_state_dict(setting.state)
        inputs = _under(setting.prefix, io)
        scenarios = _of_module(module.to(inputs["query"].device, dtype), inputs)
        ours |= {setting.prefix + name: value for name, value in scenarios.items()}
    return ours


def _prefixes(io: dict[str, Tensor], *names: str) -> list[str]:
    """The sub-cases that have inputs of these names."""
    ends = [key.removesuffix(names[0]) for key in io if re.search(rf"(^|\.){names[0]}$", key)]
    return [prefix for prefix in ends if all(prefix + name in io for name in names)]


def _under(prefix: str, io: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in io.items() if key.startswith(prefix)}


# -------------------------------------------------------------------------------------------------------------- the op


def _of_op(io: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("value", "sampling_locations", "attention_weights")
    value, locations, weights = (io[name].clone().requires_grad_() for name in names)
    output = ms_deform_attn(value, _shapes(io), locations, weights)
    gradients = torch.autograd.grad(output, (value, locations, weights), io["grad_output"])
    ours = {"output": output.detach()} | {f"grad_{name}": grad for name, grad in zip(names, gradients, strict=True)}
    if "disagree" in io:
        ours["grad_sampling_locations"] = _by_either_rule(ours["grad_sampling_locations"], io)
    return ours


def _by_either_rule(ours: Tensor, io: dict[str, Tensor]) -> Tensor:
    """Ours, as far from the official value as from the nearer of the two that are accepted where these disagree."""
    official, other = io["grad_sampling_locations"], io["cuda_rule.grad_sampling_locations"]
    nearer = io["disagree"] & ((ours - other).abs() < (ours - official).abs())
    return torch.where(nearer, official + (ours - other), ours)


def _shapes(io: dict[str, Tensor]) -> tuple[Size, ...]:
    return tuple((int(h), int(w)) for h, w in io["spatial_shapes"].tolist())


# ---------------------------------------------------------------------------------------------------------- the module


@dataclass(frozen=True)
class _Setting:
    """One configuration of the module: where its tensors lie, the official arguments, and its state."""

    prefix: str
    args: dict[str, int]
    state: dict[str, Tensor]

    def module(self) -> MSDeformAttention:
        """As the constructor leaves it."""
        return _module(*(self.args[name] for name in ("d_model", "n_levels", "n_heads", "n_points")))


def _module(d_model: int, n_levels: int, n_heads: int, n_points: int) -> MSDeformAttention:
    return MSDeformAttention(d_model, n_heads, n_levels, n_points)


def _settings(case: Case) -> Iterator[_Setting]:
    """Those of the sub-cases: arguments and state under its name, or without one of the case."""
    for prefix in _prefixes(case.io, "input_flatten", "query"):
        args = case.info.get(f"args_{prefix.rstrip('.')}", case.info["args"])
        yield _Setting(prefix, args, _under(f"{prefix}state.", case.io) or case.weights)


def _of_module(module: MSDeformAttention, io: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scenarios of which results are stored: points or boxes, with or without the padding mask."""
    ours: dict[str, Tensor] = {}
    for match in {found[0]: found for key in io if (found := _SCENARIO.match(key))}.values():
        points = io[f"reference_points_{match['numbers']}d"].clone().requires_grad_()
        query, source = (io[name].clone().requires_grad_() for name in ("query", "input_flatten"))
        ratios = torch.ones(len(source), module.num_levels, 2, dtype=source.dtype, device=source.device)
        grid = Grid(_shapes(io), io["padding_mask"] if match["mask"] else None, ratios)
        output = module.sample(query, points, source, grid)
        leaves = {
            "query": query,
            "reference_points": points,
            "input_flatten": source,
            **dict(module.named_parameters()),
        }
        gradients = torch.autograd.grad(output, list(leaves.values()), io["grad_output"])
        ours[f"{match['scenario']}.output"] = output.detach()
        ours |= {f"{match['scenario']}.grad.{name}": grad for name, grad in zip(leaves, gradients, strict=True)}
    return ours


# ------------------------------------------------------------------------------------------------------- initial values


def _initial_keys(case: Case) -> list[str]:
    return [key for key in case.io if re.search(r"(^|\.)init(_[\d_]+)?\.", key) and not key.endswith(_DRAWN)]


def _initial(case: Case) -> dict[str, Tensor]:
    """``init.NAME`` is of the sub-case's module, ``init_C_L_M_P.NAME`` of one with the arguments in its name."""
    modules = {f"{one.prefix}init.": one.module() for one in _settings(case)}
    for key in _initial_keys(case):
        if match := re.search(r"^(?:.*\.)?init_(\d+)_(\d+)_(\d+)_(\d+)\.", key):
            modules[match[0]] = _module(*map(int, match.groups()))
    states = {prefix: module.state_dict() for prefix, module in modules.items()}
    return {prefix + name: value for prefix, state in states.items() for name, value in state.items()}
