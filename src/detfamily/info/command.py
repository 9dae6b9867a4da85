"""``detfamily info``: what a config describes, how large it is and what it costs, and what was published of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from detfamily.build import with_num_classes
from detfamily.config import compose, groups, to_container
from detfamily.engine.run import listing
from detfamily.errors import ConfigError, require_at_least
from detfamily.info.classes import columns_of
from detfamily.info.cost import Cost, MultiplyAdds, Parameters, shapes_only
from detfamily.info.published import EVERY_KIND, REASONS, Convention, compare, convention_of
from detfamily.info.table import table
from detfamily.structures import Size

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def info(cfg: DictConfig) -> None:
    """Print what a config describes. No data is read and nothing is downloaded.

    Args:
        cfg: composed from ``train.yaml``; ``info`` has the settings.

    Raises:
        ConfigError: a setting of ``info`` that makes no sense, or blocks that contradict each other.
        DataError: ``info.size`` is too small for the model.
    """
    size = _size(cfg)
    if cfg.info.table:
        _refuse_others(cfg)
        print(table(size))
        return
    columns, why = columns_of(cfg)
    cost = Cost(shapes_only(cfg, columns))
    work = cost.work(size)
    described = to_container(with_num_classes(cfg, columns).detector)
    _print(f"{cfg.name}, of the family {cfg.family_name}", _blocks(described))
    print(f"its class head has {columns} columns: {why}\n")
    _print("parameters, in millions", _parameter_rows(cost.parameters))
    _print(f"GFLOPs for an image of {size[0]} x {size[1]}, a multiply-add as one, as papers count", _work_rows(work))
    _print("published", list(_published_rows(cfg, cost)))


def _size(cfg: DictConfig) -> Size:
    given = cfg.info.size
    if len(given) != 2 or not all(isinstance(one, int) and not isinstance(one, bool) for one in given):
        raise ConfigError(f"info.size is {list(given)}; expected [height, width] in pixels")
    for one in given:
        require_at_least(32, "info.size", one, "pixels for a cell of C5")
    return int(given[0]), int(given[1])


def _refuse_others(cfg: DictConfig) -> None:
    """The table is that of the recipes as they are; settings that it would pass over are refused."""
    alone = compose("train", ["data.root=."])
    given, plain = to_container(cfg), to_container(alone)
    given["info"] = {**plain["info"], "size": given["info"]["size"]}
    if given != plain or cfg.info.num_classes is not None:
        raise ConfigError("info.table=true lists all recipes as they are: leave out everything but info.size")


# -- what there is ----------------------------------------------------------------------------------------------------


def _blocks(node: Mapping[str, Any], depth: int = 0) -> list[tuple[str, str]]:
    """The tree of blocks: the name of each, its class, and what it was given."""
    rows = []
    for name, value in _children(node):
        if isinstance(value, Mapping) and "_target_" in value:
            given = [f"{key}={_plain(one)}" for key, one in value.items() if _says(key, one)]
            rows.append(("  " * depth + name, " ".join([str(value["_target_"]).rpartition(".")[2], *given])))
            rows += _blocks(value, depth + 1)
    return rows


def _children(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a node is given; the nodes of a list one by one."""
    for name, value in node.items():
        if _lists_nodes(value):
            yield from ((f"{name}.{index}", one) for index, one in enumerate(value))
        else:
            yield name, value


def _lists_nodes(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, Mapping) for one in value)


def _says(key: str, value: Any) -> bool:
    return not (key.startswith("_") or value is None or isinstance(value, Mapping) or _lists_nodes(value))


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _parameter_rows(found: Parameters) -> list[tuple[str, str]]:
    rows = [("all", _millions(found.total, found.trained))]
    return rows + [(part, _millions(number, found.trained_parts.get(part, 0))) for part, number in found.parts.items()]


def _millions(number: int, trained: int) -> str:
    return f"{number / 1e6:7.3f}" + (f", {trained / 1e6:.3f} of them trained" if trained != number else "")


def _work_rows(found: MultiplyAdds) -> list[tuple[str, str]]:
    parts = [(part, f"{number / 1e9:7.2f}") for part, number in found.parts.items()]
    kinds = [(f"in {kind}", f"{number / 1e9:7.2f}") for kind, number in found.kinds.items()]
    return [("all", f"{found.total / 1e9:7.2f}"), *parts, *kinds]


# -- what was published -----------------------------------------------------------------------------------------------


def _published_rows(cfg: DictConfig, cost: Cost) -> Iterator[tuple[str, str]]:
    if not cfg.published:
        yield "nothing", "for this config; experiment=NAME chooses a recipe that was: " + _some_recipes()
        return
    changed = _changed(cfg)
    convention = convention_of(cfg.family_name)
    for entry in cfg.published:
        yield entry.split, "  ".join(f"{key} {entry[key]}" for key in FIGURES if key in entry)
        yield "  source", entry.source + (f" ({entry.note})" if "note" in entry else "")
        if changed:
            costs = {"M parameters": entry.get("params_m"), "GFLOPs": entry.get("gflops")}
            if any(costs.values()):
                yield "  costs", ", ".join(f"{number} {name}" for name, number in costs.items() if number is not None)
            continue
        found = compare(cfg.name, entry, cost, convention)
        if "params_m" in entry:
            ours = _counts(cost.parameters, found.parameters_reason)
            yield "  parameters", f"{entry.params_m} M; here {ours}{_because(found.parameters_reason)}"
        if found.counted_so is not None:
            ours = f"{found.counted_so / 1e9:.1f}{_counted(convention)}"
            yield "  GFLOPs", f"{entry.gflops}; here {ours}{_because(found.gflops_reason)}"
    if changed:
        yield "not of this", "the published figures are those of the recipe as it is; here its model was changed"


def _counts(ours: Parameters, reason: str | None) -> str:
    others = {"frozen": f", {ours.total / 1e6:.2f} in all", "stored": f", {ours.stored / 1e6:.2f} stored"}
    return f"{ours.trained / 1e6:.2f} trained{others.get(reason or '', '')}"


def _because(reason: str | None) -> str:
    return f" ({REASONS[reason]})" if reason else ""


def _counted(convention: Convention) -> str:
    height, width = convention.size
    kinds = "" if convention.kinds == EVERY_KIND else f", {' and '.join(convention.kinds)} only"
    return f" at {height} x {width}{kinds}"


def _changed(cfg: DictConfig) -> bool:
    """Whether overrides have made another model of a recipe's."""
    if cfg.name not in groups()["experiment"]:
        return True
    recipe = compose("train", ["data.root=.", f"experiment={cfg.name}"])
    return bool(to_container(recipe.detector) != to_container(cfg.detector))


def _some_recipes() -> str:
    names = [name for name in groups()["experiment"] if "_r50" in name]
    return ", ".join(names[:4]) + ", ..."


def _print(title: str, rows: list[tuple[str, str]]) -> None:
    print(title, listing(rows), "", sep="\n")
