"""Composition, checks and building, on a small tree of configs and a small package of blocks that the test writes."""

import random
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torch import nn

import detfamily
from detfamily.config import build, compose, configs_dir, groups, groups_of, to_container, validate
from detfamily.errors import ConfigError, DataError

BLOCKS = """
from __future__ import annotations

import os
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
"""

TREE = {
    "train.yaml": """
        defaults:
          - _self_
          - encoder: deep
          - attention: dense
          - recipe: adamw
          - data: folder
          - auxiliary: []
          - family: base
          - experiment: null
        seed: 42
        name: run
        resume: null
        scale: 1.0
        flag: true
        sizes: [480, 512]
        published: []
        model: {width: 64, heads: 8}
        """,
    "evaluate.yaml": "defaults:\n  - data: folder\n  - _self_\ncheckpoint: null\n",
    "encoder/deep.yaml": """
        _target_: detfamily.example_blocks.Encoder
        depth: 3
        layer: ${attention}
        norm: {_target_: torch.nn.LayerNorm, normalized_shape: "${model.width}"}
        """,
    "attention/dense.yaml": """
        _target_: detfamily.example_blocks.Attention
        _partial_: true
        width: ${model.width}
        heads: ${model.heads}
        """,
    "attention/narrow.yaml": "defaults:\n  - dense\n  - _self_\nheads: 2\n",
    "recipe/adamw.yaml": """
        _target_: detfamily.example_blocks.Recipe
        lr: 1.0e-4
        epochs: 50
        drops: [40]
        betas: [0.9, 0.999]
        width: auto
        precision: fp32
        decay: null
        weights: {giou: 2.0, l1: 5.0}
        nesterov: false
        note: plain
        """,
    "recipe/50.yaml": "defaults:\n  - adamw\n  - _self_\nepochs: 50\nnote: fifty\n",
    "data/folder.yaml": "_target_: detfamily.example_blocks.Folder\nroot: ???\n",
    "data/here.yaml": "_target_: detfamily.example_blocks.Folder\nroot: .\n",
    "auxiliary/atss.yaml": "# @package auxiliary.atss\n_target_: torch.nn.Identity\n",
    "auxiliary/rcnn.yaml": "# @package auxiliary.rcnn\n_target_: torch.nn.Identity\n",
    "family/base.yaml": "# @package _global_\nmodel: {heads: 4}\n",
    "family/narrow.yaml": "# @package _global_\ndefaults:\n  - override /attention: narrow\nmodel: {width: 32}\n",
    "experiment/long.yaml": """
        # @package _global_
        defaults:
          - override /family: narrow
          - override /data: here
        published: [{AP: 43.8, source: table 1}]
        recipe: {epochs: 150}
        model: {heads: 16}
        """,
}


def write_tree(folder: Path, tree: dict[str, str]) -> Path:
    for name, text in tree.items():
        lines = text.strip("\n").splitlines() or [""]
        indent = len(lines[0]) - len(lines[0].lstrip())
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(line[indent:] for line in lines).rstrip() + "\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def blocks(tmp_path_factory):
    """Make ``detfamily.example_blocks`` importable: configs may only name modules of the package."""
    folder = tmp_path_factory.mktemp("blocks")
    (folder / "example_blocks.py").write_text(BLOCKS)
    detfamily.__path__.append(str(folder))
    yield
    detfamily.__path__.remove(str(folder))
    del sys.modules["detfamily.example_blocks"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("configs"), TREE)


def composed(tree: Path, *overrides: str, data: bool = True):
    return compose("train", ["data=here", *overrides] if data else overrides, tree)


def refusal(tree: Path, *overrides: str, data: bool = True) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(composed(tree, *overrides, data=data))
    return str(caught.value)


# Composition


def test_precedence_is_command_line_then_experiment_then_family(tree):
    plain = composed(tree)
    assert (plain.model.heads, plain.model.width, plain.recipe.epochs) == (4, 64, 50)
    family = composed(tree, "family=narrow")
    assert (family.model.width, family.attention.heads) == (32, 2)
    experiment = composed(tree, "experiment=long", data=False)
    assert (experiment.model.width, experiment.model.heads, experiment.recipe.epochs) == (32, 16, 150)
    assert experiment.published == [{"AP": 43.8, "source": "table 1"}]
    typed = composed(tree, "experiment=long", "recipe.epochs=3", "attention=dense", data=False)
    assert (typed.recipe.epochs, typed.attention.heads) == (3, 16)


