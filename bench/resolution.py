"""Images of any size: the connector `patches` at sizes it was never trained on, with and without its newline tokens.

Scenes of the built-in data set are pasted into canvases, so that the same pixels and questions come in several sizes.
A patch is one of the scene's cells, 16 x 16 pixels. Scored are the questions whose answers do not change with the place
in the canvas; "where", whose answer is made for each canvas, is trained on too, since relations are not learned without
it, and has a column of its own. The words of questions are labels too in the first third of the steps, without which a
decoder that reads patches looks late, and with which it learns no relations. Both models see the same batches.

Shapes: I images, B questions, V vocabulary.
"""

import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import results, timing
from train import train_step
from vqa_scratch.connectors import connect
from vqa_scratch.data.batches import Batch, Questions
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.scenes import CELL, FAMILIES, FAMILY_OF_TYPE, QuestionWriter, Scene, draw_scene, render
from vqa_scratch.data.text import train_bpe
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.models.llama import Llama, LlamaConfig
from vqa_scratch.models.patches import PixelPatches, PixelPatchesConfig
from vqa_scratch.models.vqa import VQAModel, labelled_loss
from vqa_scratch.systems.scoring import QuestionOnly
from vqa_scratch.training.optimizers import Optimizers, schedule
from vqa_scratch.training.precision import Precision

