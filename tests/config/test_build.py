"""Building: nodes, lists, factories, and whose words an error has."""

import json

import pytest
from omegaconf import OmegaConf
from torch import nn

from detfamily.config import build, to_container, validate
from detfamily.errors import ConfigError, DataError


def test_build_makes_inner_nodes_first_and_factories_as_asked(composed):
    encoder = build(composed("encoder.depth=2").encoder)
    assert [layer.heads for layer in encoder.layers] == [4, 4]
    assert encoder.layers[0] is not encoder.layers[1]
    assert isinstance(encoder.norm, nn.LayerNorm)


def test_extra_arguments_are_passed_by_identity(composed):
    cfg = composed()
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


def test_a_constructor_speaks_for_itself_and_the_key_is_named(composed):
    cfg = composed("model.heads=7")
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


def test_a_resolved_config_can_be_stored_and_rebuilt(composed):
    stored = json.loads(json.dumps(to_container(composed("experiment=long", "model.heads=4", data=False))))
    again = OmegaConf.create(stored)
    assert to_container(again) == stored
    validate(again)
    for source in (stored["encoder"], again.encoder):
        assert build(source).layers[0].width == 32
