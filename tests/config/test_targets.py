"""What ``_target_`` may name, and what is said where it may not."""

import pytest

import detfamily
from detfamily.config import build
from detfamily.errors import ConfigError


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("detfamily.example_blocks.Recipee", "detfamily.example_blocks has no 'Recipee': did you mean"),
        ("detfamily.exampel_blocks.Recipe", "detfamily has no 'exampel_blocks': did you mean"),
        ("detfamily.example_blocks.not_callable", "is not a class or a function"),
        ("[3]", "[3] may not be used in a config, only detfamily.*"),
    ],
)
def test_a_target_that_does_not_exist_is_refused(refusal, target, message):
    text = refusal(f"recipe._target_={target}")
    assert text.startswith("recipe._target_: ") and message in text


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "detfamily.cli.os.system",
        "detfamily.cli.importlib.import_module",
        "torch.nn.functional.torch.hub.load",
        "detfamily_other.run",
    ],
)
def test_configs_cannot_reach_arbitrary_code(refusal, target):
    assert target in refusal(f"recipe._target_={target}")
    with pytest.raises(ConfigError, match="may not be used"):
        build({"block": [{"_target_": target}]})


def test_a_target_that_needs_a_package_names_it(tmp_path, monkeypatch):
    (tmp_path / "example_extra.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.setattr("detfamily.__path__", [*detfamily.__path__, str(tmp_path)])
    with pytest.raises(ConfigError, match="needs the package 'a_package_that_nobody_has', which is not installed"):
        build({"_target_": "detfamily.example_extra.Block"})
