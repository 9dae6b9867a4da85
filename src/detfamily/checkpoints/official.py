"""From an official file to our names, config and labels, and back."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from detfamily.build import build_detector, with_num_classes
from detfamily.checkpoints import mmcv
from detfamily.checkpoints.adapter import Adapter, listed
from detfamily.checkpoints.classes import (
    by_class,
    from_class,
    is_class_row,
    is_first_row_special,
    move_rows,
    say_object,
)
from detfamily.checkpoints.coco_classes import COLUMNS, coco_label_map
from detfamily.checkpoints.evidence import Evidence
from detfamily.checkpoints.registry import UPSTREAMS, Upstream, official_family, recognise, upstream_for
from detfamily.checkpoints.variant import Variant, as_override, columns
from detfamily.config import compose, to_container, validate
from detfamily.data.labels import LabelMap
from detfamily.errors import CheckpointError, ConfigError, DataError

# What thop counts, and what norms that were never frozen count: no weights.
_NOISE = re.compile(r"(^|\.)(total_ops|total_params|num_batches_tracked)$")
_AVERAGED = "ema_model"
_CHOOSES_MODEL = ("family", "experiment")
_CHOOSES_PARTS = ("data", "backbone", "decoder", "denoising", "auxiliary")
"""Choices after which a setting that the file tells may have no place."""
_ROOT_LATER = "data.root=''"
"""A data set is named when the model is used, not when its file is converted."""


@dataclass(frozen=True)
class OfficialFile:
    """What an official file holds.

    Attributes:
        path: the file.
        family: whose adapter reads it.
        state: official names, without ``module.`` and without what is no weight.
        args: the official settings that are plain values; empty where the file has none.
        ignored: names that are no weights.
        averaged: whether the weights are the averaged ones; None where the file has none.
    """

    path: Path
    family: str
    state: dict[str, Tensor]
    args: dict[str, Any]
    ignored: tuple[str, ...]
    averaged: bool | None = None

    @property
    def columns(self) -> int:
        """Of the class head, without "no object"."""
        upstream = UPSTREAMS[self.family]
        return columns(Evidence(self.state, {}, str(self.path)), upstream.class_head, upstream.no_object)


@dataclass(frozen=True)
class Translated:
    """An official file in our terms.

    Attributes:
        weights: our names.
        cfg: the config of the model, with its interpolations.
        config: the same as plain containers, resolved.
        label_map: what the columns of the class head stand for; None where that is not known.
        file: where it comes from.
        variant: the model in our words.
        overrides: of ``detfamily train``, from which ``cfg`` was composed.
        left_out: official names of what the file's model trains with and this one does not.
    """

    weights: dict[str, Tensor]
    cfg: DictConfig
    config: dict[str, Any]
    label_map: LabelMap | None
    file: OfficialFile
    variant: Variant
    overrides: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    @property
    def repository(self) -> str:
        return UPSTREAMS[self.file.family].repository


def read_official(content: Any, path: Path, averaged: bool | None = None) -> OfficialFile:
    """Find the state dict and the settings in what a file holds, and whose they are.

    Args:
        content: what ``read_file`` gave.
        path: for messages.
        averaged: take the averaged weights (EMA), which the official code keeps beside the trained ones, or the
            trained ones; None takes those that the official code evaluates: of mmcv the averaged ones, where there are
            some, and else the trained ones.

    Raises:
        CheckpointError: there is no state dict in it, or no averaged one; it holds something else than tensors, or no
            adapter knows it.
    """
    holder = content if isinstance(content, Mapping) else {}
    of_mmcv = mmcv.is_file(content)
    state = content["state_dict"] if of_mmcv else _state(holder, content, path, bool(averaged))
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path} holds {_kind(state)}; expected a state dict, by itself or as its 'model'")
    settings = _settings(holder.get("args"))
    if "state_dict" in state and isinstance(state["state_dict"], Mapping):
        recognise([str(name) for name in state["state_dict"]], str(path), settings)
        raise _no_such_layout(path)
    odd = [f"{name!r} ({_kind(value)})" for name, value in state.items() if not _is_weight(name, value)]
    if odd:
        raise CheckpointError(f"{path}: among its weights is what is no dense tensor with a name: {listed(odd, 4)}")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    found = bool(averaged) if _AVERAGED in holder else None
    if of_mmcv:
        state, found = _of_two_sets(state, path, averaged)
    ignored = tuple(name for name in state if _NOISE.search(name))
    weights = {name: value for name, value in state.items() if not _NOISE.search(name)}
    family = recognise(weights, str(path), settings)
    if (places := UPSTREAMS[family].places) is not None:
        settings = mmcv.settings(holder.get("meta"), places)
    elif of_mmcv:
        raise _no_such_layout(path)
    return OfficialFile(path, family, weights, settings, ignored, found)


def _no_such_layout(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} keeps its weights as 'state_dict'; official files have them as 'model'")


def _of_two_sets(
    state: Mapping[str, Tensor], path: Path, averaged: bool | None
) -> tuple[Mapping[str, Tensor], bool | None]:
    """The averaged or the trained weights of a file of mmcv, and which of them; None where there is one set only."""
    both = mmcv.averages(state)
    if both is None:
        if averaged:
            raise CheckpointError(
                f"{path} has no averaged weights, which mmcv keeps beside tensors ema_...: it has none of that name. "
                "Without ema=true (init_ema=true), its trained ones are taken"
            )
        return state, None
    return both[averaged is False], averaged is not False


def _state(holder: Mapping[Any, Any], content: Any, path: Path, averaged: bool) -> Any:
    """The trained or the averaged weights."""
    if averaged and _AVERAGED not in holder:
        raise CheckpointError(
            f"{path} has no averaged weights, which official files keep as {_AVERAGED!r}: it holds {_kind(content)}. "
            "Without ema=true (init_ema=true), its trained ones are taken"
        )
    if not averaged and _AVERAGED in holder and "model" not in holder:
        raise CheckpointError(
            f"{path} has averaged weights only: it holds {_kind(content)}. They are taken with ema=true (detfamily "
            "convert) or init_ema=true (detfamily train)"
        )
    return holder[_AVERAGED] if averaged else holder.get("model", content)


def translate(file: OfficialFile, overrides: Sequence[str] = (), label_map: LabelMap | None = None) -> Translated:
    """An official file in our names, with the config that it fits.

    Args:
        file: from ``read_official``.
        overrides: of ``detfamily train``, on top of what the file tells.
        label_map: what the columns stand for, one entry each; by default COCO's, if there are 91 of them.

    Raises:
        CheckpointError: tensors are missing, unknown, of another shape or not finite, each by its official name; or
            the file tells too little, or contradicts itself.
        ConfigError: an override that cannot be applied.
    """
    variant = upstream_for(file.family).variant(Evidence(file.state, file.args, str(file.path), _heads(overrides)))
    words = _overrides(variant, overrides, "contiguous" if UPSTREAMS[file.family].of_mmcv else "category_id")
    cfg = compose("train", [*words, *overrides])
    validate(cfg)
    number = file.columns
    if label_map is None:
        label_map = _known_labels(file)
    with torch.device("meta"):
        detector = build_detector(cfg, number, pretrained=False)
    if cfg.family_name != file.family:
        raise ConfigError(f"{file.path} is of the family {file.family}, and cannot become one of {cfg.family_name}")
    adapter = upstream_for(file.family).adapter(detector)
    weights = _checked(_without_spare_rows(file, number), adapter, detector.state_dict())
    config = to_container(with_num_classes(cfg, number))
    left_out = tuple(name for name in file.state if adapter.ignores(name))
    return Translated(weights, cfg, config, label_map, file, variant, (*words, *overrides), left_out)


def to_official(weights: Mapping[str, Tensor], cfg: DictConfig, label_map: LabelMap, source: Path) -> dict[str, Any]:
    """The content of an official file: {model, args}, with settings as a plain dict, so that anyone can open it.

    The class head gets the official columns, one per category id up to the largest. Columns of ids that no category
    has say "never". Of Co-DETR it is {meta, state_dict}, with one column for each category.

    Args:
        weights: our names.
        cfg: their config.
        label_map: what the columns stand for.
        source: where the weights come from, for messages.

    Raises:
        CheckpointError: a model that the official code cannot build, with what differs; or weights and config that
            do not belong together.
    """
    upstream_for(str(cfg.family_name))
    with torch.device("meta"):
        detector = build_detector(cfg, label_map.num_classes, pretrained=False)
    family = official_family(str(cfg.family_name), detector)
    upstream = upstream_for(family)
    config = to_container(with_num_classes(cfg, label_map.num_classes))
    kept, own = (
        {name: value for name, value in one.items() if not _NOISE.search(name)}
        for one in (weights, detector.state_dict())
    )
    wrong = [name for name in {**own, **kept} if _shape(kept, name) != _shape(own, name)]
    if wrong:
        raise CheckpointError(f"{source}: its weights do not fit its own config and labels: {listed(wrong)}")
    try:
        labels = official_label_map(label_map, upstream)
        moved = _moved(kept, label_map, labels, say_object(config))
        with torch.device("meta"):
            target = build_detector(cfg, labels.num_classes, pretrained=False)
        state = upstream.adapter(target).to_official(moved, computed=True)
        args = upstream.settings(config, detector)
        if detector.query_source.num_one_to_many and "num_queries_one2many" not in args:
            raise CheckpointError("its code knows no queries for training alone (one_to_many=hybrid)")
    except CheckpointError as error:
        raise CheckpointError(f"{source} cannot become a file of {upstream.repository}: {error}") from None
    _check_same_function(OfficialFile(source, family, state, args, ()), config, upstream.repository)
    if upstream.places is not None:
        return mmcv.content(state, {**args, "CLASSES": list(labels.names)}, upstream.places)
    args["num_classes"] = state[upstream.class_head].shape[0] - upstream.no_object
    if upstream.label_book:
        args["dn_labelbook_size"] = state[upstream.label_book].shape[0] - 1
    return {"model": state, "args": args}


def official_label_map(label_map: LabelMap, upstream: Upstream) -> LabelMap:
    """The columns of the official head for the same categories: column i is category id i, or the i-th category."""
    ids = label_map.category_ids
    pairs = zip(ids, label_map.names, strict=True)
    categories = [{"id": one, "name": name} for one, name in pairs if one is not None]
    if upstream.of_mmcv:
        return label_map if len(categories) == len(ids) else LabelMap.contiguous(categories)
    if all(one in (None, column) for column, one in enumerate(ids)):
        return label_map
    return LabelMap.by_category_id(categories)


def label_map_for(categories: Sequence[Mapping[str, Any]], number: int, source: str, by_id: bool = True) -> LabelMap:
    """What the columns of an official head stand for, given the categories of its training annotations.

    Args:
        categories: of the annotations.
        number: of columns.
        source: for messages.
        by_id: heads have a column per category id; those of exactly as many columns as categories, too few for the
            ids, count the categories in the order of their ids. Otherwise all do.

    Raises:
        DataError: the number of columns is that of other categories.
    """
    in_order = LabelMap.contiguous(categories)
    largest = max(one for one in in_order.category_ids if one is not None)
    if by_id and largest < number:
        found = LabelMap.by_category_id(categories)
        rest = (None,) * (number - found.num_classes)
        return LabelMap((*found.category_ids, *rest), (*found.names, *rest))
    if in_order.num_classes == number:
        return in_order
    raise DataError(
        f"{source} has {in_order.num_classes} categories with ids up to {largest}, and the class head has {number} "
        "columns: it was trained on other categories"
    )


def _known_labels(file: OfficialFile) -> LabelMap | None:
    """What the columns stand for, as far as the file says it, or their number does; None where neither is known."""
    coco = coco_label_map()
    if not UPSTREAMS[file.family].of_mmcv:
        return coco if file.columns == COLUMNS else None
    in_order = LabelMap.contiguous([{"id": one, "name": coco.name(one)} for one in coco.by_label()])
    names = file.args.get("CLASSES", in_order.names)
    if len(names) != file.columns or len(set(names)) != len(names) or not all(names):
        return None
    # Names of other categories come without their ids.
    return in_order if tuple(names) == in_order.names else LabelMap(tuple(range(1, len(names) + 1)), tuple(names))


def _overrides(variant: Variant, given: Sequence[str], labels: str) -> list[str]:
    """What to compose the model from: the recipe or the choices, and the settings that these do not have anyway."""
    keys = {one.partition("=")[0].lstrip("+~") for one in given}
    if keys & set(_CHOOSES_MODEL):
        chosen: list[str] = []
    elif variant.experiment:
        chosen = [f"experiment={variant.experiment}"]
    else:
        chosen = [*variant.choices, "data=coco"]
    chosen = [one for one in chosen if one.partition("=")[0].lstrip("+") not in keys]
    data = [] if "data.root" in keys else [_ROOT_LATER]
    groups = [one for one in given if one.partition("=")[0] in (*_CHOOSES_MODEL, *_CHOOSES_PARTS)]
    base = compose("train", [*chosen, *groups, *data])
    if base.data.get("labels", labels) != labels and "data.labels" not in keys and "data" not in keys:
        data.append(f"data.labels={labels}")
    return [*chosen, *_needed(base, variant, keys), *data]


def model_overrides(variant: Variant) -> tuple[str, ...]:
    """What ``detfamily train`` needs to make a model of this kind, whatever the data."""
    return (*variant.choices, *_needed(compose("train", variant.choices), variant))


def _needed(base: DictConfig, variant: Variant, given: set[str] | frozenset[str] = frozenset()) -> list[str]:
    """The settings of a variant that a composed config does not have anyway, as overrides."""
    return [
        as_override(key, value)
        for key, value in variant.fields.items()
        if key not in given and OmegaConf.select(base, key) != value and _present(base, key)
    ]


def _present(cfg: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent)
    return node is not None and name in node


def _heads(overrides: Sequence[str]) -> int | None:
    """The number of heads, if an override says it: other numbers are told from tensors with its help."""
    said = [one.partition("=")[2] for one in overrides if one.startswith("model.num_heads=")]
    return int(said[-1]) if said and said[-1].isdigit() and int(said[-1]) else None


def _without_spare_rows(file: OfficialFile, number: int) -> OfficialFile:
    """Embedded labels of just the classes, and the last row: of larger books nobody reads what is between.

    Books without a row beside those of the classes do as well: the last row is nobody's officially.
    """
    name = UPSTREAMS[file.family].label_book
    if name is None or name not in file.state or file.state[name].shape[0] < number:
        return file
    book = file.state[name]
    return replace(file, state={**file.state, name: torch.cat([book[:number], book[-1:]])})


def _checked(file: OfficialFile, adapter: Adapter, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names, if they are exactly those of the model."""
    known = {name: value for name, value in file.state.items() if set(adapter.our_names(name)) & set(own)}
    unknown = [name for name in file.state if name not in known and not adapter.ignores(name)]
    ours = adapter.to_ours(known)
    missing = [adapter.official_name(name) for name in own if name not in ours and not _NOISE.search(name)]
    wrong = [
        f"{adapter.official_name(name)} {list(value.shape)}, expected {list(own[name].shape)}"
        for name, value in ours.items()
        if value.shape != own[name].shape
    ]
    lists = (("missing", list(dict.fromkeys(missing))), ("unknown", unknown), ("of another shape", wrong))
    troubles = [f"{words}: {listed(names)}" for words, names in lists if names]
    if troubles:
        raise CheckpointError(
            f"{file.path} does not fit the model of {UPSTREAMS[file.family].repository} that it seems to be: "
            + "; ".join(troubles)
        )
    broken = [adapter.official_name(name) for name, value in ours.items() if not _is_finite(value)]
    if broken:
        raise CheckpointError(f"{file.path} holds NaN or infinity, in {listed(broken)}: its training went wrong")
    return {name: ours[name].to(own[name].dtype) for name in own if name in ours}


