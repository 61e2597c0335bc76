"""What a connector costs: training steps and answers of finished runs, in turn.

Train questions a second: steps of 256 questions, one an image (256 images) and eight an image (32), the rows taking
turns; medians with quartiles. An answer: the image encoded, the question read, the answer written, for one question
about an image alone and for eight about one image together, which in fp32 must give the same answers. Cache: the keys
and values held for one answer when its writing begins.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench import results, timing
from bench.sides import wait
from train import train_step
from vqa_scratch import systems
from vqa_scratch.data.vqa_v2 import VQASample, read_vqa
from vqa_scratch.errors import UserError
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.decoding import Decoder
from vqa_scratch.storage import read_object
from vqa_scratch.systems.answering import How
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import pick_device

QUESTIONS, TOGETHER = 256, 8  # of a training step; about one image
ASKED = 8  # images of a turn of answering
HEAD = ["train questions/s, 1 an image", f"{TOGETHER} an image", "ms an answer, 1 an image"]
HEAD += [f"{TOGETHER} an image", "cache kB an answer, 1 an image", f"{TOGETHER} an image"]


def by_image(samples: list[VQASample], images: int) -> list[VQASample]:
    """The first `TOGETHER` questions of each of the first images with so many. Raises UserError if too few have."""
    of: dict[int | str, list[VQASample]] = {}
    for sample in samples:
        of.setdefault(sample.image_id, []).append(sample)
    full = [some[:TOGETHER] for some in of.values() if len(some) >= TOGETHER][:images]
    if len(full) < images:
        raise UserError(f"{len(full)} images have {TOGETHER} questions, {images} are needed to time a connector")
    return [sample for some in full for sample in some]


@contextmanager
def caches_of(decoder: Decoder) -> Iterator[list[DecoderCache]]:
    """Inside, every cache that the decoder makes is also in the list."""
    made: list[DecoderCache] = []
    plain = decoder.new_cache

    def new_cache() -> DecoderCache:
        made.append(plain())
        return made[-1]

    decoder.new_cache = new_cache
    try:
        yield made
    finally:
        del decoder.new_cache


def bytes_held(cache: DecoderCache) -> int:
    """Bytes of the keys and values of a cache, of the tokens so far and of the memory."""
    tensors = [tensor for layer in cache for tensor in layer.contents]
    tensors += [tensor for layer in cache for part in layer.cross or () for tensor in (part.k, part.v)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass
class Side:
    """A finished run, ready to train and to answer."""

    folder: Path
    train: list[VQASample]
    asked: list[VQASample]
    texts: dict[int, list[str]] = field(default_factory=dict)  # what it answered, by questions an image
    held: dict[int, float] = field(default_factory=dict)  # bytes of cache an answer

    def __post_init__(self) -> None:
        self.device = pick_device("auto")
        kind = read_object(self.folder / "summary.json")["precision"]
        system = self.system = systems.load(self.folder, self.device, kind)
        system.model.freeze(system.options.freeze)
        self.batches = {}
        learned = system.split(self.train)
        for each in (1, TOGETHER):
            rows = np.concatenate([np.array(some[:each]) for some in learned.questions.of_image[: QUESTIONS // each]])
            self.batches[each] = learned.questions.batch(rows, learned.images).to(self.device)
        self.split = system.split(self.asked)
        names = ("learning_rate", "matrix_learning_rate", "weight_decay")
        rates = {name: getattr(system.options, name) for name in names}
        self.optimizers = Optimizers(system.model, kind=system.options.optimizer, **rates)
        system.trained_by(self.optimizers)

    def step(self, each: int) -> float:
        """Seconds of a training step with so many questions an image."""
        self.system.model.train()
        start = time.perf_counter()
        train_step(self.system.loss, self.batches[each], self.optimizers, self.system.precision)
        wait(self.device.type)
        return time.perf_counter() - start

    def answer(self, each: int) -> float:
        """Seconds to answer so many questions about each image, one image after the other."""
        system, questions, found, seconds, held = self.system, self.split.questions, [], 0.0, 0
        with caches_of(system.model.decoder) as caches:
            for of_image in questions.of_image:
                rows = np.array(of_image[:each])
                batch = questions.batch(rows, self.split.images).to(self.device)
                start = time.perf_counter()
                with system.evaluating(), system.precision.autocast():
                    answers = system.respond(questions, rows, batch, How())
                wait(self.device.type)
                seconds += time.perf_counter() - start
                found += [best.text for best, *_ in answers]
                held += sum(map(bytes_held, caches))
                caches.clear()
        self.texts[each], self.held[each] = found, held / len(found)
        return seconds

    def differing(self) -> int:
        """How many images' first question is answered otherwise alone than among the others."""
        alone, together = self.texts[1], self.texts[TOGETHER][::TOGETHER]
        return sum(a != b for a, b in zip(alone, together, strict=True))


class Cost(NamedTuple):
    """What one run costs, by questions an image."""

    rates: dict[int, timing.Spread]  # questions trained on a second
    waits: dict[int, timing.Spread]  # ms an answer
    held: dict[int, float]  # bytes of cache an answer
    differing: int  # of `ASKED` answers, those that change when others are asked beside them, by rounding


def measure(folders: Mapping[str, Path], data: Path, rounds: int) -> dict[str, Cost]:
    """The costs of runs by name. Raises UserError if one in fp32 answers otherwise alone than among others."""
    train = by_image(read_vqa(data, "train").samples, QUESTIONS)
    asked = by_image(read_vqa(data, "test").samples, ASKED)
    sides = {name: Side(folder, train, asked) for name, folder in folders.items()}
    taken: dict[str, dict[int, dict[str, list[float]]]] = {"answer": {}, "step": {}}  # a step changes the weights
    for what, by_each in taken.items():
        for each in (1, TOGETHER):
            turns = {name: partial(getattr(side, what), each) for name, side in sides.items()}
            timing.in_turn(turns, 1)  # the first one makes buffers and states
            by_each[each] = timing.in_turn(turns, rounds)
    costs = {}
    for name, side in sides.items():
        rates = {each: [QUESTIONS / seconds for seconds in by[name]] for each, by in taken["step"].items()}
        waits = {each: [1e3 * seconds / ASKED / each for seconds in by[name]] for each, by in taken["answer"].items()}
        spreads = ({each: timing.Spread.of(values) for each, values in of.items()} for of in (rates, waits))
        costs[name] = Cost(*spreads, side.held, side.differing())
        if costs[name].differing and side.system.precision.kind == "fp32":
            raise UserError(f"{name}: {costs[name].differing} of {ASKED} answers change with others beside them")
    return costs


def table(costs: Mapping[str, Cost], first: str = "connector") -> str:
    """The costs, and a line on answers that rounding changes; `first` is what a row is."""
    lines, changed = [], []
    for name, cost in costs.items():
        cells = [cost.rates[each].text(0) for each in (1, TOGETHER)]
        cells += [cost.waits[each].text(2) for each in (1, TOGETHER)]
        lines.append([name, *cells, *(f"{cost.held[each] / 1e3:.1f}" for each in (1, TOGETHER))])
        changed += [f"{cost.differing} of {ASKED} answers of {name}"] if cost.differing else []
    said = f"\n\n- Asked beside others, rounding changes {', '.join(changed)}." if changed else ""
    return results.table([first, *HEAD], lines) + said
