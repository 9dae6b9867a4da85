"""Blocks that the configs of these tests name, imported as ``detfamily.example_blocks``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from detfamily.errors import DataError

if TYPE_CHECKING:
    from nowhere import Unknown


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.width, self.heads, self.dropout = width, heads, dropout


class Encoder(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module], depth: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.norm = norm


class Recipe:
    def __init__(
        self,
        lr: float,
        epochs: int,
        drops: Sequence[int] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        width: int | Literal["auto"] = "auto",
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        decay: float | None = None,
        weights: Mapping[str, float] | None = None,
        nesterov: bool = False,
        note: str = "",
        mystery: Unknown = None,
        amsgrad: bool = False,
    ) -> None:
        self.__dict__.update(locals())


class Folder:
    def __init__(self, root: str | Path, limit: int | None = None) -> None:
        self.root, self.limit = root, limit


class Composed:
    def __init__(self, parts: Sequence[nn.Module], names: Mapping[str, Sequence[int]]) -> None:
        self.parts, self.names = parts, names


def raises(kind: str) -> None:
    raise {
        "value": ValueError("bad value"),
        "import": ImportError("pip install it"),
        "file": FileNotFoundError("no such file"),
        "data": DataError("broken image"),
        "bug": ZeroDivisionError("a fault of ours"),
    }[kind]


not_callable = 3
