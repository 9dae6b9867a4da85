"""Composition: precedence, presets, interpolations, and the memory of what was composed before."""

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from detfamily.config import compose, configs_dir, validate
from detfamily.config.containers import as_written
from detfamily.errors import ConfigError


def test_precedence_is_command_line_then_experiment_then_family(composed):
    plain = composed()
    assert (plain.model.heads, plain.model.width, plain.recipe.epochs) == (4, 64, 50)
    family = composed("family=narrow")
    assert (family.model.width, family.attention.heads) == (32, 2)
    experiment = composed("experiment=long", data=False)
    assert (experiment.model.width, experiment.model.heads, experiment.recipe.epochs) == (32, 16, 150)
    assert experiment.published == [{"AP": 43.8, "source": "table 1"}]
    typed = composed("experiment=long", "recipe.epochs=3", "attention=dense", data=False)
    assert (typed.recipe.epochs, typed.attention.heads) == (3, 16)


def test_interpolations_follow_a_value_that_is_set_later(composed):
    cfg = composed("model.width=16")
    assert cfg.encoder.layer.width == 16
    cfg.model.width = 8
    assert cfg.encoder.layer.width == 8


def test_a_preset_chooses_a_list_as_a_command_line_does():
    family = compose("train", ["family=co_dino"])
    typed = compose("train", ["family=co_dino", "auxiliary=[faster_rcnn,atss]"])
    assert as_written(family) == as_written(typed) and len(family.auxiliary) == 2
    assert family.auxiliary[0].roi._target_ != family.auxiliary[1]._target_
    other = compose("train", ["family=co_dino", "auxiliary=[atss,atss,faster_rcnn]", "auxiliary.1.depth=3"])
    assert [one.get("depth") for one in other.auxiliary] == [1, 3, None]
    assert compose("train", ["family=co_dino", "auxiliary=none"]).auxiliary is None
    assert compose("train", ["family=co_dino", "auxiliary=atss"]).auxiliary.depth == 1
    with pytest.raises(ConfigError, match="auxiliary is a list of 2"):
        compose("train", ["family=co_dino", "auxiliary.depth=2"])


def test_a_missing_value_says_what_to_pass(refusal):
    assert refusal(data=False) == "data.root is missing: pass data.root=..."


def test_an_unknown_primary_config_names_the_others(tree):
    with pytest.raises(ConfigError, match="no config 'trian': did you mean 'train'"):
        compose("trian", [], tree)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: {hads: 3}", ["in family/bad.yaml", "model.hads is unknown", "'heads'"]),
        ("model: {heads: many}", ["in family/bad.yaml", "model.heads: 'many' given"]),
        ("sede: 3", ["in family/bad.yaml", "sede is unknown", "'seed'"]),
        ("recipe: {lrr: 3}", ["recipe.lrr is not an argument of", "'lr'"]),
        ("defaults: [{override /atention: dense}]", ["no group 'atention'", "'attention'"]),
        ("defaults: [{override /attention: dence}]", ["no choice 'dence'", "'dense'"]),
        ("model: {heads: 3", ["cannot be composed", "bad.yaml"]),
        ("[1, 2]", ["bad"]),
        ("defaults: 3", ["bad"]),
    ],
)
def test_a_mistake_in_a_preset_is_refused_by_name(write_tree, refusal, text, parts):
    configs = write_tree({"family/bad.yaml": "# @package _global_\n" + text})
    message = refusal("family=bad", configs=configs)
    assert all(part in message for part in parts), message


def test_a_group_that_must_be_chosen_lists_its_choices(write_tree):
    files = {"train.yaml": "defaults:\n  - data: ???\n", "data/a.yaml": "x: 1", "data/b.yaml": ""}
    with pytest.raises(ConfigError, match=r"data is missing: pass data=\.\.\., one of a, b"):
        compose("train", [], write_tree(files, alone=True))


