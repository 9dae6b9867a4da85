from __future__ import annotations

import json

import pytest
import torch

from detfamily.checkpoints.classes import compare, is_class_row, is_first_row_special, move_rows, say_object
from detfamily.checkpoints.coco_classes import COLUMNS, coco_label_map
from detfamily.data.labels import LabelMap

ANIMALS = LabelMap((None, 1, None, 3), (None, "cat", None, "dog"))
PETS = LabelMap((5, 6, 9), ("dog", "fish", "cat"))


def test_coco_is_what_its_annotations_say(goldens):
    path = goldens.parent / "data" / "coco_mini" / "annotations" / "instances_val2017.json"
    if not path.is_file():
        pytest.skip("no coco_mini beside the golden cases")
    assert coco_label_map() == LabelMap.by_category_id(json.loads(path.read_text())["categories"])


def test_coco_has_80_categories_in_91_columns():
    found = coco_label_map()
    assert (found.num_classes, found.num_categories) == (COLUMNS, 80) == (91, 80)
    assert [found.name(i) for i in (1, 18, 44, 65, 90)] == ["person", "dog", "bottle", "bed", "toothbrush"]
    assert [i for i in range(91) if found.category_id(i) is None] == [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]


def test_names_decide():
    found = compare(ANIMALS, PETS)
    assert (found.known, found.new, found.dropped) == (("dog", "cat"), ("fish",), ())
    assert compare(PETS, ANIMALS).dropped == ("fish",)


@pytest.mark.parametrize("no_object", [0, 1])
@pytest.mark.parametrize("width", [(), (5,)])
def test_rows_go_where_their_class_is(no_object, width):
    source, target = torch.randn(4 + no_object, *width), torch.randn(3 + no_object, *width)
    before = target.clone()
    moved = move_rows(source, ANIMALS, target, PETS)
    assert torch.equal(moved[0], source[3]) and torch.equal(moved[2], source[1])
    assert torch.equal(moved[1], target[1]) and torch.equal(target, before)
    if no_object:
        assert torch.equal(moved[3], source[4])


def test_the_first_row_of_proposals_means_an_object_whatever_its_column():
    source, target = torch.randn(4, 2), torch.randn(3, 2)
    moved = move_rows(source, ANIMALS, target, PETS, first_row_special=True)
    assert torch.equal(moved[0], source[0])  # and not the dog's
    assert torch.equal(moved[2], source[1]) and torch.equal(moved[1], target[1])
    back = move_rows(moved, PETS, source, ANIMALS, first_row_special=True)
    assert torch.equal(back, source)  # the dog, whose column was the first one there, keeps its own


def test_which_tensors_have_a_row_per_class():
    for name in ("heads.class_heads.0.weight", "heads.class_heads.11.bias", "query_source.class_head.bias"):
        assert is_class_row(name) and is_first_row_special(name) == name.startswith("query")
    assert is_class_row("denoising.label_embed.weight") and not is_first_row_special("denoising.label_embed.weight")
    for name in ("heads.box_heads.0.layers.0.weight", "query_source.box_head.layers.2.bias", "neck.levels.0.0.bias"):
        assert not is_class_row(name)


def test_what_proposals_say_is_what_their_config_says():
    def config(**settings):
        return {"detector": {"query_source": settings}}

    assert say_object(config()) and say_object(config(class_agnostic=True))
    assert not say_object(config(class_agnostic=False))