def test_fields_are_set_added_and_removed(tree):
    cfg = composed(
        tree,
        "recipe.drops=[1,2]",
        "recipe.weights={giou: 1}",
        "+recipe.weights.class=3",
        "+recipe.amsgrad=true",
        "~recipe.note",
        "recipe.decay=1e-4",
        "encoder.norm.normalized_shape=${model.heads}",
    )
    validate(cfg)
    recipe = to_container(cfg)["recipe"]
    assert recipe["drops"] == [1, 2] and recipe["decay"] == 1e-4 and recipe["amsgrad"] is True
    assert recipe["weights"] == {"giou": 1, "l1": 5.0, "class": 3} and "note" not in recipe
    assert to_container(cfg)["encoder"]["norm"]["normalized_shape"] == 4


def test_interpolations_follow_a_value_that_is_set_later(tree):
    cfg = composed(tree, "model.width=16")
    assert cfg.encoder.layer.width == 16
    cfg.model.width = 8
    assert cfg.encoder.layer.width == 8


def test_several_choices_of_one_group_have_a_place_each(tree):
    assert set(composed(tree, "auxiliary=[rcnn,atss]").auxiliary) == {"rcnn", "atss"}


def test_a_choice_may_be_called_like_a_number(tree):
    assert composed(tree, "recipe=50").recipe.note == "fifty"


def test_text_stays_as_it_was_typed(tree):
    assert composed(tree, "name=2017").name == "2017"
    assert composed(tree, "name=1e3").name == "1e3"
    assert composed(tree, "recipe.note=1e3").recipe.note == "1e3"
    assert composed(tree, "data=folder", "data.root=2017").data.root == "2017"
    assert composed(tree, "recipe.width=7").recipe.width == 7


def test_groups_and_choices_are_read_from_the_folder(tree):
    assert groups(tree)["attention"] == ["dense", "narrow"]
    assert list(groups_of("evaluate", tree)) == ["data"]
    assert list(groups_of("train", tree))[:3] == ["encoder", "attention", "recipe"]


def test_the_package_has_its_configs():
    assert (configs_dir() / "train.yaml").is_file()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("foo", ["'foo' is not an override", "key=value"]),
        ("narrow", ["did you mean attention=narrow or family=narrow?"]),
        ("=3", ["not an override"]),
        ("attenton=dense", ["no group or field 'attenton'", "'attention'"]),
        ("attention=dence", ["attention has no choice 'dence'", "'dense'"]),
        ("attention=null", ["attention has no choice 'null'", "dense, narrow"]),
        ("auxiliary=[rcnn,ats]", ["auxiliary has no choice 'ats'", "'atss'"]),
        ("attention=dense,narrow", ["cannot read", "attention=[a,b]"]),
        ("name=a=b", ["cannot read", "\"name='a=b'\""]),
        ("recipe.lrr=1", ["recipe has no field 'lrr'", "'lr'"]),
        ("lr=1", ["no group or field 'lr'", "lr exists as recipe.lr"]),
        ("recpie.lr=1", ["no group or field 'recpie'", "'recipe'"]),
        ("recipe.amsgrad=true", ["recipe has no field 'amsgrad'", "+recipe.amsgrad=..."]),
        ("recipe={lrr: 1}", ["recipe has no field 'lrr'", "'lr'"]),
        ("recipe.lr.x=1", ["recipe.lr is 0.0001, it has no fields"]),
        ("recipe.drops.3=1", ["recipe.drops is a list of 1"]),
        ("~model.hads", ["model has no field 'hads'", "'heads'"]),
        ("attention@encoder.layer=dense", ["attention@encoder.layer is not in the defaults list"]),
        ("nothing@encoder=dense", ["no group 'nothing'"]),
        ("hydra.run.dir=x", ["no group or field 'hydra'"]),
        ("+model.dropout=0.1", ["model.dropout is unknown", "heads, width"]),
        ("seed=abc", ["seed: 'abc' given, expected an integer (default 42)"]),
        ("seed=1.5", ["seed: 1.5 given, expected an integer"]),
        ("seed=true", ["seed: true given, expected an integer"]),
        ("seed=null", ["seed: null given"]),
        ("scale=big", ["scale: 'big' given, expected a number"]),
        ("flag=1", ["flag: 1 given, expected true or false"]),
        ("sizes=480", ["sizes: 480 given, expected a list"]),
        ("name=[a]", ["name: ['a'] given, expected text"]),
        ("model=3", ["model: 3 given, expected a mapping"]),
        ("encoder.depth=${model.dpeth}", ["encoder.depth", "model.dpeth"]),
    ],
)
def test_a_wrong_override_is_refused_by_name(tree, override, parts):
    message = refusal(tree, override)
    assert all(part in message for part in parts), message