def test_a_preset_belongs_at_the_top(write_tree, refusal):
    configs = write_tree({"family/bad.yaml": "model: {heads: 2}"})
    assert "in family/bad.yaml: family is unknown" in refusal("family=bad", configs=configs)


@pytest.mark.parametrize(
    "chosen",
    [
        [],
        ["family=detr", "tracking=files"],
        ["experiment=detr_r101_dc5_50ep"],
        ["experiment=deformable_detr_r50_two_stage", "neck=bifpn", "classification=softmax"],
    ],
)
def test_groups_make_the_config_that_hydra_makes(chosen):
    with initialize_config_dir(config_dir=str(configs_dir()), version_base="1.3"):
        theirs = as_written(hydra_compose("train", [*chosen, "data=coco", "data.root=."]))
    ours = as_written(compose("train", [*chosen, "data=coco", "data.root=."]))
    assert ours == theirs and list(ours) == list(theirs)


def test_hydras_own_settings_are_no_part_of_a_config(write_tree):
    files = {"a.yaml": "defaults:\n  - override hydra/job_logging: disabled\nhydra: {verbose: true}\nseed: 1"}
    assert as_written(compose("a", [], write_tree(files, alone=True))) == {"seed": 1}


def test_composing_again_starts_afresh(composed):
    first, again = composed("attention=narrow"), composed("attention=narrow")
    first.model.width, first.recipe.drops[0] = 1, 1
    assert (again.model.width, again.recipe.drops) == (64, [40])
    assert composed("attention=narrow", "model.width=2").model.width == 2
    assert composed("attention=narrow") == again


def test_files_that_change_are_read_again(write_tree, composed):
    configs = write_tree({})
    assert composed("recipe=adamw", configs=configs).recipe.epochs == 50
    (configs / "family/base.yaml").write_text("# @package _global_\nrecipe: {epochs: 12345}\n")
    assert composed("recipe=adamw", configs=configs).recipe.epochs == 12345
    (configs / "family/base.yaml").write_text("# @package _global_\nrecipe: {epochs: many}\n")
    with pytest.raises(ConfigError, match=r"recipe.epochs: 'many' given"):
        validate(composed("recipe=adamw", configs=configs))
    (configs / "recipe/new.yaml").write_text("defaults: [adamw, _self_]\nlr: 7.0\n")
    (configs / "family/base.yaml").unlink()
    with pytest.raises(ConfigError, match="family has no choice 'base'"):
        composed("recipe=new", configs=configs)
    assert composed("recipe=new", "family=narrow", configs=configs).recipe.lr == 7


def test_a_list_of_attentions_is_kept_as_a_list():
    """Each as if it were chosen alone, with what the family sets; fields go by their place."""
    names = ["ms_deform", "dense", "ms_deform"]
    cfg = compose("train", [f"encoder_attention=[{','.join(names)}]", "encoder_attention.1.dropout=0.3"])
    alone = [as_written(compose("train", [f"encoder_attention={name}"]).encoder_attention) for name in names]
    alone[1]["dropout"] = 0.3
    assert as_written(cfg.encoder_attention) == alone
    cfg.model.num_heads = 4
    assert [one.num_heads for one in cfg.encoder.attention] == [4, 4, 4]
    validate(cfg)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder_attention=[dense,dence]"], "encoder_attention has no choice 'dence': did you mean 'dense'"),
        (["encoder_attention=[dense,dense]", "encoder_attention.dropout=0"], "encoder_attention is a list of 2"),
        (["encoder_attention=[dense,dense]", "encoder_attention.0.dropuot=0"], "'dropout'"),
        (["encoder_attention=[]"], r"encoder_attention=\[\] chooses nothing"),
        (
            ["cross_attention=[dense,ms_deform]"],
            "cross_attention is one block, and 2 choices are given for it: dense, ms",
        ),
    ],
)
def test_a_mistake_in_a_list_of_attentions_is_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(compose("train", overrides))
