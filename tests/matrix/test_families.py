"""Every family with every attention: built, and a step of training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from detfamily.config import build, compose, configs_dir, groups, to_container, validate
from detfamily.config.registry import read_yaml
from detfamily.errors import ConfigError
from detfamily.matrix.cell import Step
from detfamily.matrix.request import Settings

TINY = (
    *("backbone=small", "backbone.stem_width=8", "backbone.widths=[8,8,12,12]", "runtime=cpu"),
    *("model.embed_dim=64", "model.num_heads=4", "model.ffn_dim=32", "model.num_queries=8"),
    *("model.num_one_to_many=8", "model.num_denoising=8", "encoder.num_layers=1", "decoder.num_layers=2"),
    *("model.num_regions=16", "model.region_dim=16"),
)
SETTINGS = Settings((256, 256), batch_size=2, num_classes=5, repeats=1)
FAMILIES = groups()["family"]
ATTENTIONS = groups()["encoder_attention"]

NOTHING_TO_LEARN = [
    # (families, attentions, parameters whose exact gradient is zero); () stands for all
    # Queries start without content, which is what the first self-attention multiplies; and where all values are equal,
    # it does not matter who looks at whom.
    (("conditional_detr", "dab_detr"), (), r"decoder\.layers\.0\.self_attention\.((query|key)_.*|value_proj\.weight)"),
    # What is added to all keys alike changes no softmax.
    ((), (), r".*\.(key_content|key_pos)_proj\.bias|.*\.attention\.k\.bias"),
    # Its queries are learned, so that a level's code is added to its keys alone, all alike.
    ((), ("qna",), r"level_embed\.weight"),
    # No object is near the anchors of these levels; that there is none, an auxiliary head says from the start.
    (("co_deformable_detr", "co_dino"), (), r"auxiliary\.(heads\.atss\.scales\.\d|downsample\..*)"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are many times slower with more threads where other processes want the cores, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def composed(*overrides: str) -> DictConfig:
    cfg = compose("train", [*TINY, *overrides])
    validate(cfg)
    return cfg


def with_attention(family: str, attention: str) -> DictConfig:
    """What composition gives, in a fraction of its time: the choice is one node, put in the place of another."""
    path = configs_dir() / "encoder_attention" / f"{attention}.yaml"
    node = read_yaml(path)
    if "defaults" in node or path.read_text(encoding="utf-8").startswith("# @package"):
        return composed(f"family={family}", f"encoder_attention={attention}")
    cfg = OmegaConf.create(composed(f"family={family}"))
    OmegaConf.update(cfg, "encoder_attention", node, merge=False)
    return cfg


def step(cfg: DictConfig) -> list[str]:
    """Take a step with all its checks; returns the parameters that have nothing to learn."""
    torch.manual_seed(0)
    one = Step(cfg, SETTINGS, build(cfg.runtime))
    kept, loss, idle = one.first()
    assert kept > 0 and loss > 0
    return idle


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_takes_a_step_with_every_encoder_attention(family: str) -> None:
    for attention in ATTENTIONS:
        idle = step(with_attention(family, attention))
        expected = allowed(family, attention)
        assert not [name for name in idle if not re.fullmatch(expected, name)], attention


def allowed(family: str, attention: str) -> str:
    """A pattern of the parameters that have nothing to learn."""
    found = [
        pattern
        for families, attentions, pattern in NOTHING_TO_LEARN
        if family in (families or FAMILIES) and attention in (attentions or ATTENTIONS)
    ]
    return "|".join(found)


def test_the_short_cut_is_composition() -> None:
    family, attention = FAMILIES[0], ATTENTIONS[-1]
    straight = composed(f"family={family}", f"encoder_attention={attention}")
    assert to_container(with_attention(family, attention)) == to_container(straight)


REFUSED_WITH = {
    # what the queries of a family lack for a cross-attention
    "conditional": ("gives no code of a place", ("co_deformable_detr", "deformable_detr", "detr", "h_deformable_detr")),
    "ms_deform": ("samples around reference points", ("detr",)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_takes_every_cross_attention_or_says_why_not(family: str) -> None:
    for attention in groups()["cross_attention"]:
        reason, families = REFUSED_WITH.get(attention.split("_")[0] if "cond" in attention else attention, ("", ()))
        cfg = composed(f"family={family}", f"cross_attention={attention}")
        if family in families:
            with pytest.raises(ConfigError, match=reason):
                step(cfg)
        else:
            step(cfg)
