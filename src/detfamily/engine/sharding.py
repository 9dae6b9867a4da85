"""Parameters shared out among the processes: FSDP2, for networks of which no device holds all that training needs.

Each process keeps its share of every parameter, of its gradient and of its moments, and fetches the rest of a layer
when that layer computes (Rajbhandari et al., arXiv 1910.02054, stage 3; Zhao et al., arXiv 2304.11277). What is
computed is what ``DistributedDataParallel`` computes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def share_out(net: nn.Module, device_type: str, processes: int) -> FSDPModule:
    """Let each process keep its share of a network, in place.

    Args:
        net: with the same parameters in all processes; it is only ever called as a whole afterwards.
        device_type: ``cpu`` or ``cuda``.
        processes: how many share it.
    """
    mesh = init_device_mesh(device_type, (processes,))
    for layer in repeated_layers(net):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def repeated_layers(net: nn.Module) -> Iterator[nn.Module]:
    """The layers that are fetched one at a time: members of the innermost lists of modules with parts of their own."""
    for child in net.children():
        members = list(child) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        if len(members) > 1 and all(any(one.children()) for one in members):
            for one in members:
                yield from list(repeated_layers(one)) or [one]
        else:
            yield from repeated_layers(child)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out; a call of all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(net: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network that may be shared out, with whole tensors; a call of all processes."""
    return {name: whole(one) for name, one in net.state_dict().items()}


def share_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process' share of a tensor like a parameter, on the parameter's device; a call of all processes."""
    tensor = tensor.detach().clone().to(parameter.device)
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
