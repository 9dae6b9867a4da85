"""What is typed after ``detfamily matrix``, and what becomes of a slip."""

from __future__ import annotations

import pytest

from detfamily import cli
from detfamily.config import groups
from detfamily.errors import ConfigError
from detfamily.matrix import command
from detfamily.matrix.request import check_names, read_request

SMALL = ("families=[detr]", "attentions=[dense]", "backbones=[small]")


def test_all_families_and_attentions_without_a_word() -> None:
    request = read_request([])
    assert [one.text for one in request.families] == groups()["family"]
    assert [one.text for one in request.attentions] == groups()["encoder_attention"]
    assert len(request.cells()) == len(request.families) * len(request.attentions) * len(request.backbones)
    assert len({cell.key for cell in request.cells()}) == len(request.cells())


def test_an_entry_brings_overrides_which_stand_between_those_of_all_cells() -> None:
    words = [
        "families=[detr,'deformable_detr decoder=refine']",
        "attentions=[[ms_deform,dense],'encoder_position=none']",
    ]
    request = read_request([*words, "backbones=[small]", "overrides=['model.num_points=3']", "model.num_queries=7"])
    cell = request.cells()[2]
    assert (cell.family, cell.attention) == ("deformable_detr decoder=refine", "[ms_deform,dense]")
    assert cell.overrides == (
        *("data.root=.", "family=deformable_detr", "backbone=small", "encoder_attention=[ms_deform,dense]"),
        *("model.num_points=3", "decoder=refine", "model.num_queries=7"),
    )
    assert "encoder_position=none" in request.cells()[3].overrides
    assert not any(one.startswith("encoder_attention") for one in request.cells()[3].overrides)


def test_any_group_may_be_compared() -> None:
    request = read_request([*SMALL, "columns=neck", "attentions=null"])
    assert [one.choice for one in request.attentions] == [f"neck={name}" for name in groups()["neck"]]


def test_what_is_measured_belongs_to_the_identity_of_a_cell() -> None:
    words = ["size=[64,64]", "batch_size=3", "num_classes=7", "repeats=9", "model.num_points=2"]
    keys = {read_request([*SMALL, *one]).cells()[0].key for one in ([], *([word] for word in words))}
    assert len(keys) == 1 + len(words)
    (cell,) = read_request([*SMALL, "jobs=2", "output_dir=elsewhere"]).cells()
    assert cell.key == read_request(SMALL).cells()[0].key


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["families=[dert]"], "families: family has no choice 'dert': did you mean 'detr'"),
        (["attentions=[[dense,ms_defrom]]"], "encoder_attention has no choice 'ms_defrom': did you mean 'ms_deform'"),
        (["backbones=[resnet19]"], "backbone has no choice 'resnet19': did you mean"),
        (["attentions=[fpn]"], "encoder_attention has no choice 'fpn'"),
        (["backbones=[]"], "backbones is empty"),
        (["backbones=['timm convnext']"], "'convnext' is none"),
        (["columns=neks"], "columns=neks: did you mean 'neck'"),
        (["columns=family"], "columns=family: "),
        (["familys=[detr]"], "there is no setting, group or field 'familys': did you mean 'family' or 'families'"),
        (["family=detr"], "'family=detr' is what each cell has of its own: pass families=[...]"),
        (["encoder_attention=dense"], "pass attentions=[...]"),
        (["experiment=detr_r50_50ep"], "is what each cell has of its own"),
        (["size=[64]"], "expected [height, width]"),
        (["size=[16,64]"], "size is 16; expected at least 64"),
        (["repeats=0"], "repeats is 0; expected at least 1"),
        (["jobs=none"], "jobs: 'none' given, expected an integer"),
        (["model.num_point=2"], "did you mean 'num_points'"),
        (["backbones=['small widht=3']"], "there is no group or field 'widht'"),
        (["backbones=[small,'small backbone.stem=3']"], "backbone has no field 'stem'"),
        (["backbones=[timm]"], "backbone.name is missing"),
        (["backbones=[small,timm]"], "backbones: 'timm': backbone.name is missing"),
    ],
)
def test_a_slip_stops_before_any_work(words: list[str], message: str, monkeypatch, capsys) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(command, "examine_all", refuse)
    given = {one.partition("=")[0]: one for one in (*SMALL, *words)}
    assert cli.main(["matrix", *given.values()]) == cli.FAILED
    error = capsys.readouterr().err
    assert error.startswith("detfamily: ") and message in error


def test_what_some_cells_have_no_use_for_is_no_slip() -> None:
    """Without denoising there are no copies to count: such cells are refused, and the others work."""
    check_names(read_request([*SMALL[1:], "families=[detr,dn_detr]", "denoising.num_groups=2"]))
    with pytest.raises(ConfigError, match=r"denoising is null, it has no fields"):
        check_names(read_request([*SMALL, "denoising.num_groups=2"]))
