"""The one criterion: matches every group of predictions, and sums its losses over all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from detfamily.criterion.losses import Normalizer
from detfamily.criterion.matcher import Assignment, Matcher, assign
from detfamily.criterion.rules import Known, Rule
from detfamily.errors import nearest
from detfamily.structures import Predictions, Targets

__all__ = ["Criterion", "Losses", "Normalizer"]


@dataclass(frozen=True)
class Losses:
    """What a step cost.

    Attributes:
        total: weighted sum, a scalar with a gradient.
        parts: unweighted scalars on the device, without a gradient, named "group/layer/loss": "match/5/giou", and those
            of auxiliary heads, "auxiliary.atss/head/giou".
        assignments: by group.
        ride: what travelled to the host with the matching's copy, if anything did.
    """

    total: Tensor
    parts: dict[str, Tensor]
    assignments: dict[str, Assignment]
    ride: np.ndarray | None = None


class Criterion(nn.Module):
    """Losses of all groups, all layers at once, with one device-to-host copy.

    Args:
        matcher: costs of the assignment.
        losses: name -> loss.
        weights: name -> weight of that loss; 0 leaves it out.
        groups: name -> rule of that group of predictions. A group that a detector does not predict is not used.
        aux_loss: train every decoder layer; otherwise the last one only.

    Raises:
        ValueError: weights and losses have different names.
    """

    def __init__(
        self,
        matcher: Matcher,
        losses: Mapping[str, nn.Module],
        weights: Mapping[str, float],
        groups: Mapping[str, Rule],
        aux_loss: bool = True,
    ) -> None:
        super().__init__()
        for name in weights:
            if name not in losses:
                raise ValueError(f"criterion.weights.{name}: there is no such loss; {nearest(name, losses)}")
        for name in losses:
            if name not in weights:
                raise ValueError(f"criterion.losses.{name} has no weight: pass criterion.weights.{name}")
        if not any(weights.values()):
            raise ValueError("criterion.weights are all zero: nothing would be trained")
        for group, rule in groups.items():
            for name in rule.left_out:
                if name not in losses:
                    raise ValueError(f"criterion.groups.{group}.left_out: no loss {name!r}; {nearest(name, losses)}")
        self.matcher = matcher
        self.losses = nn.ModuleDict({name: loss for name, loss in losses.items() if weights[name]})
        self.weights = dict(weights)
        self.groups = dict(groups)
        self.aux_loss = aux_loss

    def forward(
        self,
        predictions: Mapping[str, Predictions],
        targets: Targets,
        normalizer: Normalizer | None = None,
        ride: Tensor | None = None,
    ) -> Losses:
        """Compare predictions with targets.

        Args:
            predictions: by group, as the detector gives them.
            targets: the objects of the batch.
            normalizer: counts of the whole optimiser step; None for a step of this batch alone.
            ride: (X,) numbers on the device that are wanted on the host with the next copy.

        Raises:
            NonFiniteError: a matching cost is not finite.
            ValueError: a group of predictions has no rule.
        """
        if normalizer is None:
            counts = torch.tensor(targets.counts, dtype=torch.float32, device=targets.boxes.device)
            normalizer = Normalizer(counts)
        layers = {name: self._layers(group) for name, group in predictions.items()}
        wanted = {name: self._rule(name).targets(targets, group) for name, group in predictions.items()}
        open_to_all = [name for name, group in layers.items() if group.given is None]
        costs = {name: self.matcher.cost(layers[name], wanted[name]) for name in open_to_all}
        assignments, rode = assign(costs, wanted, ride)
        assignments |= {name: _own(group) for name, group in layers.items() if group.given is not None}
        total = next(iter(layers.values())).logits.new_zeros(())
        parts: dict[str, Tensor] = {}
        for name, group in layers.items():
            first, rule = len(predictions[name].logits) - len(group.logits), self._rule(name)
            divisor = rule.normalizer(normalizer, group)
            for loss_name, loss in self.losses.items():
                if loss_name in rule.left_out:
                    continue
                values: Tensor = loss(group, wanted[name], assignments[name], divisor)
                weight = rule.weight * self.weights[loss_name]
                total = total + weight * values.sum() if weight else total
                for layer, value in enumerate(values.detach(), start=first):
                    parts[f"{name}/{layer}/{loss_name}"] = value
            for loss_name, own in group.losses.items():
                assert isinstance(rule, Known)
                total = total + rule.own_weight * own.weight * own.value
                parts[f"{name}/{loss_name}"] = own.value.detach()
        return Losses(total, parts, assignments, rode)

    def _layers(self, group: Predictions) -> Predictions:
        return group if self.aux_loss else replace(group, logits=group.logits[-1:], boxes=group.boxes[-1:])

    def _rule(self, name: str) -> Rule:
        """That of a group; "auxiliary.atss" has that of "auxiliary"."""
        kind = name.partition(".")[0]
        if kind not in self.groups:
            raise ValueError(f"the detector predicts a group {name!r}, and criterion.groups has only {[*self.groups]}")
        return self.groups[kind]


def _own(group: Predictions) -> Assignment:
    """Every query its own target."""
    assert group.given is not None
    depth, batch, count = group.logits.shape[:3]
    query = torch.arange(count, device=group.logits.device).expand(depth, batch, count)
    return Assignment(query, group.given.matched.expand(depth, batch, count))