def test_a_missing_value_says_what_to_pass(tree):
    assert refusal(tree, data=False) == "data.root is missing: pass data.root=..."


def test_an_unknown_primary_config_names_the_others(tree):
    with pytest.raises(ConfigError, match="no config 'trian': did you mean 'train'"):
        compose("trian", [], tree)


@pytest.mark.parametrize(
    ("file", "text", "parts"),
    [
        ("family/bad.yaml", "model: {hads: 3}", ["in family/bad.yaml", "model.hads is unknown", "'heads'"]),
        ("family/bad.yaml", "model: {heads: many}", ["in family/bad.yaml", "model.heads: 'many' given"]),
        ("family/bad.yaml", "sede: 3", ["in family/bad.yaml", "sede is unknown", "'seed'"]),
        ("family/bad.yaml", "recipe: {lrr: 3}", ["recipe.lrr is not an argument of", "'lr'"]),
        ("family/bad.yaml", "defaults: [{override /atention: dense}]", ["no group 'atention'", "'attention'"]),
        ("family/bad.yaml", "defaults: [{override /attention: dence}]", ["no choice 'dence'", "'dense'"]),
        ("family/bad.yaml", "model: {heads: 3", ["cannot be composed", "bad.yaml"]),
        ("family/bad.yaml", "[1, 2]", ["bad"]),
        ("family/bad.yaml", "defaults: 3", ["bad"]),
    ],
)
def test_a_mistake_in_a_preset_is_refused_by_name(tmp_path, file, text, parts):
    tree = write_tree(tmp_path, {**TREE, file: "# @package _global_\n" + text})
    message = refusal(tree, "family=bad")
    assert all(part in message for part in parts), message


def test_a_group_that_must_be_chosen_lists_its_choices(tmp_path):
    tree = write_tree(tmp_path, {"train.yaml": "defaults:\n  - data: ???\n", "data/a.yaml": "x: 1", "data/b.yaml": ""})
    with pytest.raises(ConfigError, match=r"data is missing: pass data=\.\.\., one of a, b"):
        compose("train", [], tree)


@pytest.mark.parametrize(
    "path",
    [
        "/data/my coco (2017)",
        "/data/a=b,c",
        "./it's here",
        "../[x]/{y}",
        "/ends/with\\",
        "C:\\data\\coco",
        "/ü/日本",
        "/a#b!c&d;e",
        "/a\\ b",
        '/say "hi"',
    ],
)
def test_paths_need_no_quotes(tree, path):
    assert composed(tree, "data=folder", f"data.root={path}").data.root == path


