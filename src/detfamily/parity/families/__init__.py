"""What each family needs to compute its golden cases: a file per family, named like the folder of its cases.

A family's module has ``results(case) -> dict[str, Tensor]``, and where a case keeps results outside of its tensors,
``expected(case) -> dict[str, Tensor]`` for them.
"""
