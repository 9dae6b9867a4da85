"""The optimiser: parameter groups as data, clipping, the gate against non-finite updates, averaged weights.

No function here asks the device for a value, so a step runs without waiting for it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detfamily.engine.distributed import World
from detfamily.engine.sharding import share_like, whole
from detfamily.errors import ConfigError, NonFiniteError, nearest

DEFAULT_GROUP = "default"


@dataclass(frozen=True)
class ParameterGroup:
    """Which parameters get another learning rate or weight decay.

    Attributes:
        pattern: regular expression, searched for in the dotted parameter names.
        lr_factor: multiplies the base learning rate; 0.1 is the backbones' in the DETR line.
        weight_decay: instead of the base weight decay; None keeps it.
        optional: the group may be empty, because some choices of blocks have no such parameters; otherwise a pattern
            that matches nothing is taken for a typo.
        max_dim: parameters of so many axes or fewer belong to the group, too, whatever they are called: with 1 the
            biases and the scales of norms; None adds none.
    """

    pattern: str
    lr_factor: float = 1.0
    weight_decay: float | None = None
    optional: bool = False
    max_dim: int | None = None

    def holds(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter belongs to the group."""
        few = self.max_dim is not None and parameter.ndim <= self.max_dim
        return few or re.search(self.pattern, name) is not None


