from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from detfamily.ops import backends
from detfamily.structures import Size

Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Call:
    """Inputs of both forms, in float64; ``arguments`` gives those of a form as leaves in a dtype."""

    value: Tensor
    shapes: tuple[Size, ...]
    references: Tensor
    offsets: Tensor
    logits: Tensor

    @classmethod
    def random(
        cls,
        shapes: Sequence[Size] = ((5, 7), (3, 2), (1, 1)),
        batch: int = 2,
        queries: int = 5,
        heads: int = 3,
        width: int = 8,
        points: int = 4,
        reference_dim: int = 2,
        seed: int = 0,
    ) -> Call:
        """About a fifth of the samples lies outside, and none on a whole pixel, where gradients have two sides."""
        generator = torch.Generator().manual_seed(seed)
        levels, tokens = len(shapes), sum(h * w for h, w in shapes)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        references = torch.rand(batch, queries, levels, reference_dim, generator=generator, dtype=torch.float64)
        return cls(
            normal(batch, tokens, heads, width),
            tuple(shapes),
            0.05 + 0.9 * references,
            2 * normal(batch, queries, heads, levels, points, 2),
            normal(batch, queries, heads, levels * points),
        )

    def off_edges(self, distance: float = 1e-3) -> Call:
        """The same, with samples of the projected form moved that are about to lie on a whole pixel.

        Of some hundred thousand samples a few are so near that float32 puts them on the other side.
        """
        sizes = torch.tensor([(w, h) for h, w in self.shapes], dtype=torch.float64)[:, None]
        references = self.references[:, :, None, :, None]
        if references.shape[-1] == 4:
            pixels = sizes * references[..., 2:] / (2 * self.offsets.shape[-2])
        else:
            pixels = torch.ones_like(sizes)
        places = references[..., :2] * sizes - 0.5 + self.offsets * pixels
        near = (places - places.round()).abs() < distance
        return replace(self, offsets=torch.where(near, self.offsets + 10 * distance / pixels, self.offsets))

    def plain(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
        """Value, sampling locations, attention weights."""
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        centers = self.references[:, :, None, :, None, :2]
        locations = centers + 0.1 * self.offsets
        weights = self.logits.view(self.offsets.shape[:-1])
        return _leaves(device, (self.value, dtype), (locations, precise), (weights, precise))

    def projected(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
        """Value, reference points, sampling offsets, attention logits."""
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        others = ((tensor, precise) for tensor in (self.references, self.offsets, self.logits))
        return _leaves(device, (self.value, dtype), *others)


def _leaves(device: str, *pairs: tuple[Tensor, torch.dtype]) -> list[Tensor]:
    return [tensor.to(device, dtype, copy=True).requires_grad_() for tensor, dtype in pairs]


@pytest.fixture
def make_call() -> Callable[..., Call]:
    return Call.random


@pytest.fixture
def compiled() -> str:
    """The compiled backend of the CPU, which tests that are given this fixture run on."""
    statement = backends.describe("cpu")
    if backends.backend_for("cpu") != "cpu":
        pytest.skip(f"no compiled code for the CPU here: {statement}")
    return "cpu"
