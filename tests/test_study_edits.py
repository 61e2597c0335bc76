"""Changes as data, tokens that are hidden, an answer without each head, and activation maps."""

import threading

import numpy as np
import pytest
import torch
from study_helpers import QUESTION_IDS, SUBJECTS, tiny_vqa, tiny_vqa_subject

from vqa_scratch.errors import UserError
from vqa_scratch.nn.memory import Memory
from vqa_scratch.study.activation import activations, filtered, has_activations, image_lens, without
from vqa_scratch.study.analysis import every_attention, relevancy
from vqa_scratch.study.answer import answered, probability, without_each_head
from vqa_scratch.study.edits import change_of, twins
from vqa_scratch.study.lens import key_parts, lens_taps, logit_attribution, logit_direction, logit_lens
from vqa_scratch.study.opened import Opened, chosen
from vqa_scratch.study.record import take_apart
from vqa_scratch.study.subject import VQASubject, WritingSubject
from vqa_scratch.study.trace import trace

WRITERS = ("tokens", "prefix", "resampler", "caption", "llava", "idefics")


def opened(subject, prompt=None):
    labels = tuple(f" word{i}" for i in range(30))
    return Opened("tiny", subject, "what?", None, prompt or tuple("p" * len(subject.prompt)), labels.__getitem__, str)


def changed(subject, *edits, other=None):
    one = opened(subject)
    subject.changes = tuple(change_of(one, edit, lambda source: opened(other)) for edit in edits)
    return one


def logits(subject, ids):
    with subject.trace(record=False), torch.no_grad():
        return subject.logits(ids)


def seen(subject):
    with subject.trace(*every_attention(subject), *(lens_taps(subject) if subject.has_lens else ())) as t:
        return t, subject.generate()


# ---------------------------------------------------------------------------------------------------- hidden tokens


@pytest.mark.parametrize("token", [1, 3])
def test_a_hidden_word_is_one_that_the_mask_leaves_out(token):
    """Everywhere: in the text encoder and in the decoder's cross-attention, as the mask of padding does."""
    subject = tiny_vqa_subject()
    changed(subject, {"kind": "source", "source": "text", "token": token})
    mask = torch.ones(1, len(QUESTION_IDS), dtype=torch.bool)
    mask[0, token] = False
    ids = [1, 5, 6]
    with torch.no_grad():
        expected = subject.model(subject.pixel_values, subject.input_ids, mask, torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(subject, ids), expected, atol=1e-5, rtol=0)
    assert (expected - subject.logits(ids)).abs().max() > 1e-3