@dataclass(frozen=True)
class AdamW:
    """AdamW with the groups, the clipping and the averaging that belong to a recipe.

    Attributes:
        lr: base learning rate, for the declared total batch size.
        weight_decay: decoupled weight decay; in the DETR line it hits all parameters, norms and biases too.
        betas: decay of the two moments.
        clip_norm: largest norm of all gradients together; None does not clip.
        ema_decay: decay of averaged weights, which are evaluated and saved beside the trained ones; None: no averages.
        groups: name -> group, as ``ParameterGroup`` or a mapping of its fields; None takes a group away. A trainable
            parameter that no group names has the base values.

    Raises:
        ConfigError: a value out of range, or a group with an unknown field or a broken pattern.
    """

    lr: float
    weight_decay: float = 1e-4
    betas: Sequence[float] = (0.9, 0.999)
    clip_norm: float | None = 0.1
    ema_decay: float | None = None
    groups: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optimizer.lr is {self.lr}; expected a number above 0")
        if self.weight_decay < 0:
            raise ConfigError(f"optimizer.weight_decay is {self.weight_decay}; expected 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas is {list(self.betas)}; expected two numbers of at least 0, less than 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"optimizer.clip_norm is {self.clip_norm}; expected above 0, or null for no clipping")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"optimizer.ema_decay is {self.ema_decay}; expected between 0 and 1, or null for none")
        groups = {name: _as_group(name, group) for name, group in self.groups.items() if group is not None}
        object.__setattr__(self, "groups", groups)

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """The optimiser of the trainable parameters, in as few groups as there are distinct settings.

        Raises:
            ConfigError: a pattern that matches nothing, a parameter of two groups, or nothing to train.
        """
        members = assign(model, self.groups)
        merged: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
        for name, parameters in members.items():
            merged[self.settings_of(name)].extend(parameters.values())
        if not any(merged.values()):
            raise ConfigError("the model has no trainable parameter; is everything frozen?")
        groups: list[dict[str, Any]] = [
            {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": weight_decay}
            for (lr, weight_decay), parameters in merged.items()
            if parameters
        ]
        # The fused kernel is the fastest on the CPU too, and the one that can be told on the device to skip a step.
        return torch.optim.AdamW(groups, betas=(self.betas[0], self.betas[1]), fused=True)

    def settings_of(self, name: str) -> tuple[float, float]:
        """(learning rate, weight decay) of a group."""
        group = self.groups.get(name)
        if group is None:
            return self.lr, self.weight_decay
        return self.lr * group.lr_factor, self.weight_decay if group.weight_decay is None else group.weight_decay

    def describe(self, model: nn.Module) -> str:
        """A few words for the recipe: base values, then each group with its share of the parameters."""
        words = [f"AdamW, lr {self.lr:g}, weight decay {self.weight_decay:g}"]
        for name, parameters in assign(model, self.groups).items():
            count = sum(parameter.numel() for parameter in parameters.values())
            if name != DEFAULT_GROUP and count:
                lr, weight_decay = self.settings_of(name)
                decay = "" if weight_decay == self.weight_decay else f", weight decay {weight_decay:g}"
                words.append(f"{name} lr {lr:g}{decay} ({count / 1e6:.2f} M)")
        words.append("no clipping" if self.clip_norm is None else f"clip {self.clip_norm:g}")
        if self.ema_decay is not None:
            words.append(f"averaged weights {self.ema_decay:g}")
        return "; ".join(words)


def assign(model: nn.Module, groups: Mapping[str, ParameterGroup]) -> dict[str, dict[str, nn.Parameter]]:
    """Put each trainable parameter into exactly one group.

    A pattern may match frozen parameters only (a backbone that is all frozen): then its group is empty.

    Returns:
        group name -> parameter name -> parameter; the group ``default`` holds what no pattern matches.

    Raises:
        ConfigError: a pattern that matches no parameter at all (with the nearest names), or a trainable parameter
            that two patterns match (with both).
    """
    parameters = dict(model.named_parameters())
    members: dict[str, dict[str, nn.Parameter]] = {DEFAULT_GROUP: {}, **{name: {} for name in groups}}
    for group_name, group in groups.items():
        if not group.optional and not any(group.holds(name, one) for name, one in parameters.items()):
            word = max(re.findall(r"\w+", group.pattern), key=len, default=group.pattern)
            parts = {part for name in parameters for part in (name, *name.split(".")) if not part.isdigit()}
            raise ConfigError(
                f"optimizer.groups.{group_name}: the pattern {group.pattern!r} matches no parameter; "
                f"{nearest(word, parts)} (optimizer.groups.{group_name}=null takes the group away)"
            )
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        found = [group_name for group_name, group in groups.items() if group.holds(name, parameter)]
        if len(found) > 1:
            patterns = " and ".join(f"{one} ({groups[one].pattern!r})" for one in found)
            raise ConfigError(f"the parameter {name} is matched by the groups {patterns}; make their patterns disjoint")
        members[found[0] if found else DEFAULT_GROUP][name] = parameter
    return members


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give each group its base learning rate times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float | None) -> Tensor:
    """Scale all gradients so that their norm is at most ``clip_norm``; return the norm before that, on the device."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    if clip_norm is None:
        gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
        return whole(nn.utils.get_total_norm(gradients))
    return whole(nn.utils.clip_grad_norm_(with_gradient, clip_norm))


def gated_step(optimizer: torch.optim.AdamW, finite: Tensor) -> None:
    """Update the parameters, their moments and step counts if ``finite`` holds; leave all as they are if not.

    The decision is taken by the fused kernel on the device, through the door that gradient scalers use; where
    parameters are shared out, for which there is no such door, by the host, which waits for it.

    Args:
        optimizer: a fused AdamW.
        finite: scalar bool tensor on the parameters' device.
    """
    if any(isinstance(one, DTensor) for group in optimizer.param_groups for one in group["params"][:1]):
        if finite.item():
            optimizer.step()
        return
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


class RunningStatistics:
    """The running means and variances of trained batch norms, which a forward moves before anybody has judged it.

    Args:
        model: whose norms to watch; frozen norms have nothing that moves.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
        self.values = [buffer for norm in norms for buffer in norm.buffers()]
        self.kept = [buffer.clone() for buffer in self.values]

    def remember(self) -> None:
        """Note the values before a step."""
        for kept, value in zip(self.kept, self.values, strict=True):
            kept.copy_(value)

    def settle(self, finite: Tensor) -> None:
        """Leave the values as they are if the step was finite, else put back those noted; decided on the device."""
        for kept, value in zip(self.kept, self.values, strict=True):
            value.copy_(torch.where(finite, value, kept))


class FiniteGuard:
    """Keeps updates out that are not finite, and reports them one step later, without a wait for the device.

    The device decides itself (``board``); what it decided rides to the host with the next step's matching (``look``).

    Args:
        world: the processes, which all decide alike; the main one reports.
        skip: report and go on; otherwise the first report is an error.
        scaled: gradients are scaled for float16. A gradient that overflows is then the scaler's daily business, and
            only reported when it does not end.
        explain: finds out what was not finite in the step that was judged last, in words; called by all processes.

    Attributes:
        in_a_row: steps that were not finite, up to the last one.
    """

    # More in a row than a scale of 2 ** 16 needs to come down to nothing: it is the weights that are broken.
    PATIENCE = 40

    def __init__(self, world: World, skip: bool, scaled: bool = False, explain: Callable[[], str] = lambda: "") -> None:
        self.world, self.skip, self.scaled, self.explain = world, skip, scaled, explain
        self.flags: Tensor | None = None
        self.in_a_row = 0
        self._step = 0
        self._image_ids: list[int] = []

    def board(self, loss: Tensor, norm: Tensor, step: int, image_ids: Sequence[int]) -> Tensor:
        """Judge a step.

        Args:
            loss: scalar, of this process.
            norm: scalar, of the averaged gradients.
            step: counted from 1, for the report.
            image_ids: images of this step in all processes, for the report.

        Returns:
            Scalar bool tensor: whether the update may be made.
        """
        self.flags = self.world.minimum(torch.stack([loss.isfinite(), norm.isfinite()]).float())
        self._step, self._image_ids = step, list(image_ids)
        return self.flags.min() > 0

    def look(self, ride: Any = None) -> None:
        """Report on the step that was judged last, once.

        Args:
            ride: its flags on the host, where they have got there; None fetches them, which waits for the device.

        Raises:
            NonFiniteError: the step was not finite and ``skip`` is off, or too many were not in a row.
        """
        if self.flags is None:
            return
        loss, gradient = (self.flags if ride is None else ride).tolist()
        self.flags = None
        if loss and gradient:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if loss and self.scaled and self.in_a_row < self.PATIENCE:
            return
        what = "a gradient" if loss else "the loss"
        images = ", ".join(map(str, self._image_ids))
        text = f"step {self._step}: {what} is not finite (images {images}); the weights were left as they were"
        if found := self.explain():
            text += f". {found}"
        if self.in_a_row >= self.PATIENCE:
            raise NonFiniteError(f"{text}. That is {self.in_a_row} steps in a row: the learning rate may be too high")
        if not self.skip:
            raise NonFiniteError(
                f"{text}. To leave such steps out and go on: runtime.on_non_finite=skip. Often the learning rate is "
                "too high, or runtime.precision=fp16 overflows (bf16 does not)"
            )
        self.world.say(text)


def moments(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, dict[str, Tensor]]:
    """What the optimiser remembers, by parameter name, so that other groups in a resumed run cannot mix it up."""
    return {
        name: {key: whole(value) for key, value in optimizer.state[one].items()}
        for name, one in model.named_parameters()
        if one in optimizer.state
    }


def load_moments(model: nn.Module, optimizer: torch.optim.AdamW, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give each parameter what ``moments`` kept for it."""
    for name, parameter in model.named_parameters():
        if name in saved and parameter.requires_grad:
            optimizer.state[parameter] = {key: share_like(value, parameter) for key, value in saved[name].items()}


class Ema:
    """Exponential moving average of the weights and buffers, in a model of its own.

    The decay warms up as min(decay, (1 + n) / (10 + n)) over the n updates, so that the averages of a short run do not
    remember its random start.

    Args:
        model: the trained model, not yet wrapped for several processes.
        decay: share of the old average in the new one, in the long run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = AveragedModel(model, multi_avg_fn=self._blend, use_buffers=True)
        self.average.eval().requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The model that holds the averages."""
        return self.average.module

    @property
    def updates(self) -> int:
        """How often the averages were updated."""
        return int(self.average.n_averaged)

    def update(self, model: nn.Module) -> None:
        """Move the averages towards the model's present values; the first call copies them."""
        self.average.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.n_averaged.fill_(state["updates"])

    def _blend(self, averages: Any, current: Any, _: Tensor | int) -> None:
        # The count that comes in lies on the parameters' device; the own one is on the host.
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(averages, current, None)


def _as_group(name: str, group: Any) -> ParameterGroup:
    if not isinstance(group, ParameterGroup):
        known = [one.name for one in fields(ParameterGroup)]
        for key in group:
            if key not in known:
                raise ConfigError(f"optimizer.groups.{name} has the unknown field {key!r}; {nearest(key, known)}")
        if "pattern" not in group:
            raise ConfigError(f"optimizer.groups.{name} has no pattern; expected a regular expression on names")
        group = ParameterGroup(**group)
    if name == DEFAULT_GROUP:
        raise ConfigError("optimizer.groups.default: this name is taken by the parameters that no pattern matches")
    try:
        re.compile(group.pattern)
    except re.error as error:
        raise ConfigError(
            f"optimizer.groups.{name}.pattern {group.pattern!r} is no regular expression: {error}"
        ) from error
    if group.lr_factor < 0 or (group.weight_decay or 0) < 0:
        raise ConfigError(f"optimizer.groups.{name}: lr_factor and weight_decay must not be negative")
    return group
