from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def rival() -> ModuleType:
    scripts = Path(__file__).parents[2] / "scripts"
    sys.path += [str(scripts), str(scripts / "rivals")]
    import official_dino

    return official_dino


def test_needs_the_clone(rival: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OFFICIAL_DINO", raising=False)
    with pytest.raises(SystemExit, match="OFFICIAL_DINO is not set"):
        rival.dino("dino_r50_4scale_12ep", 91)
    monkeypatch.setenv("OFFICIAL_DINO", str(tmp_path))
    with pytest.raises(SystemExit, match="expected a clone"):
        rival.dino("dino_r50_4scale_12ep", 91)
    with pytest.raises(SystemExit, match="not detr_r50_500ep"):
        rival.dino("detr_r50_500ep", 91)


def test_reads_the_official_arguments(rival: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "config" / "DINO"
    folder.mkdir(parents=True)
    (folder / "DINO_4scale.py").write_text("_base_ = ['x.py']\nnum_queries = 900\ndn_box_noise_scale = 0.4\n")
    given = rival.arguments(tmp_path, "dino_r50_4scale_12ep", 7)
    assert (given.num_queries, given.dn_box_noise_scale, given.dn_labelbook_size, given.device) == (900, 1.0, 7, "cpu")
    assert not hasattr(given, "_base_")


def test_cuda_means_the_device_of_the_pixels_and_only_meanwhile(rival: ModuleType) -> None:
    move, copy = torch.Tensor.to, torch.Tensor.cuda
    with pytest.raises(KeyError), rival.cuda_means(torch.device("cpu")):
        assert torch.ones(2).cuda().device.type == torch.ones(2).to("cuda").device.type == "cpu"
        assert torch.ones(2).to(torch.float64).dtype == torch.float64
        raise KeyError
    assert torch.Tensor.to is move and torch.Tensor.cuda is copy
