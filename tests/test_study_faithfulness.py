"""Deletion, insertion, pointing and head ablation on tiny models, against what follows from their definitions."""

import contextlib

import numpy as np
import pytest
import torch
from helpers import centre
from study_helpers import (
    PATCHES,
    SUBJECTS,
    tiny_expert_subject,
    tiny_sparse_subject,
    tiny_t5_subject,
    tiny_vilt_subject,
    tiny_vqa,
    tiny_vqa_subject,
)

from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.vilt_images import ViltImageProcessor
from vqa_scratch.data.vqa_v2 import spread
from vqa_scratch.errors import UserError
from vqa_scratch.nn.experts import routings
from vqa_scratch.nn.states import Places
from vqa_scratch.study import faithfulness as measures
from vqa_scratch.study import trace
from vqa_scratch.study.analysis import Flow, flows
from vqa_scratch.study.base import Source
from vqa_scratch.study.faithfulness import (
    Curves,
    answer_probability,
    answer_rows,
    deletion_insertion,
    faithfulness,
    forced,
    head_ablation,
    patch_map,
    pointing,
)
from vqa_scratch.study.places import centred_in_box, intervals, share_in_box, token_of_pixel
from vqa_scratch.study.subject import VQASubject

IMAGES = ["tokens", "caption", "vilt", "blip2", "prefix", "patches", "qformer", "resampler", "llava", "idefics"]


@pytest.mark.parametrize("name", IMAGES)
def test_curves_begin_and_end_at_the_whole_and_the_empty_image(name):
    subject = SUBJECTS[name]()
    answer, places = subject.generate(2), subject.image[0]
    order = torch.randperm(PATCHES)
    curves = deletion_insertion(subject, answer, order, steps=3)
    pixels = subject.pixel_values
    blank = pixels.mean((2, 3), keepdim=True).expand_as(pixels)
    whole, empty = answer_probability(subject, torch.cat([pixels, blank]), answer).tolist()
    assert curves.fractions == pytest.approx([0, 1 / 3, 2 / 3, 1])
    # Sums in fp32 over six tokens and two layers, in another order in batches of another size.
    assert curves.deletion[0] == curves.insertion[-1] == pytest.approx(whole, rel=1e-5)
    assert curves.deletion[-1] == curves.insertion[0] == pytest.approx(empty, rel=1e-5)
    third = pixels.clone()  # the squares of the first three tokens of the order are gone
    for token in order[:3].tolist():
        (top, left), half = centre(places, *divmod(token, 3)), 4
        rows, columns = (
            slice(max(round(x - half - 0.01), 0), None if i == 2 else round(x + half - 0.01))
            for x, i in zip((top, left), divmod(token, 3), strict=True)
        )
        third[..., rows, columns] = blank[..., rows, columns]
    # In fp32 and in batches of another size: sums in another order.
    assert curves.deletion[1] == pytest.approx(float(answer_probability(subject, third, answer)), rel=1e-5)


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
    assert set(curves) == {"cross", "rollout", "relevancy", "random"}
    starts = {round(c.deletion[0], 5) for c in curves.values()}
    assert len(starts) == 1  # the whole image, whatever the order
    with pytest.raises(ValueError, match="no question"):
        faithfulness([])


def test_a_label_has_a_probability_of_its_own():
    subject = tiny_vilt_subject()
    expected = float(subject.logits([3]).detach()[0, 1].sigmoid())
    assert float(answer_probability(subject, subject.pixel_values, [1])) == pytest.approx(expected, rel=1e-5)


