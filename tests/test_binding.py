"""Fast binding: an episode can be solved by relating its pictures and words alone, and the evaluation sees who does."""

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import binding as benchmark
from bench.binding import SHOTS, Plan, Seed, score
from bench.binding import tests as benchmark_tests
from bench.binding_episodes import (
    GROUP_OF_PAIR,
    GROUP_OF_WORD,
    PAIRS,
    SEEN,
    UNSEEN,
    VOCABULARY,
    WORDS,
    Pictures,
    crossed_episodes,
    draw_episodes,
    orders,
)
from bench.binding_report import run
from vqa_scratch.data.scenes import HELD_OUT
from vqa_scratch.errors import UserError


def bindings(episodes) -> Counter:
    return Counter(zip(episodes.words.ravel().tolist(), episodes.pairs.ravel().tolist(), strict=True))


def test_training_never_binds_what_the_tests_bind():
    drawn = bindings(draw_episodes(np.random.default_rng(0), 4000, 3))
    own_group = {(w, p) for w, p in product(range(len(WORDS)), SEEN) if GROUP_OF_WORD[w] == GROUP_OF_PAIR[p]}
    assert drawn.keys() == set(product(range(len(WORDS)), SEEN)) - own_group  # all the others, and they alone
    asked = bindings(crossed_episodes(np.random.default_rng(1), 4))
    assert asked.keys() == own_group
    held_out = bindings(crossed_episodes(np.random.default_rng(1), 4, held_out=True))
    assert {PAIRS[p] for _, p in held_out} == HELD_OUT and set(UNSEEN).isdisjoint(SEEN)


@pytest.mark.parametrize("words", [2, 4])
def test_training_gives_nothing_away_by_what_it_never_binds(words):
    """Every word of an episode might stand for every pair of it."""
    episodes = draw_episodes(np.random.default_rng(0), 2000, 3, words)
    assert not (GROUP_OF_WORD[episodes.words][:, :, None] == GROUP_OF_PAIR[episodes.pairs][:, None]).any()


def test_words_of_an_episode_stand_for_different_pairs_in_any_order():
    episodes = draw_episodes(np.random.default_rng(0), 2000, 5, words=3)
    for numbers in (episodes.words, episodes.pairs):
        assert (np.diff(np.sort(numbers)) > 0).all()
    frequency = np.bincount(episodes.order.ravel()) / episodes.order.size
    assert np.abs(frequency - 1 / 3).max() < 0.02  # four standard deviations of 10,000 draws
    repeats = (episodes.order[:, 1:] == episodes.order[:, :-1]).mean()
    assert abs(repeats - 1 / 3) < 0.02


@pytest.mark.parametrize(("shots", "words"), [(0, 2), (1, 2), (2, 2), (4, 2), (3, 3), (4, 4)])
def test_nothing_less_than_all_three_parts_gives_the_answer(shots, words):
    """The same text, with the shots' pictures or with the question's: each word is the answer equally often."""
    episodes = crossed_episodes(np.random.default_rng(0), shots, words, blocks=216)
    texts = [tuple(row) for row in np.concatenate([episodes.words, episodes.order[:, :-1]], 1).tolist()]
    shown = [tuple(row) for row in episodes.shown.tolist()]
    answers = episodes.order[:, -1].tolist()
    for known in (
        texts,
        [(text, pictures[:-1]) for text, pictures in zip(texts, shown, strict=True)],
        [(text, pictures[-1]) for text, pictures in zip(texts, shown, strict=True)],
    ):
        by_known = defaultdict(Counter)
        for what, answer in zip(known, answers, strict=True):
            by_known[what][answer] += 1
        for counts in by_known.values():
            assert set(counts) == set(range(words)) and len(set(counts.values())) == 1
    if words == 2:  # the choices of words and the orders divide 216
        said = np.take_along_axis(episodes.words, episodes.order[:, -1:], 1)
        assert len(set(np.bincount(said.ravel(), minlength=len(WORDS)))) == 1


