"""Episodes of fast binding: invented words that only the shots of a prompt bind to pictures.

A shot is a picture of one object and its name, "<image> dax"; the question is one more picture. What a dax is was drawn
for this episode alone, so it cannot be known, only read from the shots (Tsimpoukelli et al. 2021, "Multimodal
Few-Shot Learning with Frozen Language Models", 2106.13884, who took their words from how children are tested).

A word is never bound in training to the color-shape pairs of its own group; tests bind it to no others. The pairs that
training holds out (`scenes.HELD_OUT`) are in no group.

Shapes: E episodes, W words in each, S segments (the shots and the question).
"""

from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np

from vqa_scratch.data.contrasts import CLASSES, single_objects
from vqa_scratch.data.scenes import COLORS, HELD_OUT, SHAPES

WORDS = ("dax", "wug", "blick", "fep", "toma", "zib", "koba", "modi", "riff", "sarn", "gorp", "lum")
PAIRS = tuple(product(COLORS, SHAPES))
GROUPS = 3
SEEN = np.array([number for number, pair in enumerate(PAIRS) if pair not in HELD_OUT])  # (15,) drawn in training
UNSEEN = np.array([number for number, pair in enumerate(PAIRS) if pair in HELD_OUT])  # (3,)
GROUP_WORDS = np.arange(len(WORDS)).reshape(GROUPS, -1)  # (3, 4)
GROUP_OF_WORD = np.arange(len(WORDS)) // GROUP_WORDS.shape[1]
GROUP_PAIRS = SEEN.reshape(GROUPS, -1)  # (3, 5): in each are pairs that differ in color alone and in shape alone
GROUP_OF_PAIR = np.full(len(PAIRS), -1)
GROUP_OF_PAIR[GROUP_PAIRS] = np.arange(GROUPS)[:, None]

VOCABULARY = ("<image>", ".", *COLORS, *SHAPES, *WORDS)
IMAGE, STOP = 0, 1
FIRST_COLOR, FIRST_SHAPE, FIRST_WORD = (VOCABULARY.index(names[0]) for names in ((*COLORS,), SHAPES, WORDS))


@dataclass(frozen=True)
class Episodes:
    """What is said and shown in each segment; the last one is the question."""

    words: np.ndarray  # (E, W) numbers in WORDS
    pairs: np.ndarray  # (E, W) what they stand for, numbers in PAIRS
    order: np.ndarray  # (E, S) which of the episode's words a segment is about; the last one is the answer
    shown: np.ndarray  # (E, S) numbers in PAIRS

    @classmethod
    def of(cls, words: np.ndarray, pairs: np.ndarray, order: np.ndarray) -> "Episodes":
        """Episodes whose pictures show what the words stand for."""
        return cls(words, pairs, order, np.take_along_axis(pairs, order, 1))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, rows: slice) -> "Episodes":
        return Episodes(self.words[rows], self.pairs[rows], self.order[rows], self.shown[rows])

    def shuffled(self, rng: np.random.Generator) -> "Episodes":
        """The shots' pictures dealt anew among the shots of all episodes: they say nothing about the words."""
        shots = self.shown[:, :-1]
        dealt = rng.permutation(shots.ravel()).reshape(shots.shape)
        return replace(self, shown=np.concatenate([dealt, self.shown[:, -1:]], 1))

    def exchanged(self) -> "Episodes":
        """Each shot shows what its episode's next word stands for. Who reads the shots gives another answer."""
        shots = np.take_along_axis(np.roll(self.pairs, -1, 1), self.order[:, :-1], 1)
        return replace(self, shown=np.concatenate([shots, self.shown[:, -1:]], 1))

    def tokens(self, *, written: bool = False) -> np.ndarray:
        """(E, S * L) numbers in VOCABULARY: of a segment "<image> dax", or `written` "red circle dax red circle ."."""
        word = FIRST_WORD + np.take_along_axis(self.words, self.order, 1)
        color, shape = self.shown // len(SHAPES) + FIRST_COLOR, self.shown % len(SHAPES) + FIRST_SHAPE
        stop = np.full_like(word, STOP)
        segment = [color, shape, word, color, shape, stop] if written else [np.full_like(word, IMAGE), word]
        return np.stack(segment, -1).reshape(len(self), -1)

    def prompts(self, *, written: bool = False) -> np.ndarray:
        """The tokens before the answer."""
        return self.tokens(written=written)[:, : -4 if written else -1]