def test_an_existing_path_needs_no_quotes(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photo (1), a=b.jpg").touch()
    (tmp_path / "7").touch()
    assert composed(tree, "data.root=photo (1), a=b.jpg").data.root == "photo (1), a=b.jpg"
    assert composed(tree, "data.root=~/coco").data.root == f"{tmp_path}/coco"
    assert composed(tree, "seed=7").seed == 7


def test_any_path_survives_the_grammar(tree):
    chance = random.Random(0)
    for _ in range(40):
        path = "/" + "".join(chance.choices("ab '\"\\,=()[]{}:#~*?", k=chance.randint(1, 12)))
        assert compose("evaluate", [f"data.root={path}"], tree).data.root == path


# Validation


def test_a_good_config_passes_also_as_plain_containers(tree):
    cfg = composed(tree, "recipe.decay=1", "recipe.lr=1", "+recipe.mystery=anything", "recipe.drops=[]")
    validate(cfg)
    validate(to_container(cfg))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.lr=abc", "recipe.lr: 'abc' given, expected a number"),
        ("recipe.lr=true", "recipe.lr: true given, expected a number"),
        ("recipe.epochs=1.5", "recipe.epochs: 1.5 given, expected an integer"),
        ("recipe.epochs=null", "recipe.epochs: null given, expected an integer"),
        ("recipe.epochs=[1]", "recipe.epochs: [1] given, expected an integer"),
        ("recipe.nesterov=1", "recipe.nesterov: 1 given, expected true or false"),
        ("recipe.note=true", "recipe.note: true given, expected text"),
        ("recipe.decay=x", "recipe.decay: 'x' given, expected a number or null"),
        ("recipe.drops=4", "recipe.drops: 4 given, expected a list (an integer each)"),
        ("recipe.drops=[1,x]", "recipe.drops.1: 'x' given, expected an integer"),
        ("recipe.drops=abc", "recipe.drops: 'abc' given, expected a list (an integer each)"),
        ("recipe.betas=[0.9]", "recipe.betas: [0.9] given, expected a list of 2 values"),
        ("recipe.weights.giou=x", "recipe.weights.giou: 'x' given, expected a number"),
        ("recipe.weights=5", "recipe.weights: 5 given, expected a mapping or null"),
        (
            "recipe.precision=bf17",
            "recipe.precision: 'bf17' given, expected 'fp32' or 'bf16' or 'fp16': did you mean 'bf16'?",
        ),
        ("recipe.precision=16", "recipe.precision: 16 given, expected 'fp32' or 'bf16' or 'fp16'"),
        ("data.root=[2017]", "data.root: [2017] given, expected text or a path"),
        (
            "encoder.norm=3",
            "encoder.norm: 3 given, expected a block (a mapping with _target_, giving a Module) or null",
        ),
        ("encoder.layer=dense", "encoder.layer: 'dense' given, expected a block (a mapping with _target_)"),
        ("+recipe.foo=1", "recipe.foo is not an argument of detfamily.example_blocks.Recipe: valid names: amsgrad"),
        ("~recipe.epochs", "recipe.epochs is missing, detfamily.example_blocks.Recipe needs it"),
        ("+recipe._args_=[1]", "recipe._args_ is unknown"),
        ("attention._partial_=maybe", "attention._partial_: 'maybe' given, expected true or false"),
        ("recipe._target_=detfamily.example_blocks.Recipee", "detfamily.example_blocks has no 'Recipee': did you mean"),
        ("recipe._target_=detfamily.exampel_blocks.Recipe", "detfamily has no 'exampel_blocks': did you mean"),
        ("recipe._target_=detfamily.example_blocks.not_callable", "is not a class or a function"),
        ("recipe._target_=[3]", "[3] may not be used in a config, only detfamily.*"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(tree, override, message):
    assert message in refusal(tree, override)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "detfamily.config.os.system",
        "detfamily.config.importlib.import_module",
        "torch.nn.functional.torch.hub.load",
        "detfamily_other.run",
    ],
)
def test_configs_cannot_reach_arbitrary_code(tree, target):
    assert f"{target}" in refusal(tree, f"recipe._target_={target}")
    with pytest.raises(ConfigError, match="may not be used"):
        build({"block": [{"_target_": target}]})


def test_a_block_of_another_kind_is_refused(tree):
    message = refusal(tree, "~encoder.norm", "+encoder.norm={_target_: detfamily.example_blocks.Folder, root: x}")
    assert message.endswith("given, expected a block (a mapping with _target_, giving a Module) or null")


