from __future__ import annotations

from pathlib import Path

import pytest

from detfamily.errors import DataError
from detfamily.predict.sources import find_images


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.jpg",
        "a.PNG",
        "notes.txt",
        "sub/a.jpg",
        "sub/deep/c.tif",
        ".hidden.jpg",
        ".cache/d.jpg",
        "x[1].jpg",
    ):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    return tmp_path / "in"


def names(source: str | Path, **more: Path) -> list[str]:
    found = find_images(source, **more)
    assert all(path.is_file() for path in found.paths)
    return [name.as_posix() for name in found.names]


def test_a_folder_is_searched_with_its_subfolders(tree: Path) -> None:
    assert names(tree) == ["a.PNG", "b.jpg", "sub/a.jpg", "sub/deep/c.tif", "x[1].jpg"]
    assert names(tree, leave_out=tree / "sub") == ["a.PNG", "b.jpg", "x[1].jpg"]


def test_patterns(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(f"{tree}/*.jpg") == ["b.jpg", "x[1].jpg"]
    assert names(f"{tree}/**/*.jpg") == ["b.jpg", "sub/a.jpg", "x[1].jpg"]
    assert names(f"{tree}/s?b/[ab].*") == ["s?b/a.jpg".replace("?", "u")]
    assert names(f"{tree}/*.txt") == ["notes.txt"]  # what is named is tried
    monkeypatch.chdir(tree.parent)
    assert names("in/*/*.jpg") == ["sub/a.jpg"] and names("*/b.jpg") == ["in/b.jpg"]
    assert names("in") == names(tree) and names("in/b.jpg") == ["b.jpg"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tree: Path) -> None:
    assert names(tree / "x[1].jpg") == ["x[1].jpg"]
    assert names(tree / "notes.txt") == ["notes.txt"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "the source is empty"),
        ("{}/in/bb.jpg", "there is no image or folder .*did you mean 'b.jpg'"),
        ("{}/inn/b.jpg", "there is no image or folder .*did you mean 'in'"),
        ("{}/in/*.gif", r"nothing matches .*valid names: a.PNG, b.jpg"),
        ("{}/subb*/x.jpg", "nothing matches .*valid names: empty, in"),
        ("{}/empty", "holds no image: .*empty is empty"),
        ("{}/" + 300 * "x", "cannot look for .*too long"),
    ],
)
def test_what_is_not_there_names_what_is(tree: Path, tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=words):
        find_images(source.format(tmp_path))


def test_a_folder_of_nothing_but_results(tree: Path) -> None:
    with pytest.raises(DataError, match="holds no image"):
        find_images(tree, leave_out=tree)
