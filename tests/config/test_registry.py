"""Where configs lie, and what there is to choose from."""

import pytest

from detfamily.config import compose, configs_dir, groups, groups_for, groups_of
from detfamily.config.registry import read_yaml
from detfamily.errors import ConfigError


def test_groups_and_choices_are_read_from_the_folder(tree):
    assert groups(tree)["attention"] == ["dense", "narrow"]
    assert list(groups_of("evaluate", tree)) == ["data"]
    assert list(groups_of("train", tree))[:3] == ["encoder", "attention", "recipe"]


def test_the_package_has_its_configs():
    assert (configs_dir() / "train.yaml").is_file()


@pytest.mark.parametrize("place", ["site-packages/detfamily/configs", "configs"])
def test_configs_lie_in_the_package_or_in_the_repository(tmp_path, monkeypatch, place):
    package = "site-packages" if place.startswith("site") else "src"
    monkeypatch.setattr("detfamily.config.registry.__file__", str(tmp_path / package / "detfamily/config/registry.py"))
    with pytest.raises(ConfigError, match="no configs found, neither in .*install detfamily again"):
        configs_dir()
    (tmp_path / place).mkdir(parents=True)
    assert configs_dir() == tmp_path / place


def test_nested_groups_are_named_by_their_path(write_tree):
    configs = write_tree({"a/b/one.yaml": "", "a/two.yaml": "", "top.yaml": "defaults:\n  - /a/b@c: one"}, alone=True)
    assert groups(configs) == {"a": ["two"], "a/b": ["one"]}
    assert groups_of("top", configs) == {"a/b": ["one"]}


@pytest.fixture
def two_commands(write_tree):
    """``first`` and ``second`` share a group, and ``second`` has choices of its own of another."""
    return write_tree(
        {
            "first.yaml": "defaults:\n  - size: small\n  - data: boxes\n",
            "second.yaml": "defaults:\n  - size: small\n  - second/data: labels\n  - second/experiment: null\n",
            "size/small.yaml": "width: 1\n",
            "size/large.yaml": "width: 2\n",
            "data/boxes.yaml": "root: a\n",
            "second/data/labels.yaml": "# @package data\nroot: b\n",
            "second/data/more.yaml": "# @package data\ndefaults: [labels, _self_]\nroot: c\n",
            "second/experiment/large.yaml": (
                "# @package _global_\ndefaults:\n  - override /size: large\n  - override /second/data: more\n"
            ),
        },
        alone=True,
    )


def test_a_command_may_have_choices_of_its_own(two_commands):
    assert groups_for("first", two_commands) == {"data": ["boxes"], "size": ["large", "small"]}
    own = {"data": ["labels", "more"], "experiment": ["large"]}
    assert groups_for("second", two_commands) == {**own, "size": ["large", "small"]}
    assert list(groups_of("second", two_commands)) == ["size", "data", "experiment"]


def test_they_are_chosen_by_the_name_of_the_group(two_commands):
    def of(name, *overrides):
        cfg = compose(name, overrides, two_commands)
        return cfg.size.width, cfg.data.root

    assert of("first") == (1, "a") and of("second") == (1, "b")
    assert of("second", "data=more", "size=large") == (2, "c")
    assert of("second", "experiment=large") == (2, "c")
    assert of("second", "experiment=large", "data=labels", "data.root=d") == (2, "d")
    with pytest.raises(ConfigError, match="data has no choice 'boxes': valid names: labels, more"):
        of("second", "data=boxes")
    with pytest.raises(ConfigError, match="data has no choice 'labels'"):
        of("first", "data=labels")
    with pytest.raises(ConfigError, match="no group 'second/data'"):
        of("first", "second/data=labels")


def test_what_they_preset_is_checked_as_that_of_others(two_commands, write_tree):
    file = two_commands / "second/experiment/large.yaml"
    file.write_text("# @package _global_\nsiez: {width: 3}\n")
    with pytest.raises(ConfigError, match="siez is unknown.*did you mean 'size'"):
        compose("second", ["experiment=large"], two_commands)


@pytest.mark.parametrize(("text", "message"), [("[1]", "must hold a mapping, not a ListConfig"), ("{", "valid YAML")])
def test_a_file_that_is_no_config_is_named(write_tree, text, message):
    file = write_tree({"bad.yaml": text}) / "bad.yaml"
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(file)
    assert str(file) in str(caught.value)
    with pytest.raises(ConfigError, match="no config 'bat': did you mean 'bad'"):
        read_yaml(file.with_name("bat.yaml"))