def test_a_value_that_a_run_derives_may_be_open_until_then(tmp_path):
    derived = "model: {num_classes: null}\nhead: {_target_: torch.nn.Linear, in_features: 8, out_features: 2}\n"
    open_yet = derived.replace("out_features: 2", "out_features: '${model.num_classes}'")
    tree = write_tree(tmp_path, {"a.yaml": open_yet, "b.yaml": open_yet.replace("num_classes", "num_classses")})
    cfg = compose("a", [], tree)
    validate(cfg)
    assert cfg.model.num_classes is None
    with pytest.raises(ConfigError, match="num_classses: null given, expected an integer"):
        validate(compose("b", [], tree))


def test_a_value_is_reported_where_it_stands(tree):
    message = refusal(tree, "attention.width=${data.root}")
    assert message == "data.root: '.' given, expected an integer (used as encoder.layer.width)"
    message = refusal(tree, "+attention.hads=3")
    assert message.startswith("attention.hads is not an argument of detfamily.example_blocks.Attention: did you mean")


def test_everything_wrong_is_said_at_once(tree):
    message = refusal(tree, "recipe.lr=abc", "+recipe.foo=1", "encoder.depth=x")
    assert len(message.splitlines()) == 3


# Building


def test_build_makes_inner_nodes_first_and_factories_as_asked(tree):
    encoder = build(composed(tree, "encoder.depth=2").encoder)
    assert [layer.heads for layer in encoder.layers] == [4, 4]
    assert encoder.layers[0] is not encoder.layers[1]
    assert isinstance(encoder.norm, nn.LayerNorm)


def test_extra_arguments_are_passed_by_identity(tree):
    cfg = composed(tree)
    norm = nn.LayerNorm(3)
    assert build(cfg.encoder, norm=norm).norm is norm
    factory = build(cfg.attention, heads=1)
    assert factory().heads == 1 and factory(heads=2).heads == 2


def test_build_takes_containers_and_null():
    identity = {"_target_": "torch.nn.Identity"}
    assert build(None) is None
    pair = build([identity, identity])
    assert type(pair) is list and all(isinstance(one, nn.Identity) for one in pair)
    assert isinstance(build({"a": identity, "b": 3})["a"], nn.Identity)
    made = build(
        OmegaConf.create({"_target_": "detfamily.example_blocks.Composed", "parts": [identity], "names": {"x": [1, 2]}})
    )
    assert type(made.parts) is list and type(made.names) is dict and type(made.names["x"]) is list


def test_a_constructor_speaks_for_itself_and_the_key_is_named(tree):
    cfg = composed(tree, "model.heads=7")
    with pytest.raises(ConfigError, match="^encoder: Encoder: width 64 is not a multiple of heads 7$") as caught:
        build(cfg.encoder)
    assert isinstance(caught.value.__cause__, ValueError)
    cfg.attention._partial_ = False
    with pytest.raises(ConfigError, match="^encoder.layer: Attention: width 64 is not a multiple of heads 7$"):
        build(cfg)
    with pytest.raises(ConfigError, match="^recipe: Recipe: .*unexpected keyword argument 'foo'"):
        build(cfg.recipe, foo=1)


@pytest.mark.parametrize("extra", [False, True])
def test_errors_of_users_are_explained_and_faults_of_ours_are_not(extra):
    def run(kind):
        node = {"_target_": "detfamily.example_blocks.raises"}
        return build(node, kind=kind) if extra else build({"part": {**node, "kind": kind}})

    for kind, text in (("value", "bad value"), ("import", "pip install it"), ("file", "no such file")):
        with pytest.raises(ConfigError, match=text):
            run(kind)
    with pytest.raises(DataError, match="broken image"):
        run("data")
    with pytest.raises(ZeroDivisionError):
        run("bug")


def test_extra_arguments_need_a_constructor():
    with pytest.raises(ConfigError, match="no _target_"):
        build({"a": 1}, width=3)


def test_a_resolved_config_can_be_stored_and_rebuilt(tree):
    import json

    stored = json.loads(json.dumps(to_container(composed(tree, "experiment=long", "model.heads=4", data=False))))
    again = OmegaConf.create(stored)
    assert to_container(again) == stored
    validate(again)
    for source in (stored["encoder"], again.encoder):
        assert build(source).layers[0].width == 32