def test_a_hidden_key_is_one_that_the_writer_alone_does_not_read():
    subject = tiny_vqa_subject()
    changed(subject, {"kind": "key", "key": 4})
    with torch.no_grad():
        given = subject.conditioning(3)
        image, text = given.memory
        kept = torch.arange(image.states.shape[1])[None] != 4
        memory = [Memory(image.states, kept), text]
        expected = subject.model.decoder.logits(
            subject.model.decoder.hidden(subject.model.decoder.embed(torch.tensor([[1, 5, 6]])), memory=memory)
        )[0]
    torch.testing.assert_close(logits(subject, [1, 5, 6]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tokens", "prefix", "qformer", "resampler", "vilt", "blip2", "llava", "t5", "pair"])
def test_nobody_reads_a_hidden_token_and_the_certificate_holds(name):
    subject = SUBJECTS[name]()
    source, token = subject.sources[0].name, len(subject.sources[0]) - 1
    one = changed(subject, {"kind": "source", "source": source, "token": token})
    found = take_apart(one)
    column = subject.where(source).start + token
    for attention in every_attention(subject):
        pattern = found.trace.pattern(attention)[0]
        shares = subject.shares(attention, pattern)
        assert shares.shape[-1] <= column or float(shares[..., column].abs().max()) == 0
        seen = pattern.sum(-1)[pattern.sum(-1) > 0]
        torch.testing.assert_close(seen, torch.ones_like(seen), atol=1e-5, rtol=0)
    assert found.certificate.worst <= 1e-5 and found.certificate.attentions == len(set(every_attention(subject)))
    assert all(float(flow.sources[:, column].abs().max()) <= 1e-6 for k, flow in found.flows.items() if k == "cross")


def test_what_is_averaged_before_it_is_read_cannot_be_hidden_alone():
    with pytest.raises(UserError, match="token 2 of image is averaged with others"):
        changed(tiny_vqa_subject("mean"), {"kind": "source", "source": "image", "token": 2})


def test_a_word_is_hidden_with_its_copy_in_the_prompt():
    model = tiny_vqa()
    words = ("[CLS]", "is", "it", "it", "[SEP]")
    subject = VQASubject(model, torch.randn(1, 3, 24, 24), [7, 8, 9, 1], [3, 7, 8, 8, 4], words, (0, 4))
    one = opened(subject, (" is", " it", " red", "[CLS]"))
    assert twins(one) == {"text": [None, 0, 1, None, None]}
    subject.changes = (change_of(one, {"kind": "source", "source": "text", "token": 2}, None),)
    t = take_apart(one).trace
    assert float(t.pattern("decoder.0.self")[..., 1].max()) == 0 and float(t.pattern("text.1.self")[..., 2].max()) == 0
    subject.changes = (change_of(one, {"kind": "source", "source": "decoder", "token": 1}, None),)
    t = take_apart(one).trace
    assert float(t.pattern("decoder.0.self")[..., 1].max()) == 0 < float(t.pattern("text.1.self")[..., 2].max())


# ---------------------------------------------------------------------------------------------------- other changes


@pytest.mark.parametrize("name", WRITERS)
def test_a_scaled_head_is_scaled_columns_of_the_output_projection(name):
    subject, ids = SUBJECTS[name](), None
    attention = subject.reading[-1]
    changed(subject, {"kind": "head", "name": attention, "head": 1, "scale": -0.5})
    ids = [*subject.prompt, 5, 6]
    found = logits(subject, ids)
    module = trace(subject.model).modules[attention]
    with torch.no_grad():
        module.out.weight[:, module.head_dim : 2 * module.head_dim] *= -0.5
        torch.testing.assert_close(found, subject.logits(ids), atol=1e-5, rtol=0)


def test_a_layer_is_one_part_or_the_whole_block():
    subject = tiny_vqa_subject()
    changed(subject, {"kind": "layer", "name": "decoder.1"})
    whole = logits(subject, [1, 5])
    parts = [{"kind": "layer", "name": f"decoder.1.{part}"} for part in ("self", "cross", "mlp")]
    changed(subject, *parts)
    assert torch.equal(whole, logits(subject, [1, 5]))


def test_a_silenced_head_has_no_relevancy():
    subject = tiny_vqa_subject()
    edits = [{"kind": "layer", "name": name} for name in subject.reading]
    changed(subject, *edits)
    ids = subject.generate()
    assert float(relevancy(subject, ids).sources.abs().max()) == 0


@pytest.mark.parametrize("name", ["image.1.resid_post", "decoder.1.resid_post"])
def test_patching_everything_that_is_read_is_the_other_input(name):
    model = tiny_vqa()
    subject, other = tiny_vqa_subject(model=model), tiny_vqa_subject(model=model)
    theirs = answered(opened(other))
    assert theirs.ids != answered(opened(subject)).ids
    ours = answered(changed(subject, {"kind": "patch", "name": name, "head": None, "from": {}}, other=other))
    assert ours.ids == theirs.ids and ours.probability == pytest.approx(theirs.probability, abs=1e-6)


def test_patching_one_head_leaves_the_others():
    model = tiny_vqa()
    subject, other = tiny_vqa_subject(model=model), tiny_vqa_subject(model=model)
    with trace(model, "decoder.0.cross.z") as before:
        subject.generate()
    with trace(model, "decoder.0.cross.z") as theirs:
        other.generate()
    changed(subject, {"kind": "patch", "name": "decoder.0.cross.z", "head": 2, "from": {}}, other=other)
    with subject.trace("decoder.0.cross") as t:
        subject.generate()
    first = t.calls("decoder.0.cross.z")[0]
    expected = before.calls("decoder.0.cross.z")[0].clone()
    expected[:, 2] = theirs.calls("decoder.0.cross.z")[0][:, 2]
    torch.testing.assert_close(first, expected, atol=1e-6, rtol=0)
    assert t.certificate().worst <= 1e-5


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"kind": "heads"}, "there is no edit of kind 'heads'; there are head, layer, source, key, patch"),
        ([], "an edit is a list, not an object"),
        ({"kind": "head", "name": "decoder.0.cross", "head": 4}, "decoder.0.cross has heads 0 to 3, not 4"),
        ({"kind": "head", "name": "decoder.9.cross", "head": 0}, "decoder has layers 0 to 1"),
        ({"kind": "head", "name": "decoder.0.cross", "head": 0, "scale": 1e9}, "is multiplied by at most 100"),
        ({"kind": "head", "name": "decoder.0.cross"}, "has no 'head'"),
        ({"kind": "layer", "name": "decoder.0.mpl"}, "did you mean 'decoder.0.mlp'"),
        ({"kind": "source", "source": "sound", "token": 0}, "there is no source 'sound' here; there are image, text"),
        ({"kind": "source", "source": "image", "token": 99}, "image has tokens 0 to 9, not 99"),
        ({"kind": "key", "key": -1}, "the writer reads keys 0 to 14, not -1"),
        ({"kind": "patch", "name": "decoder.0.cross.k", "from": {}}, "decoder.0.cross.k cannot be taken from another"),
        ({"kind": "patch", "name": "decoder.0.resid_mid", "head": 1, "from": {}}, "decoder.0.resid_mid has no heads"),
    ],
)
def test_a_change_that_cannot_be_made_is_said_in_a_line(edit, message):
    with pytest.raises(UserError) as error:
        changed(tiny_vqa_subject(), edit, other=tiny_vqa_subject())
    assert message in str(error.value)


