"""What each family needs to compute its golden cases: a file per family, named like the folder of its cases.

A family's module has ``results(case) -> dict[str, Tensor]``. Where more is to be compared than the tensors whose role
demands it (numbers in the case's json, the same tensors in another precision), ``expected(case)`` gives it, each with
the role that sets its limit: ``dict[str, tuple[Tensor, str]]``. ``ANY_DEVICE = True`` says that results are computed on
the device of the case's tensors; the other families run on the CPU.
"""
