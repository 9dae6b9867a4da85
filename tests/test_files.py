from __future__ import annotations

import errno
import pickle

import pytest

from detfamily.errors import OutputError
from detfamily.files import append_text, remove_parts, write_atomically, write_text_atomically


def test_a_signal_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fill(file):
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fill)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_is_complete_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text_atomically(path, "old")
    write_text_atomically(path, "n\u00e9w\n")
    assert path.read_bytes() == b"n\xc3\xa9w\n"
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def full(file):
        file.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=f"^cannot write {path}: No space left on device$") as caught:
        write_atomically(path, full)
    assert caught.value.errno == errno.ENOSPC and path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(OutputError, match="cannot write .*file/b: Not a directory"):
        (tmp_path / "file").write_text("")
        append_text(tmp_path / "file" / "b", "more")


def test_text_is_added_at_the_end(tmp_path):
    for line in ("a\n", "b\n"):
        append_text(tmp_path / "a.txt", line)
    assert (tmp_path / "a.txt").read_text() == "a\nb\n"


def test_what_killed_processes_left_is_taken_away(tmp_path):
    for name in (".last.pt.123.part", "last.pt", ".hidden", "some.part"):
        (tmp_path / name).write_text("")
    remove_parts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "last.pt", "some.part"]
