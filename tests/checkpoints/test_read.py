from __future__ import annotations

import argparse
import json
import os
import pathlib
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from detfamily.checkpoints.read import read_file
from detfamily.errors import CheckpointError

STATE = {"a": torch.arange(6.0).view(2, 3)}


class Call:
    """Calls a function when it is unpickled in the ordinary way."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize("new_format", [True, False])
def test_official_containers_are_read(tmp_path, new_format):
    content = {"model": STATE, "epoch": 3, "args": argparse.Namespace(lr=1e-4, names=["a", None], dilation=True)}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    found = read_file(tmp_path / "a.pth")
    assert torch.equal(found["model"]["a"], STATE["a"]) and found["epoch"] == 3
    assert vars(found["args"]) == {"lr": 1e-4, "names": ["a", None], "dilation": True}


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_safetensors_are_known_by_their_name_or_their_beginning(tmp_path, name):
    save_file(STATE, tmp_path / name)
    assert torch.equal(read_file(tmp_path / name)["a"], STATE["a"])


def test_the_permission_ends_with_the_call(tmp_path):
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "a.pth")
    before = set(torch.serialization.get_safe_globals())
    read_file(tmp_path / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pth", weights_only=True)


FLAG = "DETFAMILY_TEST_RAN"
HOSTILE = {
    "system": (Call(os.system, f"touch {FLAG}"), r"posix\.system"),
    "eval": (Call(eval, f"open('{FLAG}', 'w')"), r"builtin\w*\.eval"),
    "exec": ({"model": STATE, "x": [Call(exec, f"open('{FLAG}', 'w')")]}, r"builtin\w*\.exec"),
    "open": ({"args": argparse.Namespace(x=Call(open, FLAG, "w"))}, r"\w*io\w*\.open|builtin\w*\.open"),
    "getattr": ({"model": Call(getattr, "abc", "upper")}, r"builtin\w*\.getattr"),
}


@pytest.mark.parametrize("kind", ["zip", "old", "pickle 0", "pickle 2", "pickle 4"])
@pytest.mark.parametrize("name", HOSTILE)
def test_code_is_named_and_not_run(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    content, what = HOSTILE[name]
    if kind.startswith("pickle"):
        Path("a.pth").write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
    else:
        torch.save(content, "a.pth", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(
        CheckpointError, match=f"a.pth was not opened.*run or make .*({what}).*Nothing of it was run. No "
    ):
        read_file(Path("a.pth"))
    assert not Path(FLAG).exists()


def test_a_namespace_cannot_be_made_to_call(tmp_path, monkeypatch):
    """The class that is permitted has no state that runs: not in its attributes, and not by arguments."""
    monkeypatch.chdir(tmp_path)
    torch.save({"args": argparse.Namespace(__reduce__=Call(os.system, f"touch {FLAG}"))}, "a.pth")
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        read_file(Path("a.pth"))
    assert not Path(FLAG).exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"args": argparse.Namespace(path=pathlib.PurePosixPath("x"))}, r"pathlib\S*\.PurePosixPath"),
        (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_what_is_only_unusual_is_refused_with_a_way_out(tmp_path, content, what):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"{what}.*If you trust .* save its tensors alone"):
        read_file(tmp_path / "a.pth")


def whole(folder):
    torch.save({"model": STATE, "args": argparse.Namespace(a=1)}, folder / "whole")
    return (folder / "whole").read_bytes()


def script(folder):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(folder / "script"))
    return (folder / "script").read_bytes()


def archive(folder):
    with zipfile.ZipFile(folder / "archive", "w") as file:
        file.writestr("readme.txt", "no weights")
    return (folder / "archive").read_bytes()


def tensors(folder):
    save_file(STATE, folder / "tensors")
    return (folder / "tensors").read_bytes()


BROKEN = {
    "empty": (lambda folder: b"", "is empty"),
    "web page": (lambda folder: b"\n<!DOCTYPE html><html><title>Quota exceeded</title>", "is a web page"),
    "git-lfs pointer": (lambda folder: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "json": (lambda folder: json.dumps({"error": "not found"}).encode(), "is json text"),
    "gzip": (lambda folder: b"\x1f\x8b\x08" + bytes(40), "is compressed"),
    "cut off": (lambda folder: whole(folder)[:-300], "cut off or damaged"),
    "cut off at once": (lambda folder: whole(folder)[:30], "cut off or damaged"),
    "bits flipped": (lambda folder: whole(folder)[:60] + bytes(400) + whole(folder)[460:], "cut off or damaged"),
    "noise": (lambda folder: bytes(range(1, 256)) * 9, "cut off or damaged"),
    "text": (lambda folder: b"weights are here: ...", "cut off or damaged"),
    "zip of something else": (archive, "cut off or damaged"),
    "program": (script, "TorchScript program"),
    "safetensors cut off": (lambda folder: tensors(folder)[:-5], "cut off or damaged"),
    "safetensors with another header": (lambda folder: b"\x09" + bytes(7) + b'{"a": 1}}', "cut off or damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_told_apart(tmp_path, name):
    make, words = BROKEN[name]
    path = tmp_path / "a.pth"
    path.write_bytes(make(tmp_path))
    with pytest.raises(CheckpointError, match=rf"a\.pth.*{words}"):
        read_file(path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read"):
        read_file(tmp_path)
