"""Deletion, insertion, pointing and head ablation on tiny models, against what follows from their definitions."""

import pytest
import torch
from study_helpers import PATCHES, tiny_t5_subject, tiny_vqa, tiny_vqa_subject

from vqa_scratch.errors import UserError
from vqa_scratch.study import trace
from vqa_scratch.study.faithfulness import (
    METHODS,
    Curves,
    answer_probability,
    answer_rows,
    deletion_insertion,
    faithfulness,
    flows,
    head_ablation,
    image_source,
    patch_map,
    patches_of_box,
    pointing,
)


def test_curves_begin_and_end_at_the_whole_and_the_empty_image():
    subject = tiny_vqa_subject()
    answer = subject.generate(2)
    order = torch.randperm(PATCHES)
    curves = deletion_insertion(subject, answer, order, steps=3)
    pixels = subject.pixel_values
    blank = pixels.mean((2, 3), keepdim=True).expand_as(pixels)
    whole, empty = answer_probability(subject, torch.cat([pixels, blank]), answer).tolist()
    assert curves.fractions == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert curves.deletion[0] == curves.insertion[-1] == pytest.approx(whole)
    assert curves.deletion[-1] == curves.insertion[0] == pytest.approx(empty)
    third = pixels.clone()  # the first three patches of the order are gone
    for patch in order[:3].tolist():
        row, column = divmod(patch, 3)
        third[..., row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = blank[..., :8, :8]
    assert curves.deletion[1] == pytest.approx(float(answer_probability(subject, third, answer)))


def test_probability_is_the_product_over_tokens():
    subject = tiny_vqa_subject()
    logits = subject.logits([1, 5, 6]).detach().log_softmax(-1)
    expected = float((logits[0, 5] + logits[1, 6] + logits[2, 2]).exp())
    assert float(answer_probability(subject, subject.pixel_values, [5, 6, 2])) == pytest.approx(expected, rel=1e-4)


def test_area_is_by_trapezoids():
    assert Curves.area([1.0, 0.5, 0.0]) == pytest.approx(0.5)
    assert Curves.area([0.0, 0.0, 1.0]) == pytest.approx(0.25)


def test_faithfulness_covers_every_method_and_random_order():
    model = tiny_vqa()
    curves = faithfulness([tiny_vqa_subject(model=model) for _ in range(2)], steps=3, random_orders=2)
    assert set(curves) == {*METHODS, "random"}
    starts = {round(c.deletion[0], 5) for c in curves.values()}
    assert len(starts) == 1  # the whole image, whatever the order
    with pytest.raises(ValueError, match="no question"):
        faithfulness([])


def test_a_box_touches_the_patches_it_overlaps():
    grid = patches_of_box((8, 0, 17, 8), (24, 24), (3, 3)).view(3, 3)
    assert grid.tolist() == [[False, True, True], [False, False, False], [False, False, False]]
    assert patches_of_box((0, 0, 24, 24), (24, 24), (3, 3)).all()
    exact = patches_of_box((8, 8, 16, 16), (24, 24), (3, 3)).nonzero().flatten()
    assert exact.tolist() == [4]  # a shared edge is no overlap


def test_pointing_measures_the_share_inside():
    subject = tiny_vqa_subject()
    inside = torch.zeros(PATCHES, dtype=torch.bool)
    inside[4:6] = True
    found = pointing([(subject, inside), (subject, ~inside)])
    assert all(p.questions == 2 and p.area == pytest.approx(0.5) for p in found.values())
    # Over a set and its complement the shares sum to 1, whatever the map.
    assert all(p.mass == pytest.approx(0.5, abs=1e-5) and p.ratio == pytest.approx(1, abs=1e-4) for p in found.values())
    assert sum(name.startswith("best head, layer ") for name in found) == 1
    one = pointing([(subject, inside)])
    answer = subject.generate()
    for name, flow in flows(subject, answer).items():
        values = patch_map(subject, flow, answer_rows(subject, answer))
        assert one[name].mass == pytest.approx(float(values[inside].sum() / values.sum()), rel=1e-4)
    with pytest.raises(ValueError, match="names one object"):
        pointing([])


def test_the_end_token_and_the_prompt_are_no_words_of_the_answer():
    subject = tiny_vqa_subject()
    assert answer_rows(subject, [5, 6, 2]) == [0, 1]
    assert answer_rows(subject, [2]) == [0]
    subject.prompt = [7, 8, 1]
    assert answer_rows(subject, [5, 2]) == [2]
    assert image_source(subject)[1] == slice(1, 10)
    with pytest.raises(ValueError, match="no image"):
        image_source(tiny_t5_subject())


def test_head_ablation_finds_the_head_that_matters():
    model = tiny_vqa()
    subject = tiny_vqa_subject(model=model)
    with torch.no_grad():  # all but one head of one layer lead nowhere
        model.decoder.blocks[0].cross.out.weight[:, 4:] = 0
    before = subject.logits([1])

    def score():
        with torch.no_grad():
            return 1.0 if torch.allclose(subject.logits([1]), before, atol=1e-4) else 0.0

    base, effects = head_ablation(model, score, "decoder.0.cross")
    assert base == 1 and [e.head for e in effects if e.drop == 1] == [0] and len(effects) == 4
    assert effects[0].head == 0 and effects[0].name == "decoder.0.cross"
    with pytest.raises(UserError, match="did you mean"):
        head_ablation(model, score, "decoder.0.crss")
    with trace(model, record=False):
        pass  # nothing was left active
