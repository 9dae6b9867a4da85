"""Checks against constructors: the names of arguments, and values against annotations."""

import pytest

from detfamily.config import compose, to_container, validate
from detfamily.errors import ConfigError


def test_a_good_config_passes_also_as_plain_containers(composed):
    cfg = composed("recipe.decay=1", "recipe.lr=1", "+recipe.mystery=anything", "recipe.drops=[]")
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
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(refusal, override, message):
    assert message in refusal(override)


def test_a_block_of_another_kind_is_refused(refusal):
    message = refusal("~encoder.norm", "+encoder.norm={_target_: detfamily.example_blocks.Folder, root: x}")
    assert message.endswith("given, expected a block (a mapping with _target_, giving a Module) or null")


def test_a_value_that_a_run_derives_may_be_open_until_then(write_tree):
    derived = "model: {num_classes: null}\nhead: {_target_: torch.nn.Linear, in_features: 8, out_features: 2}\n"
    open_yet = derived.replace("out_features: 2", "out_features: '${model.num_classes}'")
    configs = write_tree({"a.yaml": open_yet, "b.yaml": open_yet.replace("num_classes", "num_classses")}, alone=True)
    cfg = compose("a", [], configs)
    validate(cfg)
    assert cfg.model.num_classes is None
    with pytest.raises(ConfigError, match="num_classses: null given, expected an integer"):
        validate(compose("b", [], configs))


def test_a_value_is_reported_where_it_stands(refusal):
    message = refusal("attention.width=${data.root}")
    assert message == "data.root: '.' given, expected an integer (used as encoder.layer.width)"
    message = refusal("+attention.hads=3")
    assert message.startswith("attention.hads is not an argument of detfamily.example_blocks.Attention: did you mean")


def test_everything_wrong_is_said_at_once(refusal):
    message = refusal("recipe.lr=abc", "+recipe.foo=1", "encoder.depth=x")
    assert len(message.splitlines()) == 3
