"""Do the queries differ at all? A detector whose queries all answer alike has a falling loss, and finds nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from detfamily.engine.distributed import World
from detfamily.structures import Predictions

# Standard deviation of box centres and sizes, as a share of the image. Detectors of both families that have learned
# something have 0.13 to 0.3; DETR starts at 0.00001 and finds nothing while it is at 0.01.
ALIKE = 0.01


class QuerySpread:
    """How much boxes differ from query to query, on average over images; summed up on the device, read once.

    Args:
        world: the processes, which see different images.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._sum: Tensor | None = None

    def update(self, predictions: Predictions) -> None:
        """Take in the last layer's boxes of a batch."""
        boxes = predictions.boxes[-1].detach().float()
        spread = boxes.std(1, correction=0).mean(-1).double()
        row = torch.stack([spread.sum(), torch.full_like(spread[:1], len(spread))[0]])
        self._sum = row if self._sum is None else self._sum + row

    def read(self) -> float:
        """Mean standard deviation over the queries, a share of the image, or NaN; a call of all processes."""
        mine = [0.0, 0.0] if self._sum is None else self._sum.tolist()
        total, count = (sum(column) for column in zip(*self.world.gather_numbers(mine), strict=True))
        # Rounded, so that the number does not depend on how the images were shared.
        return round(total / count, 9) if count else float("nan")


def collapse_words(spread: float, num_queries: int) -> str | None:
    """A warning if the queries answer alike; one query cannot."""
    if num_queries < 2 or not spread < ALIKE:
        return None
    return (
        f"all {num_queries} queries answer alike: their boxes differ by {100 * spread:.2g} % of the image. That "
        "is usual at the start, and passes; if it stays, nothing will be found: train longer or with more images per "
        "step, lower optimizer.lr, and see whether experiment=overfit works on your data"
    )