def test_orders_are_as_even_as_they_can_be():
    assert orders(0, 2) == [()] and orders(1, 2) == [(0,), (1,)] and orders(2, 2) == [(0, 1), (1, 0)]
    assert len(orders(4, 2)) == 6 and len(orders(4, 4)) == 24 and len(orders(3, 2)) == 6


def test_the_text_of_an_episode():
    episodes = crossed_episodes(np.random.default_rng(0), 1)
    row = episodes[:1]
    words, pairs = [WORDS[word] for word in row.words[0, row.order[0]]], [PAIRS[pair] for pair in row.shown[0]]
    written = [token for word, pair in zip(words, pairs, strict=True) for token in (*pair, word, *pair, ".")]
    pictured = [token for word in words for token in ("<image>", word)]
    assert [VOCABULARY[token] for token in row.tokens(written=True)[0]] == written
    assert [VOCABULARY[token] for token in row.tokens()[0]] == pictured
    assert [VOCABULARY[token] for token in row.prompts(written=True)[0]] == written[:-4]
    assert [VOCABULARY[token] for token in row.prompts()[0]] == pictured[:-1]


def test_controls_change_the_shots_pictures_alone():
    episodes = crossed_episodes(np.random.default_rng(0), 4)
    shuffled, exchanged = episodes.shuffled(np.random.default_rng(1)), episodes.exchanged()
    for other in (shuffled, exchanged):
        assert (other.tokens() == episodes.tokens()).all() and (other.shown[:, -1] == episodes.shown[:, -1]).all()
    assert (np.sort(shuffled.shown[:, :-1].ravel()) == np.sort(episodes.shown[:, :-1].ravel())).all()
    assert (shuffled.shown != episodes.shown)[:, :-1].mean() > 0.8  # of 15 pairs, 1 in 15 is dealt to its like
    assert (exchanged.shown[:, :-1] == np.take_along_axis(episodes.pairs, 1 - episodes.order, 1)[:, :-1]).all()


def test_pictures_show_the_pair_and_none_is_shown_twice():
    pool, other = Pictures(8, seed=0), Pictures(8, seed=1)
    episodes = draw_episodes(np.random.default_rng(0), 200, 6)
    picked = pool.pick(np.random.default_rng(1), episodes.shown)
    assert (pool.pair[picked] == episodes.shown).all()
    assert all(len(set(row)) == len(row) for row in picked.tolist())
    assert (np.bincount(picked.ravel(), minlength=len(pool.pair))[pool.of_pair[SEEN]] > 0).all()
    seen = {image.tobytes() for image in pool.pixels}
    assert len(seen) == len(pool.pixels) and seen.isdisjoint(image.tobytes() for image in other.pixels)


# ------------------------------------------------------------------------------------------------ the benchmark

TINY = Plan(pictures=8, batch=4, width=16, layers=2, eye_steps=3, language_steps=3, steps=3, blocks=12, every=2)


def accuracies(answer, pool, words=2, kind="true", blocks=216):
    """Of an answerer at every number of shots, among the words of the episode."""
    made = benchmark_tests(replace(TINY, words=words, blocks=blocks), pool, seed=0)
    return [score(answer, *made[f"{kind} {shots}"])["chosen"] for shots in SHOTS]


def relates(pool):
    """Says the word of the shots whose picture is that of the question, and no word of another."""

    def answer(prompts, places):
        pairs = torch.from_numpy(pool.pair)[places]
        votes = torch.where(pairs[:, :-1] == pairs[:, -1:], 1.0, -1.0)
        return torch.zeros(len(prompts), len(VOCABULARY)).scatter_add(1, prompts[:, 1::2], votes)

    return answer


def of_what(known):
    """Says a word that depends on nothing but `known(prompts, places)`, at random."""

    def answer(prompts, places):
        rows = known(prompts, places).tolist()
        return torch.stack([torch.from_numpy(np.random.default_rng(row).random(len(VOCABULARY))) for row in rows])

    return answer


@pytest.fixture(scope="module")
def pool():
    return Pictures(8, seed=0)