Size = tuple[int, int]  # (height, width), in cells
SIDES = (3, 4, 5)
TRAINED = [(h, w) for h in SIDES for w in SIDES if (h, w) != (5, 5)]
USUAL, NEVER = (4, 4), [(4, 6), (6, 4), (5, 5)]
LEFT_OUT = "closest"  # as hard in a pasted scene as in another, and not what is asked here
PLACES = [f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right")]
QUESTIONS, IMAGES, TESTED = 6, 32, 600  # of a scene; of a step; scenes to test on
GOAL = 0.05
WORDS = 1 / 3  # of the steps, in which the words of questions are labels


@dataclass(frozen=True)
class Drawn:
    """A scene as it is drawn, (64, 64, 3), and the rows of its questions: each one, or four where the answer depends on
    the canvas, which is where object `about` is (-1: it does not)."""

    scene: Scene
    pixels: np.ndarray
    rows: list[list[int]]
    about: list[int]

    @property
    def cells(self) -> tuple[int, int, int, int]:
        """(top, left, bottom, right): the cells that its objects take, the last two exclusive."""
        ys, xs = zip(*((thing.y // CELL, thing.x // CELL) for thing in self.scene), strict=True)
        return min(ys), min(xs), max(ys) + 1, max(xs) + 1

    def fits(self, size: Size) -> bool:
        top, left, bottom, right = self.cells
        return bottom - top <= size[0] and right - left <= size[1]

    def paste(self, size: Size, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
        """Its objects somewhere in a canvas of that size: pixels (height, width, 3), and the rows of its questions."""
        top, left, bottom, right = self.cells
        part = self.pixels[top * CELL : bottom * CELL, left * CELL : right * CELL]
        ground = np.bincount(self.pixels[..., 2].ravel()).argmax()  # the scene's own
        canvas = np.full((size[0] * CELL, size[1] * CELL, 3), ground, np.uint8)
        y = CELL * int(rng.integers(size[0] - (bottom - top) + 1))
        x = CELL * int(rng.integers(size[1] - (right - left) + 1))
        canvas[y : y + part.shape[0], x : x + part.shape[1]] = part
        asked = []
        for rows, about in zip(self.rows, self.about, strict=True):
            thing = self.scene[about]
            below = 2 * (thing.y + y - top * CELL) >= canvas.shape[0]
            right_of = 2 * (thing.x + x - left * CELL) >= canvas.shape[1]
            asked.append(rows[0] if about < 0 else rows[2 * below + right_of])
        return canvas, asked


def draw(number: int, seed: int) -> tuple[list[Drawn], list[VQASample]]:
    """Scenes, each with `QUESTIONS` questions, and a sample for each question and answer."""
    rng = random.Random(seed)
    writer = QuestionWriter(rng)
    drawn: list[Drawn] = []
    samples: list[VQASample] = []
    while len(drawn) < number:
        scene = draw_scene(rng)
        asked = [q for q in writer.write(scene, len(FAMILIES)) if q.family != LEFT_OUT][:QUESTIONS]
        if len(asked) < QUESTIONS:
            continue
        rows: list[list[int]] = []
        for question in asked:
            kind, answers = FAMILIES[question.family], PLACES if question.family == "where" else [question.answer]
            rows.append(list(range(len(samples), len(samples) + len(answers))))
            for row, answer in zip(rows[-1], answers, strict=True):
                of_image = len(drawn), Path(str(len(drawn))), row
                samples.append(VQASample(*of_image, question.text, *kind, (answer,) * 10, answer))
        about = [q.about[0] if q.family == "where" else -1 for q in asked]
        drawn.append(Drawn(scene, np.asarray(render(scene, rng)), rows, about))
    return drawn, samples


class Pictures:
    """What `Questions.batch` takes the images of a batch from."""

    def __init__(self, canvases: list[np.ndarray]) -> None:
        self.canvases = canvases

    def batch(self, positions: np.ndarray) -> Tensor:
        return torch.from_numpy(np.stack(self.canvases))


def batch_of(
    scenes: list[Drawn], questions: Questions, size: Size, rng: np.random.Generator, *, words: bool = False
) -> Batch:
    """A batch of scenes pasted into canvases of this size; with `words` those of the questions are labels too."""
    pasted = [scene.paste(size, rng) for scene in scenes]
    rows = np.array([row for _, asked in pasted for row in asked])
    return questions.batch(rows, Pictures([canvas for canvas, _ in pasted]), words=words)


def model_of(tokenizers: Tokenizers, newlines: bool, width: int, layers: int) -> VQAModel:
    """Patches and a Llama, whose rotary positions know no longest text. A table of positions could begin as the places
    of an image, but only of one width."""
    words = tokenizers.decoder
    image = PixelPatches(PixelPatchesConfig(CELL))
    sizes = {"vocab_size": len(words), "dim": width, "layers": layers, "heads": 4, "hidden": 2 * width, "tied": True}
    decoder = Llama(LlamaConfig(**sizes, bos_id=words.bos_id, eos_id=words.eos_id))
    return VQAModel(image, None, connect({"kind": "patches", "newlines": newlines}, image, None, decoder), decoder)


@dataclass
class Experiment:
    """Scenes to train on and to test on, and their questions as ids."""

    steps: int
    width: int
    layers: int
    scenes: int
    seed: int = 0

    def __post_init__(self) -> None:
        (self.train, samples), (self.test, others) = draw(self.scenes, self.seed), draw(TESTED, self.seed + 1)
        texts = {f" {text}" for sample in samples for text in (sample.question, sample.answer)}
        words = train_bpe(sorted(texts), 512)
        limits = {"max_question_tokens": 32, "max_answer_tokens": 8, "question_prompt": True}
        self.tokenizers = Tokenizers(None, words, **limits)
        self.questions = [Questions(some, self.tokenizers) for some in (samples, others)]
        self.normalize = ImageProcessor(size=None).normalize
        self.blind = QuestionOnly(samples)

    def trained(self, newlines: bool) -> VQAModel:
        """A model after its steps, which both models make with the same batches."""
        torch.manual_seed(self.seed)
        model = model_of(self.tokenizers, newlines, self.width, self.layers).train()
        rates = {"learning_rate": 2e-3, "matrix_learning_rate": 0.02, "weight_decay": 0.1}
        optimizers, began = Optimizers(model, kind="muon", **rates), time.perf_counter()

        def loss(batch: Batch) -> tuple[Tensor, Tensor]:
            hidden = self.hidden(model, batch)
            return labelled_loss(hidden, model.decoder.head, batch.labels)

        precision = Precision("fp32", torch.device("cpu"))
        for step, batch in enumerate(self.batches()):
            optimizers.set_factor(schedule(step, step / self.steps, 50, 0.4))
            value, right, _ = train_step(loss, batch, optimizers, precision)
            if step % 100 == 99:
                passed = time.perf_counter() - began
                print(f"step {step + 1}, {passed:.0f} s: loss {value:.3f}, {right:.3f} of the tokens", file=sys.stderr)
        return model.eval()

    def batches(self) -> Iterator[Batch]:
        rng = np.random.default_rng(self.seed)
        fitting = {size: [scene for scene in self.train if scene.fits(size)] for size in TRAINED}
        for step in range(self.steps):
            size = TRAINED[rng.integers(len(TRAINED))]
            chosen = rng.choice(len(fitting[size]), IMAGES, replace=False)
            words = step < self.steps * WORDS
            yield batch_of([fitting[size][i] for i in chosen], self.questions[0], size, rng, words=words)

    def hidden(self, model: VQAModel, batch: Batch) -> Tensor:
        image = model.image.states(self.normalize(batch.images))
        return model.hidden(image, None, batch.decoder_input_ids, batch.image_index)

    @torch.no_grad()
    def score(self, model: VQAModel, size: Size) -> dict[str, float]:
        """Share of the test questions answered word for word: of all but "where", of relations, and of "where".

        A written answer is right if and only if each of its tokens is the likeliest after the right ones before it.
        """
        rng, fitting = np.random.default_rng(self.seed), [scene for scene in self.test if scene.fits(size)]
        right: dict[str, list[bool]] = {}
        for start in range(0, len(fitting), IMAGES):
            batch = batch_of(fitting[start : start + IMAGES], self.questions[1], size, rng)
            said = F.linear(self.hidden(model, batch), model.decoder.head).argmax(-1)
            fine = ((said == batch.labels) | (batch.labels < 0)).all(1)
            for row, ok in zip(batch.rows.tolist(), fine.tolist(), strict=True):
                family = FAMILY_OF_TYPE[self.questions[1].samples[row].question_type]
                right.setdefault(family, []).append(ok)
        all_but = [ok for family, some in right.items() for ok in some if family != "where"]
        return {"all": float(np.mean(all_but)), **{name: float(np.mean(right[name])) for name in ("relation", "where")}}

    def blindly(self) -> float:
        """Share of the test questions, "where" left out, that the question alone answers."""
        asked = [s for s in self.questions[1].samples if FAMILY_OF_TYPE[s.question_type] != "where"]
        return float(np.mean([self.blind(sample) == sample.answer for sample in asked]))


def run(experiment: Experiment, command: str) -> str:
    """Train both models; returns the section of the results file."""
    rows = []
    for newlines in (True, False):
        model = experiment.trained(newlines)
        scores = {size: experiment.score(model, size) for size in (USUAL, *NEVER)}
        usual = scores[USUAL]["all"]
        for size, score in scores.items():
            pixels = " x ".join(str(side * CELL) for side in size)
            fall = "" if size == USUAL else f"{usual - score['all']:+.3f}"
            if newlines and size != USUAL:
                fall += f" (goal at most {GOAL})"
            told = f"{pixels}{'' if size == USUAL else ', never trained'}"
            figures = [f"{score[name]:.3f}" for name in ("all", "relation", "where")]
            rows.append([f"{'with' if newlines else 'without'} newlines", told, figures[0], fall, *figures[1:]])
    seen, sides = experiment.steps * IMAGES * QUESTIONS, ", ".join(str(side * CELL) for side in SIDES)
    head = ["model", "height x width", "right", "fall", "relations", "where"]
    lines = [
        "## Images of sizes never trained on",
        "",
        __doc__.split("\n\n")[1].replace("\n", " "),
        f"Trained on canvases of {sides} pixels a side, all pairs but the largest.",
        "",
        results.table(head, rows),
        "",
        f"- {seen:,} questions each; a Llama of width {experiment.width} and {experiment.layers} layers; the question "
        f"alone: {experiment.blindly():.3f}.",
        f"- {timing.machine('cpu')}. torch {torch.__version__}. Commit {timing.commit(Path(__file__).parent)}. "
        f"`{command}`",
    ]
    return "\n".join(lines)