def draw_episodes(rng: np.random.Generator, number: int, segments: int, words: int = 2) -> Episodes:
    """Episodes to train on; each segment is about any of the words.

    The words are of one group and the pairs of the two others, or the other way round: so each word may stand for each
    of the pairs, and a pair that training never binds to a word does not give away that it is another's.
    """
    group, swap = rng.integers(GROUPS, size=(number, 1)), rng.integers(2, size=(number, 1))
    order = rng.integers(words, size=(number, segments))
    return Episodes.of(
        _some_of(rng, (group == GROUP_OF_WORD) == swap, words),
        SEEN[_some_of(rng, (GROUP_OF_PAIR[SEEN] == group) != swap, words)],
        order,
    )


def _some_of(rng: np.random.Generator, allowed: np.ndarray, number: int) -> np.ndarray:
    """(E, M) bool -> (E, number): different places in each row, drawn from those that are allowed."""
    return np.where(allowed, rng.random(allowed.shape), 1).argsort(1)[:, :number]


def orders(shots: int, words: int) -> list[tuple[int, ...]]:
    """Every order of the words in that many shots, no word more than once more often than another."""
    found = product(range(words), repeat=shots)
    return [order for order in found if np.ptp(np.bincount(order, minlength=words).astype(int)) <= 1]


def crossed_episodes(
    rng: np.random.Generator, shots: int, words: int = 2, *, blocks: int = 216, held_out: bool = False
) -> Episodes:
    """Episodes to test on, W * W in a block: the same text with every way of turning what the words stand for, and
    each of the words to answer.

    So a text has all answers equally often, with the shots' pictures or with the question's picture as well: only who
    relates them does better than one in W. Orders of shots and choices of words are equally frequent if their number
    divides `blocks`. With `held_out` the pairs are those that training never shows.
    """
    ways = list(product(product(range(GROUPS), combinations(range(GROUP_WORDS.shape[1]), words)), orders(shots, words)))
    names, stands_for, told = [], [], []
    for block in range(blocks):
        (group, which), order = ways[block % len(ways)]
        pairs = rng.permutation(UNSEEN if held_out else GROUP_PAIRS[group])[:words]
        for turn, asked in product(range(words), repeat=2):
            names.append(GROUP_WORDS[group, which])
            stands_for.append(np.roll(pairs, turn))
            told.append([*order, asked])
    return Episodes.of(np.array(names), np.array(stands_for), np.array(told))


class Pictures:
    """Pictures of a single large object, `each` of every color and shape; no two are alike."""

    def __init__(self, each: int, seed: int) -> None:
        drawn = [(image, CLASSES[number]) for image, number in single_objects(each, seed)]
        drawn = [
            (image, words) for image, words in drawn if words[0] == "large"
        ]  # shapes of small ones are hard to tell
        self.pixels = np.stack([np.asarray(image) for image, _ in drawn])  # (P, H, W, 3) uint8
        self.pair = np.array([PAIRS.index(words[1:]) for _, words in drawn])  # (P,)
        self.of_pair = np.stack([np.flatnonzero(self.pair == pair) for pair in range(len(PAIRS))])  # (18, each)

    def pick(self, rng: np.random.Generator, shown: np.ndarray) -> np.ndarray:
        """(E, S) pairs -> (E, S) pictures of them, none twice in an episode. Raises ValueError if there are too few."""
        (episodes, segments), many = shown.shape, self.of_pair.shape[1]
        if segments > many:
            raise ValueError(f"an episode of {segments} segments needs as many pictures of a pair, not {many}")
        number = rng.permuted(np.tile(np.arange(many), (episodes, 1)), axis=1)[:, :segments]
        return self.of_pair[shown, number]
