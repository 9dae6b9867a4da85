from __future__ import annotations

import pytest
import torch

from detfamily.checkpoints.adapter import CONVOLUTION, Adapter, Form, Join, Rename
from detfamily.errors import CheckpointError

ADAPTER = Adapter(
    [
        Rename("heads.0.{rest}", ("head.0.{rest}", "head.1.{rest}", "decoder.head.0.{rest}")),
        Rename("layers.{n}.norm.{rest}", ("blocks.{n}.norm1.{rest}",)),
        Join(("pos", "content"), "queries.weight", dim=1),
    ],
    ignored=[r"\.num_batches_tracked$"],
)


def test_there_and_back_with_every_copy() -> None:
    ours = {
        "heads.0.weight": torch.randn(2, 3),
        "layers.12.norm.bias": torch.randn(4),
        "pos": torch.randn(5, 2),
        "content": torch.randn(5, 2),
    }
    official = ADAPTER.to_official(ours)
    assert set(official) == {
        *("head.0.weight", "head.1.weight", "decoder.head.0.weight"),
        *("blocks.12.norm1.bias", "queries.weight"),
    }
    assert torch.equal(official["head.1.weight"], ours["heads.0.weight"])
    assert torch.equal(official["queries.weight"], torch.cat([ours["pos"], ours["content"]], 1))
    back = ADAPTER.to_ours(official)
    assert set(back) == set(ours)
    for name, value in back.items():
        assert torch.equal(value, ours[name]), name


def test_forms_and_joins_by_templates() -> None:
    turned = Form(lambda tensor: tensor.t(), lambda tensor: tensor.t())
    adapter = Adapter(
        [
            Rename("blocks.{n}.table", ("layers.{n}.table",), form=turned),
            Join(("blocks.{n}.k.weight", "blocks.{n}.v.weight"), "layers.{n}.kv.weight", dim=0, form=CONVOLUTION),
            Rename("blocks.{n}.q.weight", ("layers.{n}.q.weight",), form=CONVOLUTION),
        ]
    )
    official = {
        "layers.2.table": torch.randn(3, 4),
        "layers.2.kv.weight": torch.randn(6, 5, 1, 1),
        "layers.11.kv.weight": torch.randn(6, 5, 1, 1),
        "layers.2.q.weight": torch.randn(3, 5, 1, 1),
    }
    ours = adapter.to_ours(official)
    assert torch.equal(ours["blocks.2.table"], official["layers.2.table"].t())
    assert torch.equal(ours["blocks.11.k.weight"], official["layers.11.kv.weight"][:3, :, 0, 0])
    assert torch.equal(ours["blocks.2.v.weight"], official["layers.2.kv.weight"][3:, :, 0, 0])
    assert ours["blocks.2.q.weight"].shape == (3, 5) and len(ours) == 6
    back = adapter.to_official(ours)
    assert {name: value.shape for name, value in back.items()} == {name: one.shape for name, one in official.items()}
    assert all(torch.equal(back[name], official[name]) for name in official)
    assert adapter.official_name("blocks.7.v.weight") == "layers.7.kv.weight"
    assert adapter.our_names("layers.7.kv.weight") == ("blocks.7.k.weight", "blocks.7.v.weight")
    del ours["blocks.11.v.weight"]
    with pytest.raises(
        CheckpointError, match=r"layers\.11\.kv\.weight is made of .*blocks\.11\.v\.weight'\] is missing"
    ):
        adapter.to_official(ours)


def test_copies_that_differ_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"head\.1\.weight should be a copy of what heads\.0\.weight has already"):
        ADAPTER.to_ours({"head.0.weight": torch.zeros(3), "head.1.weight": torch.tensor([0.0, 0.0, 1e-7])})


def test_unknown_names_are_listed() -> None:
    with pytest.raises(CheckpointError, match=r"without a counterpart: head\.2\.weight, blocks\.x\.norm1\.bias$"):
        ADAPTER.to_ours({name: torch.zeros(1) for name in ("head.2.weight", "head.0.weight", "blocks.x.norm1.bias")})
    with pytest.raises(CheckpointError, match=r"our names without an official counterpart: heads\.1\.weight$"):
        ADAPTER.to_official({"heads.1.weight": torch.zeros(1), "layers.0.norm.bias": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"a7 and 12 more$"):
        ADAPTER.to_ours({f"a{index}": torch.zeros(1) for index in range(20)})


def test_names_fit_as_a_whole() -> None:
    """A dot is a dot, and a number a number."""
    for name in ("blocks.1xnorm1.bias", "my.blocks.1.norm1.bias", "blocks.one.norm1.bias", "blocks.1.norm1"):
        with pytest.raises(CheckpointError, match="without a counterpart"):
            ADAPTER.to_ours({name: torch.zeros(1)})


def test_what_may_be_ignored_is() -> None:
    assert ADAPTER.to_ours({"bn.num_batches_tracked": torch.zeros(1)}) == {}


def test_a_part_of_a_joined_tensor_is_missing() -> None:
    with pytest.raises(CheckpointError, match=r"queries\.weight is made of \['pos', 'content'\], and \['content'\]"):
        ADAPTER.to_official({"pos": torch.zeros(1, 2)})


NESTED = Adapter(
    [
        Rename(
            "stages.{n}.blocks.{m}.table",
            ("layers.{n}.{m}.bias_table",),
            computed=(("layers.{n}.{m}.count", lambda table: torch.tensor(len(table))),),
        ),
        Rename("stages.{n}.blocks.{m}.{rest}", ("layers.{n}.{m}.{rest}",)),
    ]
)


def test_two_numbers_in_a_name() -> None:
    ours = {"stages.1.blocks.12.norm.bias": torch.zeros(2), "stages.12.blocks.1.norm.bias": torch.ones(2)}
    official = NESTED.to_official(ours)
    assert set(official) == {"layers.1.12.norm.bias", "layers.12.1.norm.bias"}
    back = NESTED.to_ours(official)
    assert set(back) == set(ours) and all(torch.equal(back[name], value) for name, value in ours.items())


def test_what_follows_from_another_tensor_is_written_and_not_read() -> None:
    ours = {"stages.0.blocks.3.table": torch.randn(5, 2)}
    assert set(NESTED.to_official(ours)) == {"layers.0.3.bias_table"}
    official = NESTED.to_official(ours, computed=True)
    assert set(official) == {"layers.0.3.bias_table", "layers.0.3.count"}
    assert int(official["layers.0.3.count"]) == 5
    back = NESTED.to_ours({**official, "layers.0.3.count": torch.tensor(99)})
    assert set(back) == set(ours)
    assert NESTED.our_names("layers.0.3.count") == ("stages.0.blocks.3.table",)
