"""Where configs lie, and what there is to choose from."""

import pytest

from detfamily.config import configs_dir, groups, groups_of
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


@pytest.mark.parametrize(("text", "message"), [("[1]", "must hold a mapping, not a ListConfig"), ("{", "valid YAML")])
def test_a_file_that_is_no_config_is_named(write_tree, text, message):
    file = write_tree({"bad.yaml": text}) / "bad.yaml"
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(file)
    assert str(file) in str(caught.value)
    with pytest.raises(ConfigError, match="no config 'bat': did you mean 'bad'"):
        read_yaml(file.with_name("bat.yaml"))
