"""The reader of wandb's logs, against a writer after the description of the format."""

from __future__ import annotations

import struct
import zlib

import pytest

from detfamily.tracking.wandb_log import BLOCK, last_values, records


def write(path, contents):
    """Records in blocks: a head of checksum, length and kind; a block's rest too small for a head is zeros."""
    data = bytearray(b":W&B\xe1\xbe\x00")
    for content in contents:
        rest, first = content, True
        while first or rest:
            room = BLOCK - len(data) % BLOCK
            if room < 7:
                data += bytes(room)
                room = BLOCK
            piece, rest = rest[: room - 7], rest[room - 7 :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            data += struct.pack("<IHB", zlib.crc32(piece), len(piece), kind) + piece
            first = False
    path.write_bytes(data)


LENGTHS = [0, 1, 5, 1000, BLOCK - 7 - 7, 10, BLOCK, 3 * BLOCK + 11, 2, BLOCK - 40, 7, 8, 9]


def test_records_of_any_length_are_read(tmp_path):
    contents = [bytes([index]) * length for index, length in enumerate(LENGTHS)]
    write(tmp_path / "a", contents)
    assert list(records(tmp_path / "a")) == contents


def test_reading_from_any_block_gives_the_records_that_begin_behind_it(tmp_path):
    contents = [bytes([index]) * length for index, length in enumerate(LENGTHS)]
    write(tmp_path / "a", contents)
    blocks = (tmp_path / "a").stat().st_size // BLOCK
    assert blocks >= 5
    for block in range(1, blocks + 1):
        found = list(records(tmp_path / "a", block * BLOCK))
        assert found == contents[len(contents) - len(found) :]
    assert len(list(records(tmp_path / "a", BLOCK))) > len(list(records(tmp_path / "a", 4 * BLOCK))) > 0


@pytest.mark.parametrize("cut", [0, 3, 7, 9, 500, 1020, BLOCK + 5, 2 * BLOCK + 100])
def test_what_was_cut_off_is_left_out(tmp_path, cut):
    contents = [b"a" * 10, b"b" * 1000, b"c" * 3 * BLOCK, b"d"]
    write(tmp_path / "a", contents)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:cut])
    whole = 0 if cut < 24 else 1 if cut < 24 + 1007 else 2
    assert list(records(tmp_path / "a")) == contents[:whole]


def test_the_last_values_are_found_far_from_the_end_and_in_several_logs(tmp_path):
    layout = pytest.importorskip("wandb.proto.wandb_internal_pb2")

    def row(**values):
        record = layout.Record()
        for name, value in values.items():
            item = record.history.item.add()
            item.key, item.value_json = name, str(value)
        return record.SerializeToString()

    noise = layout.Record()
    noise.output_raw.line = "x" * 100_000
    far = [row(epoch=3, AP=0.5), *[noise.SerializeToString()] * 30, row(step=70), row(step=80)]
    write(tmp_path / "a", far)
    write(tmp_path / "b", [row(step=10), row(epoch=1)])
    assert last_values([tmp_path / "a", tmp_path / "b"], ("step", "epoch")) == {"step": 80, "epoch": 3}
    assert last_values([tmp_path / "b"], ("step", "epoch")) == {"step": 10, "epoch": 1}
    assert last_values([], ("step",)) == {}
