"""The documentation: its commands make detectors; its settings, choices, files, links and imports exist."""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from detfamily import cli
from detfamily.build import build_detector
from detfamily.config import compose, configs_dir, groups, groups_for, groups_of, to_container, validate
from detfamily.config.containers import dotted, walk
from detfamily.config.registry import read_yaml
from detfamily.engine.evaluate import on_top_of, split_overrides
from detfamily.experiments.ablate import read_request
from detfamily.experiments.rehearse import plan
from detfamily.experiments.rehearse import read_request as read_rehearsal
from detfamily.experiments.scale import variants
from detfamily.matrix.request import check_names
from detfamily.matrix.request import read_request as read_matrix
from detfamily.predict import command as predict
from detfamily.predict.command import own_fields
from detfamily.sweeps.drawn import grid
from detfamily.sweeps.request import Recipe
from detfamily.sweeps.request import read_request as read_sweep
from detfamily.visualize import command as visualize

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
NO_FIELDS = {"py", "md", "pt", "yaml", "json", "jsonl", "png", "jpg"}
"""What stands behind the dot in a file's name."""
BUILT: set[str] = set()
"""The detectors that were built already: most commands mean the same one."""


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def spans(page: Path) -> list[str]:
    return SPAN.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def lines(page: Path) -> list[list[str]]:
    """The words of each line of the shell blocks, without comments."""
    shell = "\n".join(blocks(page, "bash", "sh")).replace("\\\n", " ")
    return [words for line in shell.splitlines() if (words := shlex.split(line, comments=True))]


def arguments(words: list[str]) -> list[str] | None:
    """What follows ``detfamily`` in a line, if it is one of ours. Overrides alone are those of ``train``."""
    if "=" in words[0]:
        return ["train", *words]
    return words[words.index("detfamily") + 1 :] if "detfamily" in words else None


def commands() -> dict[str, list[str]]:
    """All commands, by what is typed: those of the pages, and the examples of ``--help``."""
    found = [given for page in PAGES for words in lines(page) if (given := arguments(words))]
    found += [[one.name, *shlex.split(example)] for one in cli.COMMANDS.values() for example in one.examples]
    return {shlex.join(given): given for given in found}


def test_there_are_commands():
    assert {given[0] for given in commands().values()} >= {"train", "evaluate"} and len(commands()) > 20


@pytest.mark.parametrize("given", commands().values(), ids=commands())
def test_a_command_makes_a_detector(given):
    options = {word for word in given if word.startswith("-")}
    assert options <= set(cli.OPTIONS)
    name, *overrides = [word for word in given if word not in options] or ["train"]
    assert name in cli.COMMANDS
    config = cli.COMMANDS[name].config
    if cli.COMMANDS[name].composed and config not in (None, "train"):  # It has settings of its own, and no detector.
        return validate(compose(config, overrides))
    overrides = [*cli.COMMANDS[name].assumed, *overrides]
    if "..." in overrides:  # Stands for what else a reader's own run needs.
        overrides = ["data.root=.", *(word for word in overrides if word != "...")]
    if name in ("ablate", "report"):
        check_table(name, overrides)
        return
    if name == "sweep":
        asked = read_sweep([str(ROOT / word) if word.startswith("experiments/") else word for word in overrides])
        Recipe(asked.sweep, asked.further)
        assert asked.method != "grid" or grid(asked.sweep)
        return
    if name == "rehearse":
        words = [str(ROOT / word) if word.startswith("experiments") else word for word in overrides]
        tables, scale, rows, _, further = read_rehearsal(words)
        plan(tables[:1], scale, rows, further)  # that all rows of all tables compose is tested elsewhere
        return
    if name == "matrix":
        check_names(read_matrix(overrides))
        return
    on_checkpoint = False
    if name == "evaluate":
        own, overrides = split_overrides(overrides, ("checkpoint", "results", "output_dir"))
        assert (own["checkpoint"] is None) != (own["results"] is None)
        on_checkpoint = own["checkpoint"] is not None
    if name in ("predict", "visualize"):
        fields = {"predict": predict.DEFAULTS, "visualize": visualize.DEFAULTS}
        own, overrides = own_fields(overrides, fields[name])
        on_checkpoint = own["checkpoint"] is not None and own["source"] is not None
        assert on_checkpoint
    if name == "convert":  # Two files, and overrides of the config that an official file gets.
        assert len(overrides) >= 2 and not any("=" in word for word in overrides[:2])
        _, overrides = split_overrides(overrides[2:], ("categories", "ema"))
    check(on_checkpoint, tuple(overrides))


