"""Fast binding: an episode can be solved by relating its pictures and words alone, and the evaluation sees who does."""

from collections import Counter, defaultdict
from itertools import product

import numpy as np
import pytest

from vqa_scratch.data.binding import (
    AFTER,
    GROUP_OF_PAIR,
    GROUP_WORDS,
    IMAGE,
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
from vqa_scratch.data.scenes import HELD_OUT

GROUP_OF_WORD = np.arange(len(WORDS)) // GROUP_WORDS.shape[1]


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
    row = episodes.take(slice(0, 1))
    said, shown = row.words[0, row.order[0]], row.shown[0]
    shot, question = (
        [*PAIRS[pair], "this", "is", "a", WORDS[word], "."] for word, pair in zip(said, shown, strict=True)
    )
    assert [VOCABULARY[token] for token in row.tokens(written=True)[0]] == [*shot, *question]
    assert [VOCABULARY[token] for token in row.tokens()[0]] == ["<image>", *shot[2:], "<image>", *question[2:]]
    assert (episodes.tokens()[:, -AFTER - 1] == VOCABULARY.index("a")).all()
    assert ((episodes.tokens() == IMAGE).sum(1) == 2).all()


def test_controls_change_the_shots_pictures_alone():
    episodes = crossed_episodes(np.random.default_rng(0), 4)
    shuffled, exchanged = episodes.shuffled(np.random.default_rng(1)), episodes.exchanged()
    for other in (shuffled, exchanged):
        assert (other.tokens() == episodes.tokens()).all() and (other.shown[:, -1] == episodes.shown[:, -1]).all()
    assert (np.sort(shuffled.shown[:, :-1].ravel()) == np.sort(episodes.shown[:, :-1].ravel())).all()
    assert (shuffled.shown != episodes.shown)[:, :-1].mean() > 0.8  # of 15 pairs, 1 in 15 is dealt to its like
    assert (exchanged.shown[:, :-1] == np.take_along_axis(episodes.pairs, 1 - episodes.order, 1)[:, :-1]).all()


def test_pictures_show_the_pair_and_none_is_shown_twice():
    pool, other = Pictures(4, seed=0), Pictures(4, seed=1)
    episodes = draw_episodes(np.random.default_rng(0), 200, 6)
    picked = pool.pick(np.random.default_rng(1), episodes.shown)
    assert (pool.pair[picked] == episodes.shown).all()
    assert all(len(set(row)) == len(row) for row in picked.tolist())
    assert (np.bincount(picked.ravel(), minlength=len(pool.pair))[pool.of_pair[SEEN]] > 0).all()
    seen = {image.tobytes() for image in pool.pixels}
    assert len(seen) == len(pool.pixels) and seen.isdisjoint(image.tobytes() for image in other.pixels)
