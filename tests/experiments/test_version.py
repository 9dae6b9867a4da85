"""The identity of the code: the sources, in a checkout whether committed or not."""

from __future__ import annotations

import shutil
import subprocess

import pytest

import detfamily
from detfamily.experiments.version import code_version


@pytest.fixture
def package(tmp_path):
    """A package in a repository of its own."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    folder = tmp_path / "repository" / "src" / "package"
    (folder / "experiments").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "model.py").write_text("width = 1\n")
    git(folder.parents[1], "init", "-q")
    commit(folder)
    return folder


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def commit(folder):
    git(folder, "add", "-A", ":/")
    git(folder, "commit", "-q", "-m", "x", "--allow-empty")


def test_changed_sources_are_other_code_also_before_they_are_committed(package):
    first = code_version(package)
    (package / "model.py").write_text("width = 2\n")
    changed = code_version(package)
    assert changed.identity != first.identity
    assert changed.commit == f"{first.commit}+changes"
    commit(package)
    committed = code_version(package)
    assert committed.identity == changed.identity and committed.commit not in (first.commit, changed.commit)
    (package / "new.py").write_text("")
    assert code_version(package).identity != committed.identity


def test_what_no_training_reads_is_not_the_code(package):
    first = code_version(package)
    (package.parents[1] / "README.md").write_text("words")
    (package / "experiments" / "report.py").write_text("words = 1\n")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "model.pyc").write_bytes(b"x")
    commit(package)
    assert code_version(package).identity == first.identity


def test_an_installed_package_is_its_version(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    assert code_version(tmp_path).identity == code_version(tmp_path).commit == f"v{detfamily.__version__}"