def check_table(name: str, words: list[str]) -> None:
    """The table exists, and so do the rows, the scale and the settings."""
    words = [str(ROOT / word) if word.startswith("experiments/") else word for word in words]
    if name == "ablate":
        request = read_request(words)
        variants(request.table, request.scale, request.further)
    else:
        places = [word for word in words if "=" not in word]
        if places in ([], ["experiments"]):  # All tables.
            assert not words[1:]
            return
        assert len(places) == 1 and (Path(places[0]).is_file() or places[0].startswith("runs/ablate/"))
        assert {word.partition("=")[0] for word in words if "=" in word} <= {"scale", "output_dir"}


@functools.cache
def check(on_checkpoint: bool, overrides: tuple[str, ...]) -> None:
    """Compose as ``train`` does, or on top of a config such as a checkpoint holds."""
    cfg = compose("train", () if on_checkpoint else overrides)
    if on_checkpoint and overrides:
        cfg = on_top_of(OmegaConf.to_container(cfg), overrides)
    validate(cfg)
    blocks = json.dumps([to_container(cfg)[name] for name in ("detector", "criterion", "postprocess")])
    if blocks not in BUILT:
        with torch.device("meta"):  # No memory and no time for numbers: only whether the blocks go together.
            build_detector(cfg, num_classes=3, pretrained=False)
        BUILT.add(blocks)


@functools.cache
def written_fields() -> set[str]:
    """Every field of ``train.yaml`` and of any choice of any group, as it would be typed."""
    fields = set()
    for file in configs_dir().rglob("*.yaml"):
        group = file.parent.relative_to(configs_dir()).as_posix().replace("/", ".").strip(".")
        group = group.removeprefix("classify.")
        at_top = not group or file.read_text(encoding="utf-8").startswith("# @package _global_")
        fields |= {".".join(filter(None, ("" if at_top else group, dotted(key)))) for key, _ in walk(read_yaml(file))}
    return fields


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_and_choices_exist(page):
    known, wrong = groups(), []
    for name, choices in groups_for("classify").items():
        known[name] = [*known.get(name, []), *choices]
    for span in spans(page):
        for word, field, choice in re.findall(r"((?<![\w./])~?\+?([a-z_]+(?:\.\w+)*)(?:=([\w-]+))?)", span):
            top, _, rest = field.partition(".")
            if field in known and choice:
                wrong += [word] if choice not in (*known[field], "my_attention") else []
            elif rest and top in (*groups_of("train"), "model", "checkpoint") and rest not in NO_FIELDS:
                literal = field.partition(".NAME")[0]  # Names in capitals are the reader's.
                wrong += [word] if literal not in written_fields() else []
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    names = [word for span in (*spans(page), *map(" ".join, lines(page))) for word in span.split()]
    files = [word for word in names if re.match(r"(src|configs|docs|scripts|tests|experiments)/", word)]
    places = [page.parent / link for link in links if link]
    places += [ROOT / file.rstrip(",;:") for file in files if not re.search(r"[<*]|my_|/local/", file)]
    assert not [str(place) for place in places if not place.exists()]


def test_make_has_what_is_named():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    words = [words for page in PAGES for words in (*lines(page), *map(str.split, spans(page))) if words[0] == "make"]
    assert words and {word for line in words for word in line[1:] if "=" not in word} <= targets


def test_the_map_of_the_repository_is_right():
    (drawn,) = [text for text in blocks(ROOT / "README.md", "text") if "src/detfamily/" in text]
    folder, places = ROOT, set()
    for line in drawn.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        folder = folder if line.startswith(" ") else ROOT
        places |= {folder / name for name in names}
        folder = folder if line.startswith(" ") else ROOT / names[0]
    assert not [str(place) for place in places if not place.exists()]
    package = ROOT / "src/detfamily"
    assert {one for one in package.iterdir() if one.is_dir() and one.name != "__pycache__"} <= places


@pytest.mark.parametrize("code", [text for page in PAGES for text in blocks(page, "python")])
def test_code_imports_what_exists(code):
    compile(code, "docs", "exec")
    for line in code.splitlines():
        if re.match(r"(from|import) ", line):
            exec(line, {})