@pytest.mark.parametrize("words", [2, 3])
def test_who_relates_pictures_and_words_is_right(pool, words):
    chance = pytest.approx(1 / words)
    expected = {2: [chance, 1, 1, 1], 3: [chance, None, None, 1]}[words]  # a word not shown yet may have to be guessed
    for found, right in zip(accuracies(relates(pool), pool, words), expected, strict=True):
        assert right is None or found == right
    if words == 2:
        assert accuracies(relates(pool), pool, kind="exchanged") == [0.5, 0, 0, 0]
    shuffled = accuracies(relates(pool), pool, words, "shuffled")
    assert all(abs(found - 1 / words) < 0.05 for found in shuffled), shuffled  # three standard deviations, 864 episodes


@pytest.mark.parametrize("which", ["the last", "the first", "text", "text and question", "text and shots"])
def test_who_knows_less_is_at_chance_exactly(pool, which):
    pairs = torch.from_numpy(pool.pair)

    def copies(prompts, places):
        return F.one_hot(prompts[:, 1::2][:, -1 if which == "the last" else 0], len(VOCABULARY)).double()

    known = {
        "text": lambda prompts, places: prompts,
        "text and question": lambda prompts, places: torch.cat([prompts, pairs[places[:, -1:]]], 1),
        "text and shots": lambda prompts, places: torch.cat([prompts, pairs[places[:, :-1]]], 1),
    }
    if which in known:
        assert accuracies(of_what(known[which]), pool) == [0.5] * 4
    else:
        made = benchmark_tests(TINY, pool, seed=0)
        scores = [score(copies, *made[f"true {shots}"]) for shots in SHOTS[1:]]
        assert {one["chosen"] for one in scores} == {0.5}
        assert scores[0]["last"] == 1 and scores[1]["last"] == (which == "the last")


def test_what_is_said_is_chosen_among_all_tokens(pool):
    def stops(prompts, places):
        return relates(pool)(prompts, places) + 9 * F.one_hot(torch.tensor(VOCABULARY.index(".")), len(VOCABULARY))

    made = benchmark_tests(TINY, pool, seed=0)["true 2"]
    assert score(stops, *made) == {"chosen": 1.0, "said": 0.0, "last": 0.5}
    assert score(relates(pool), *made) == {"chosen": 1.0, "said": 1.0, "last": 0.5}


def test_stages_train_what_they_should_and_are_not_repeated(tmp_path, monkeypatch):
    text = run(TINY, range(1), ["frozen", "trained"], tmp_path, tmp_path, "command")
    assert (tmp_path / "binding.png").stat().st_size and (tmp_path / "episode.png").stat().st_size
    seed = Seed(TINY, 0, tmp_path)
    monkeypatch.setattr(benchmark, "train", lambda *_: pytest.fail("a finished stage was trained again"))
    eyes, (language, _) = seed.eyes(), seed.language()
    for variant in ("frozen", "trained"):
        model, record = seed.few_shot(variant)
        for tower, trained in ((eyes, model.eyes), (language, model.language)):
            state = trained.state_dict()
            same = all(torch.equal(weight, state[name]) for name, weight in tower.state_dict().items())
            assert same == (variant == "frozen" or tower is eyes)
        assert all(gate != 0 for gate in np.ravel(model.gates()))
        assert (record["before"]["text"] == record["after"]["text"]) == (variant == "frozen")
        assert record["before"]["text before an image"] == record["before"]["text"]
        assert [look["step"] for look in record["history"]] == [0, 2, 3]
    assert run(TINY, range(1), ["frozen", "trained"], tmp_path, tmp_path, "command") == text
    assert "(goal 0.9)" in text and text.count("| exchanged") == 3
    with pytest.raises(UserError, match="is of another plan: give another --out"):
        Seed(replace(TINY, steps=4), 0, tmp_path).eyes()


def test_an_episode_needs_enough_pictures(pool):
    with pytest.raises(ValueError, match="an episode of 9 segments needs as many pictures of a pair, not 8"):
        pool.pick(np.random.default_rng(0), np.zeros((2, 9), int))