def _check_same_function(file: OfficialFile, config: Mapping[str, Any], repository: str) -> None:
    """Read the file that is about to be written, and see whether it would become the model that it comes from."""
    try:
        there = computation(translate(file).config)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(
            f"{file.path} cannot become a file of {repository}, whose code has no such model: {error}"
        ) from None
    here = computation(config)
    if found := unequal(here, there, "{key} is {0} here and {1} there"):
        raise CheckpointError(
            f"{file.path} cannot become a file of {repository}, whose code computes something else: {listed(found, 6)}"
        )


_ONLY_TRAINING = re.compile(
    r"(^|\.)(num_classes|num_queries|num_one_to_many|dropout|prior|zero_init|size_logit|weights|pretrained|frozen_stages)$|"
    r"^backbone\.(norm\.|(drop_path|gradient_checkpointing)$)|^(auxiliary|collaboration)(\.|$)|"
    r"\.reference\.(random|freeze)_centers$|^query_source\.answer_all$|^heads\.shared_boxes$|"
    r"^denoising\.(num_groups|num_queries|max_queries|(label|center|size|corner)_noise|eps|attention_mask|embed_labels|"
    r"contrastive|own_group)$"
)
"""Settings of a detector that what it computes from loaded weights does not depend on, or that tensors tell."""


