from __future__ import annotations

import pytest

from detfamily.files import write_atomically, write_text_atomically


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
