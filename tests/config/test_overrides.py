"""Overrides: how they are read, and what they set."""

import random

import pytest

from detfamily.config import compose, to_container, validate


def test_fields_are_set_added_and_removed(composed):
    cfg = composed(
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


def test_several_choices_of_one_group_have_a_place_each(composed):
    assert set(composed("extras=[rcnn,atss]").extras) == {"rcnn", "atss"}


def test_a_choice_may_be_called_like_a_number(composed):
    assert composed("recipe=50").recipe.note == "fifty"


def test_text_stays_as_it_was_typed(composed):
    assert composed("name=2017").name == "2017"
    assert composed("name=1e3").name == "1e3"
    assert composed("recipe.note=1e3").recipe.note == "1e3"
    assert composed("data=folder", "data.root=2017").data.root == "2017"
    assert composed("recipe.width=7").recipe.width == 7


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("foo", ["'foo' is not an override", "key=value"]),
        ("narrow", ["did you mean attention=narrow or family=narrow?"]),
        ("=3", ["not an override"]),
        ("attenton=dense", ["no group or field 'attenton'", "'attention'"]),
        ("attention=dence", ["attention has no choice 'dence'", "'dense'"]),
        ("attention=null", ["attention has no choice 'null'", "dense, narrow"]),
        ("extras=[rcnn,ats]", ["extras has no choice 'ats'", "'atss'"]),
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
def test_a_wrong_override_is_refused_by_name(refusal, override, parts):
    message = refusal(override)
    assert all(part in message for part in parts), message


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
def test_paths_need_no_quotes(composed, path):
    assert composed("data=folder", f"data.root={path}").data.root == path


def test_an_existing_path_needs_no_quotes(composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photo (1), a=b.jpg").touch()
    (tmp_path / "7").touch()
    assert composed("data.root=photo (1), a=b.jpg").data.root == "photo (1), a=b.jpg"
    assert composed("data.root=~/coco").data.root == f"{tmp_path}/coco"
    assert composed("seed=7").seed == 7


def test_any_path_survives_the_grammar(tree):
    chance = random.Random(0)
    for _ in range(40):
        path = "/" + "".join(chance.choices("ab '\"\\,=()[]{}:#~*?", k=chance.randint(1, 12)))
        assert compose("evaluate", [f"data.root={path}"], tree).data.root == path