def test_a_patch_needs_as_many_tokens_of_the_question():
    model = tiny_vqa("prefix")
    subject, other = (VQASubject(model, torch.randn(1, 3, 24, 24), prompt) for prompt in ([1, 5], [1, 5, 6]))
    with pytest.raises(UserError, match="its question has 12 tokens, this one 11"):
        changed(subject, {"kind": "patch", "name": "decoder.0.self.z", "from": {}}, other=other)


def test_threads_that_share_a_model_do_not_see_each_others_traces():
    model = tiny_vqa()
    subjects = [tiny_vqa_subject(model=model) for _ in range(4)]
    for head, subject in enumerate(subjects[1:]):
        changed(subject, {"kind": "head", "name": "decoder.0.cross", "head": head})
    expected = [logits(subject, [1, 5]) for subject in subjects]
    wrong, together = [], threading.Barrier(4)

    def run(place):
        together.wait()
        for _ in range(30):
            if not torch.equal(logits(subjects[place], [1, 5]), expected[place]):
                wrong.append(place)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------------------------------------------- answers


def test_an_answer_begins_with_what_is_chosen_and_goes_on_from_it():
    subject = tiny_vqa_subject()
    plain, told = answered(opened(subject)), []
    for token in plain.tokens:
        assert [one["id"] for one in token["alternatives"]][0] == token["id"] and len(token["alternatives"]) == 5
    other = plain.tokens[0]["alternatives"][1]["id"]
    subject.begin_with([other])
    found = answered(opened(subject), told.append)
    assert found.ids[0] == other and told == found.tokens
    whole = subject.logits(subject.prompt + found.ids[:-1])[len(subject.prompt) - 1 :].softmax(-1)
    assert found.ids[1:] == whole.argmax(-1).tolist()[1:]
    assert found.probability == pytest.approx(float(whole[range(len(found.ids)), found.ids].prod()), abs=1e-6)
    assert take_apart(opened(subject)).probability == pytest.approx(found.probability, abs=1e-6)
    with pytest.raises(UserError, match="an answer begins with at most 8 tokens from 0 to 29, not .30."):
        subject.begin_with([30])


def test_the_study_of_a_sampled_answer_has_its_probabilities():
    subject = tiny_vqa_subject()
    subject.decide_by(subject.own_options | {"do_sample": True, "temperature": 2.0, "seed": 3})
    found, again = answered(opened(subject)), answered(opened(subject))
    assert found == again
    assert [token.probability for token in take_apart(opened(subject)).tokens] == pytest.approx(
        [token["probability"] for token in found.tokens], abs=1e-6
    )