def test_a_token_is_drawn_around_its_centre():
    """Patches have their own squares; a token that looks at its patch's corner has half of them shifted out."""
    patches, corners = Places((3, 3), 4.0, 8), Places((3, 3), 0.5, 8)
    assert intervals(patches, 0, 24).tolist() == [[0, 8], [8, 16], [16, 24]]
    assert intervals(corners, 1, 24).tolist() == [[0, 4.5], [4.5, 12.5], [12.5, 20.5]]
    rows = torch.arange(24) // 8
    assert torch.equal(token_of_pixel(patches, (24, 24)), rows[:, None] * 3 + rows)
    assert token_of_pixel(corners, (24, 24))[:, 0].unique(return_counts=True)[1].tolist() == [
        4,
        8,
        12,
    ]  # the rest: last
    wide = Places((1, 4), 3.0, 6)
    assert token_of_pixel(wide, (6, 24))[5].tolist() == [i // 6 for i in range(24)]


def test_the_share_of_a_square_in_a_box_has_a_closed_form():
    patches, corners = Places((3, 3), 4.0, 8), Places((3, 3), 0.5, 8)
    half = share_in_box(
        patches, (24, 24), (4, 8, 20, 16)
    )  # half of the left token, all of the middle, half of the right
    assert half.view(3, 3).tolist() == [[0, 0, 0], [0.5, 1, 0.5], [0, 0, 0]]
    assert share_in_box(patches, (24, 24), (0, 0, 24, 24)).tolist() == [1] * 9
    assert share_in_box(patches, (24, 24), (8, 8, 16, 16)).nonzero().tolist() == [[4]]  # a shared edge is no overlap
    clipped = share_in_box(corners, (24, 24), (0, 0, 2.25, 24)).view(
        3, 3
    )  # 2.25 of the 4.5 pixels that are in the image
    assert clipped[0].tolist() == pytest.approx([0.5, 0, 0]) and clipped[2].tolist() == pytest.approx([0.5, 0, 0])
    # The box of an object of 10 x 10 pixels around a token's centre holds the whole square of that token.
    assert float(share_in_box(corners, (24, 24), (3.5, 3.5, 13.5, 13.5))[4]) == 1
    assert centred_in_box(corners, (0, 0, 9, 1)).view(3, 3).tolist() == [[True, True, False], [False] * 3, [False] * 3]
    # Brute force: a fine raster of points in each square.
    box, places = (3.3, 5.1, 17.9, 13.7), Places((3, 4), 1.5, 6)
    points = (torch.arange(2400) + 0.5) / 100
    token = [((points - 1.5) / 6 + 0.5).floor().long() for _ in range(2)]
    y, x = ((box[i] <= points) & (points < box[i + 2]) for i in (1, 0))
    counts = [torch.stack([(inside & (at == i)).sum() / ((at == i) & (points < size)).sum() for i in range(n)])
              for inside, at, n, size in zip((y, x), token, (3, 4), (18, 24), strict=True)]  # fmt: skip
    torch.testing.assert_close(share_in_box(places, (18, 24), box), torch.outer(*counts).flatten(), atol=1e-2, rtol=0)


class OneToken(VQASubject):
    """A subject that looks at one place alone: `token` has all of every map."""

    def __init__(self, token, places):
        source = Source("image", ("[class]", *map(str, range(9))), (0,), places)
        self.sources, self.prompt, self.end_ids = (source,), [1], (2,)
        self.pixel_values, self.token = torch.zeros(1, 3, 24, 24), token


def test_pointing_is_measured_in_pixels(monkeypatch):
    """A map of one token whose square half overlaps the box: half its mass, whatever the grid."""

    def alone(subject, *more, **options):
        weights = torch.zeros(1, 10)
        weights[0, 1 + subject.token] = 1
        return Flow(weights, torch.zeros(1, 1))

    for name in ("rollout", "relevancy"):
        monkeypatch.setattr(measures, name, alone)
    monkeypatch.setattr(measures, "cross_maps", lambda subject, t: alone(subject).sources.expand(1, 2, 1, 10))
    monkeypatch.setattr(measures, "trace", lambda model: contextlib.nullcontext())
    monkeypatch.setattr(OneToken, "generate", lambda subject: [5])
    monkeypatch.setattr(OneToken, "logits", lambda subject, ids: None)
    monkeypatch.setattr(OneToken, "model", None, raising=False)
    monkeypatch.setattr(OneToken, "reading", ["decoder.0.cross"])
    for places, box, mass, hit in (
        (
            Places((3, 3), 4.0, 8),
            (12, 8, 24, 16),
            0.5,
            1,
        ),  # the middle token: right half of its square, centre included
        (Places((3, 3), 4.0, 8), (13, 8, 24, 16), 3 / 8, 0),
        (Places((3, 3), 0.5, 8), (8.5, 0, 24, 24), 0.5, 1),
        (Places((3, 3), 0.5, 8), (0, 0, 8.5, 8.5), 0.25, 0),
    ):
        found = pointing([(OneToken(4, places), box)])
        assert set(found) == {"cross", "rollout", "relevancy", "cross layer 0", "best head, layer 0 head 0"}
        area = (box[2] - box[0]) * (box[3] - box[1]) / 24**2
        for one in found.values():
            assert (one.mass, one.area, one.hit) == pytest.approx((mass, area, hit)) and one.questions == 1
            assert one.ratio == pytest.approx(mass / area)
    corner = pointing([(OneToken(0, Places((3, 3), 0.5, 8)), (0, 0, 2.25, 24))])  # its square is clipped at the image
    assert corner["cross"].mass == pytest.approx(0.5) and corner["cross"].hit == 1


def test_pointing_names_the_blocks_that_read_the_image():
    found = pointing([(tiny_sparse_subject(), (0, 0, 10, 24))])
    assert {name for name in found if name.startswith("cross ")} == {"cross layer 0", "cross layer 2"}


@pytest.mark.parametrize("name", [*IMAGES, "pair", "probed pair"])
def test_pointing_measures_the_share_inside(name):
    subject = SUBJECTS[name]()
    left, right = (0, 0, 10, 24), (10, 0, 24, 24)
    found = pointing([(subject, left), (subject, right)])
    assert all(p.questions == 2 and p.area == pytest.approx(0.5) for p in found.values())
    # Over a box and the rest of the image the shares sum to 1, whatever the map.
    assert all(p.mass == pytest.approx(0.5, abs=1e-5) and p.ratio == pytest.approx(1, abs=1e-4) for p in found.values())
    assert sum(name.startswith("best head, layer ") for name in found) == 1
    one, answer = pointing([(subject, left)]), subject.generate()
    inside = share_in_box(subject.image[0], (24, 24), left)
    for method, flow in flows(subject, forced(subject, answer), answer).items():
        values = patch_map(subject, flow, answer_rows(subject, answer))
        assert one[method].mass == pytest.approx(float((values * inside).sum() / values.sum()), rel=1e-4)
        assert 0 < one[method].mass < 1
    with pytest.raises(ValueError, match="names one object"):
        pointing([])


def test_samples_are_spread_over_the_split():
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread([1, 2], 5) == [1, 2] and spread([], 5) == []


def test_boxes_follow_the_image_into_the_model():
    """Resized, cropped and padded as the pixels are: the box of a red square still holds the red pixels."""
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[20:40, 30:60] = (255, 0, 0)
    box = (30, 20, 60, 40)
    for processor in (
        ImageProcessor(size=(30, 50)),
        ImageProcessor(size=48, crop_size=(40, 32)),
        ImageProcessor(size=None, crop_size=(81, 101)),
        ViltImageProcessor(size=32, divisor=8),
    ):
        seen = processor.to_uint8(pixels)[..., 0] > 127
        rows, columns = seen.any(1).nonzero()[0], seen.any(0).nonzero()[0]
        found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert processor.box(box, 60, 100) == pytest.approx(found, abs=1)
    assert ImageProcessor(size=None, crop_size=(10, 10)).box((0, 0, 5, 5), 60, 100) == (0, 0, 0, 0)  # cropped away


def test_the_end_token_and_the_prompt_are_no_words_of_the_answer():
    subject = tiny_vqa_subject()
    assert answer_rows(subject, [5, 6, 2]) == [0, 1]
    assert answer_rows(subject, [2]) == [0]
    subject.prompt = [7, 8, 1]
    assert answer_rows(subject, [5, 2]) == [2]
    assert subject.image[1] == slice(1, 10)
    with pytest.raises(ValueError, match="no image"):
        tiny_t5_subject().image  # noqa: B018
    assert answer_rows(tiny_vilt_subject(), [2]) == [0] and tiny_vilt_subject().image[1] == slice(6, 15)


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
    with pytest.raises(ValueError, match="means no attention and no router"):
        head_ablation(model, score, "decoder.0.mlp")
    with trace(model, record=False):
        pass  # nothing was left active


def test_an_expert_that_matters_is_found_like_a_head():
    """Of four experts those whose weights are 0, or that no token chooses, change nothing; the others do."""
    subject = tiny_expert_subject()
    mixture = subject.model.decoder.blocks[1].mlp
    with torch.no_grad():
        for number in (0, 3):
            mixture.experts[str(number)].down.weight.zero_()
        with routings(subject.model) as found:
            before = subject.logits([1, 5, 6, 7])

    def score():
        with torch.no_grad():
            return 1.0 if torch.allclose(subject.logits([1, 5, 6, 7]), before, atol=1e-6) else 0.0

    base, effects = head_ablation(subject.model, score, "decoder.1.router")
    matters = [float(load > 0 and number in (1, 2)) for number, load in enumerate(found[1].load)]
    assert base == 1 and [e.drop for e in sorted(effects, key=lambda e: e.head)] == matters and sum(matters)
    assert {(effect.name, effect.part) for effect in effects} == {("decoder.1.router", "expert")}
    assert {e.part for e in head_ablation(subject.model, score, "decoder.1.*")[1]} == {"head", "expert"}
