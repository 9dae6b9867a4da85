"""How many columns a class head has, without the data."""

from __future__ import annotations

import pytest

from detfamily.config import compose
from detfamily.errors import ConfigError
from detfamily.info.classes import columns_of


@pytest.mark.parametrize(
    ("overrides", "columns"),
    [
        ("data=shapes", 8),
        ("data=coco", 80),
        ("data=coco data.labels=category_id", 91),
        ("data=coco_mini", 80),
        ("experiment=detr_r50_500ep", 91),
        ("experiment=detr_r50_500ep info.num_classes=80", 80),
        ("experiment=co_dino_r50_5scale_12ep", 80),
        ("experiment=finetune info.num_classes=3", 3),
    ],
)
def test_columns(overrides: str, columns: int) -> None:
    assert columns_of(compose("train", ["data.root=.", *overrides.split()]))[0] == columns


@pytest.mark.parametrize("given", ["0", "-2", "2.5", "true", "many"])
def test_no_number_of_classes(given: str) -> None:
    with pytest.raises(ConfigError, match="info.num_classes is"):
        columns_of(compose("train", [f"info.num_classes={given}"]))


def test_other_data_has_to_say() -> None:
    cfg = compose("train", [])
    cfg.data = {"_target_": "somewhere.else.Data"}
    with pytest.raises(ConfigError, match="pass info.num_classes=N"):
        columns_of(cfg)