def computation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resolved config that decide what its model computes, apart from its tensors: name -> value."""
    found = {key: value for key, value in _flat(config["detector"]) if not _ONLY_TRAINING.search(key)}
    if found.get("position.temperature_x", 0) is None:
        found["position.temperature_x"] = found["position.temperature"]
    return found


def unequal(one: Mapping[str, Any], other: Mapping[str, Any], words: str) -> list[str]:
    """A sentence for each setting that two models do not share, from a template with {key}, {0} and {1}."""
    pairs = {key: (one.get(key, "absent"), other.get(key, "absent")) for key in sorted({*one, *other})}
    return [words.format(*values, key=key) for key, values in pairs.items() if values[0] != values[1]]


def _flat(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        return [one for key, value in node.items() for one in _flat(value, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, node)]


def _moved(
    weights: Mapping[str, Tensor], label_map: LabelMap, official: LabelMap, say_object: bool
) -> dict[str, Tensor]:
    """Rows of class heads and embedded labels, where the official columns have them."""
    if official is label_map:
        return dict(weights)
    moved = {}
    for name, value in weights.items():
        if is_class_row(name):
            rows = by_class(name, value, label_map.num_classes)
            count = rows.shape[0] - label_map.num_classes + official.num_classes
            # "Never": a logit so low that no other probability feels it, also in 16 bits.
            blank = torch.full((count, *rows.shape[1:]), -100.0 if value.ndim == 1 else 0.0, dtype=value.dtype)
            rows = move_rows(rows, label_map, blank, official, say_object and is_first_row_special(name))
            value = from_class(name, rows, value)
        moved[name] = value
    return moved


def _shape(state: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return state[name].shape if name in state else None


def _settings(args: Any) -> dict[str, Any]:
    """The official settings that are plain values."""
    found = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(found, Mapping):
        return {}
    plain = (bool, int, float, str, type(None))
    lists = {key: list(value) for key, value in found.items() if isinstance(value, (list, tuple))}
    return {
        key: value
        for key, value in {**found, **lists}.items()
        if isinstance(key, str) and all(type(one) in plain for one in (value if key in lists else [value]))
    }


def _is_weight(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex() or value.is_nested)
    )


def _is_finite(value: Tensor) -> bool:
    """Whether all stored numbers are finite; a tensor may repeat them to a size that memory could not hold."""
    if not value.is_floating_point():
        return True
    axes = [slice(None) if stride else slice(1) for stride in value.stride()]
    return bool(value[tuple(axes)].isfinite().all())


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with {listed([repr(key) for key in value], 4) or 'nothing in it'}"
    return f"a {type(value).__name__}"
