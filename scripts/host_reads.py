"""Count how often a computation asks the device for numbers, also where the device is the CPU and nobody waits."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

COPIES = (Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__)
"""Whole tensors that travel to the host."""

MOVE = Tensor.to
"""As it is before a rival puts something in its place."""

QUESTIONS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")
"""What has to know numbers of the device to go on: item, int, float, bool, a number as a size; a size that depends."""


def count_host_reads(run: Callable[[], object]) -> int:
    """How many copies from the device to the host a run would make if its model were on a device of its own.

    On the device is everything but what is made on the host: by a function that is given neither tensors nor a
    ``torch.device``, by functions of such tensors alone, and what was read. A tensor reaches the device by ``.to`` with
    a ``torch.device`` or together with tensors that are there.
    """
    reads = _Reads()
    with reads, _Questions(reads):
        run()
    return reads.count


class _Reads(TorchFunctionMode):
    """Knows the tensors of the host, and counts the copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._host: dict[int, weakref.ref[Tensor]] = {}

    def on_device(self, tensor: Tensor) -> bool:
        known = self._host.get(id(tensor))
        return known is None or known() is not tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(tree_iter((args, kwargs)))
        tensors = [one for one in given if isinstance(one, Tensor)]
        asked = any(isinstance(one, torch.device) for one in given)
        inputs_on_device = any(self.on_device(one) for one in tensors)
        read = func in COPIES or (func is MOVE and "cpu" in [one for one in given if isinstance(one, str)])
        self.count += read and inputs_on_device
        output = func(*args, **kwargs)
        moved = func is MOVE and isinstance(output, Tensor)
        if read or moved:
            output = _new_name(output, args[0])
        if read or not (inputs_on_device or asked):
            for one in tree_iter(output):
                if isinstance(one, Tensor):
                    self._host[id(one)] = weakref.ref(one)
        return output


class _Questions(TorchDispatchMode):
    """Counts what asks for numbers without saying so."""

    def __init__(self, reads: _Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in QUESTIONS:
            asked = any(self._reads.on_device(one) for one in args if isinstance(one, Tensor))
        elif name in ("aten::index", "aten::index_put", "aten::index_put_"):
            asked = any(one is not None and one.dtype == torch.bool and self._reads.on_device(one) for one in args[1])
            asked = asked and (name == "aten::index" or args[2].numel() != 1)  # one number everywhere is a masked fill
        else:
            asked = False
        self._reads.count += asked
        return func(*args, **(kwargs or {}))


def _new_name(output: Any, source: Any) -> Any:
    """Where a copy copied nothing, the same numbers under another name, so that each has a place of its own."""
    return output.view(output.shape) if output is source else output