@pytest.mark.parametrize("name", ["tokens", "prefix", "vilt", "pair"])
def test_each_head_is_knocked_out_by_itself(name):
    one = opened(SUBJECTS[name]())
    subject, whole = one.subject, answered(one)
    found = list(without_each_head(one, subject.attentions, whole))
    assert len(found) == len(set(subject.attentions)) * 4 and subject.changes == ()
    for knocked in found[:: len(found) // 3]:
        changed(subject, {"kind": "head", "name": knocked.name, "head": knocked.head})
        now = answered(one)
        assert (now.answer, now.ids != whole.ids) == (knocked.answer, knocked.changed)
        if name != "pair":
            assert knocked.probability == pytest.approx(probability(one, whole.ids), abs=1e-6)
        subject.changes = ()


# ---------------------------------------------------------------------------------------------------- parts of a logit


@pytest.mark.parametrize("name", WRITERS)
def test_what_each_key_adds_sums_to_what_its_head_adds(name):
    subject = SUBJECTS[name]()
    t, ids = seen(subject)
    row, attention = len(subject.prompt) - 1, subject.reading[-1]
    keys = key_parts(subject, t, attention, row, logit_direction(subject, t, row, ids[0]))
    heads = logit_attribution(subject, t, row, ids[0]).heads[attention.rpartition(".")[2]][subject.layers - 1]
    torch.testing.assert_close(keys.sum(1), heads[: len(keys)], atol=1e-5, rtol=0)


def test_the_keys_of_a_scaled_head_sum_to_what_it_adds():
    subject = tiny_vqa_subject()
    changed(subject, {"kind": "head", "name": "decoder.1.cross", "head": 2, "scale": -0.5})
    t, ids = seen(subject)
    keys = key_parts(subject, t, "decoder.1.cross", 0, logit_direction(subject, t, 0, ids[0]))
    heads = logit_attribution(subject, t, 0, ids[0]).heads["cross"][1]
    torch.testing.assert_close(keys.sum(1), heads, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("name", ["tokens", "prefix", "resampler", "caption", "blip2"])
def test_activations_are_of_the_image_and_leave_the_first_word_as_it_is(name):
    subject = SUBJECTS[name]()
    t, ids = seen(subject)
    assert has_activations(subject)
    found = activations(subject, t, ids)
    assert found.raw.shape == found.flow.sources.shape and float(found.flow.sources.min()) >= 0
    image = torch.cat([torch.full((len(source),), source.of_image) for source in subject.sources])
    assert float(found.raw[:, ~image].abs().sum()) == 0 < float(found.raw.sum())
    assert float(found.earlier.triu(1).abs().sum()) == 0
    total = found.earlier.sum(1)
    assert torch.all((total - 1).abs().lt(1e-4) | total.eq(0))


def test_the_activation_of_a_prefix_is_the_logit_of_each_place():
    subject = SUBJECTS["prefix"]()
    t, ids = seen(subject)
    found = activations(subject, t, ids)
    states = t[f"decoder.{subject.layers - 1}.resid_post"][0, : subject.prefix]
    of_places = subject.readout(states[None])[0]
    first = len(subject.prompt) - 1
    expected = (of_places[:, ids[0]] - of_places.mean(-1)).clamp(min=0)
    torch.testing.assert_close(found.raw[first] @ subject.mixing.T, expected, atol=1e-5, rtol=0)


def test_what_is_taken_out_explains_best():
    one, other = torch.tensor([1.0, 2.0, 0.0, 4.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    tried = torch.linspace(0, 3, 3001)
    best = tried[((one - tried[:, None] * other) ** 2).sum(1).argmin()]
    torch.testing.assert_close(without(one, other), (one - best * other).clamp(min=0), atol=1e-2, rtol=0)
    torch.testing.assert_close(without(3 * other, other), torch.zeros(4))
    torch.testing.assert_close(without(one, torch.zeros(4)), one)


def test_the_filter_by_rank_equals_the_paper_window_by_window():
    subject = tiny_vqa_subject()
    maps = torch.rand(2, len(subject.mixing))
    result, (places, where) = filtered(subject, maps), subject.image
    for row in range(2):
        grid = maps[row, where].reshape(places.grid).numpy()
        padded = np.pad(grid, 1, mode="reflect")
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                window = np.sort(padded[i : i + 3, j : j + 3].flatten())
                weights = np.exp(-(np.arange(-4, 5) ** 2) / (2 * (window.std() / window.mean()) ** 2))
                expected = (window * weights).sum() / weights.sum()
                assert float(result[row, where].reshape(places.grid)[i, j]) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(result[:, len(subject.sources[0]) :], maps[:, len(subject.sources[0]) :])


@pytest.mark.parametrize("name", ["tokens", "prefix", "vilt", "caption", "qformer"])
def test_the_lens_of_image_tokens(name):
    subject = SUBJECTS[name]()
    t, _ = seen(subject)
    lens = image_lens(subject, t, str)
    assert len(lens.best) == len(lens.layers) and all(len(layer) == len(lens.tokens) for layer in lens.best)
    if name == "prefix":  # as the lens of the answer, at other places of the sequence
        subject.rows = lambda x: x
        chances, ids = logit_lens(subject, t)[:, : subject.prefix].max(-1)
        assert [[token[0][0] for token in layer] for layer in lens.best] == [[str(int(i)) for i in row] for row in ids]
        assert lens.best[1][3][0][1] == pytest.approx(float(chances[1, 3].exp()), abs=1e-6)
    assert image_lens(SUBJECTS["pair"](), t, str) is None and image_lens(SUBJECTS["t5"](), t, str) is None


def test_models_that_write_nothing_have_no_activations():
    assert not any(has_activations(SUBJECTS[name]()) for name in ("vilt", "pair", "t5"))
    assert not isinstance(SUBJECTS["vilt"](), WritingSubject) and chosen(("a",), "b")["label"](0) == "a"
