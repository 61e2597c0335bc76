"""The entry points that `fuzz.py` throws mutated inputs at: for each, what a program does with its files.

A use is a call of the function behind a program or command, in this process; it must end, or raise what the programs
turn into one line.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fuzz_mutations import LONG
from fuzz_valid import FP32, QUESTION, SYSTEMS, WORDS, Valid
from run_helpers import command
from vqa_helpers import CPU

import rlhf
import train
from vqa_scratch import systems
from vqa_scratch.commands import scores
from vqa_scratch.commands.study_files import open_input
from vqa_scratch.data import text as texts
from vqa_scratch.data.image_files import load_image
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.vqa_v2 import read_vqa
from vqa_scratch.models import CLIP
from vqa_scratch.models.classifier import TextClassifier
from vqa_scratch.rl import options as rl_options
from vqa_scratch.rl.rewards import ClassifierReward
from vqa_scratch.rl.tasks import summarising_task
from vqa_scratch.rl.types import Samples
from vqa_scratch.study.record import take_apart
from vqa_scratch.study.splits import pointing_figures
from vqa_scratch.systems.clip_texts import classify, embed_labels
from vqa_scratch.systems.options import CaptionOptions, VQAOptions
from vqa_scratch.zero_shot import open_zero_shot

LABELS = ("--labels", "red circle,blue square,<b>&", "--template", "a {}", "--template", "the {} \U0001f642")


@dataclass(frozen=True)
class Place:
    """An entry point: its valid files, which of them are changed (glob patterns), and what is done with them."""

    name: str
    folder: Path
    changed: tuple[str, ...]
    use: Callable[[Path, random.Random], Any]
    weight: float = 1.0


def no_pictures(*_: Any, **__: Any) -> None:
    """In place of what draws curves, which says nothing about inputs and takes half a second."""


class Places(Valid):
    """Valid files below `root`, and the places that read them."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.opened = {name: systems.load(folder) for name, folder in self.plain.items()}

    # ------------------------------------------------------------------------------------------------ uses

    def ask(self, folder: Path, rng: random.Random) -> None:
        """A run is opened and asked; now and then also studied or exported."""
        system = systems.load(folder)
        top = rng.choice((None, None, 2)) if system.options.preset != "caption" else None
        system.ask(self.picture, QUESTION, top)
        if rng.random() < 0.15:
            take_apart(open_input(folder, self.picture, QUESTION, None, "cpu"))
        if rng.random() < 0.15:
            command("export", folder, folder / "exported")

    def seek(self, folder: Path, rng: random.Random) -> None:
        """A contrastive run is opened and seeks; now and then it is also exported."""
        sought = rng.choice((("--text", "a red circle"), ("--image", self.picture), ("--image", self.picture, *LABELS)))
        command("retrieve", folder, *sought)
        if rng.random() < 0.15:
            command("export", folder, folder / "exported")

    def go_on(self, name: str) -> Callable[[Path, random.Random], None]:
        """A finished run of `train.py` is resumed, which writes its last figures again."""
        return lambda folder, _: train.main(train.read_command_line([*self.flags(name, folder), "--resume"]))

    def tune_on(self, folder: Path, _: random.Random) -> None:
        rlhf.run([*self.book_flags(self.articles / "news.csv", folder), "--resume"])

    def study_tuned(self, folder: Path, _: random.Random) -> None:
        command("study", folder, "--text", self.articles / "news.txt", "--out", folder / "study")

    def learn(self, folder: Path, rng: random.Random) -> None:
        """A data folder is read, a system built on it, and its first batch and its evaluation done."""
        name = rng.choice(SYSTEMS)
        system, data = built(train.read_command_line(self.flags(name, folder / "run", folder)))
        system.train_on(data)
        system.loss(system.batch(system.epoch(0)[0]))
        system.evaluate()

    def score(self, folder: Path, rng: random.Random) -> None:
        """What `evaluate` does with a data folder."""
        figures, _ = scores.evaluation(
            self.opened[rng.choice(("vqa", "vilt", "caption"))], folder, "val", read_vqa(folder, "val").samples, 4
        )
        print(scores.table(figures))

    def own(self, name: str) -> Callable[[Path, random.Random], None]:
        """A table of the user's own: what `data` says of it, and answers to it."""

        def use(folder: Path, rng: random.Random) -> None:
            command("data", folder / name)
            samples = read_vqa(folder / name, "all").samples
            self.opened[rng.choice(("vqa", "vilt"))].answer(samples[:4])

        return use

    def describe(self, folder: Path, _: random.Random) -> None:
        print(scores.caption_table(self.opened["caption"].describe(folder, "val", None)))

    def point(self, folder: Path, _: random.Random) -> None:
        system = self.opened["vqa"]
        pointing_figures(lambda i, q: system.subject(i, q).subject, system.processor, folder, "val", 2)

    def look(self, name: str) -> Callable[[Path, random.Random], None]:
        """The image of that name is asked about."""
        return lambda folder, rng: self.opened[rng.choice(("vqa", "vilt", "caption"))].ask(folder / name, QUESTION)

    def join(self, kind: str) -> Callable[[Path, random.Random], None]:
        """`--preset book`: a system of three released parts, one of which is the changed folder."""
        part = {"bert": "text_model"} | dict.fromkeys(("gpt2", "opt", "llama", "experts"), "decoder_model")
        prefix = kind in ("opt", "llama", "experts")

        def use(folder: Path, _: random.Random) -> None:
            names = {"image_model": "vit", "text_model": "bert", "decoder_model": "gpt2"}
            towers = {name: str(self.checkpoints[place]) for name, place in names.items()}
            towers[part.get(kind, "image_model")] = str(folder)
            options = VQAOptions(
                preset="book", init="pretrained", data=self.data, steps=1, max_answer_tokens=4, out=folder / "run",
                connector="prefix" if prefix else "tokens", question_prompt=prefix, **towers,
            )  # fmt: skip
            system, data = built(options)
            system.answer(data.samples["val"][:2])

        return use

    def compare(self, folder: Path, _: random.Random) -> None:
        """A released CLIP or SigLIP with its tokenizer and processor: labels for an image."""
        model, words = CLIP.from_pretrained(folder), texts.Tokenizer.from_pretrained(folder)
        pixels = ImageProcessor.from_pretrained(folder)(load_image(self.picture))[None]
        classify(model, pixels, embed_labels(model, words, ["red circle", LONG]))

    def classify(self, folder: Path, _: random.Random) -> None:
        model, words = TextClassifier.from_pretrained(folder), texts.Tokenizer.from_pretrained(folder)
        reward = ClassifierReward(model, words, model.labels[-1])
        reward(Samples([], [], [], ["a red square", ""]))

    def summarise(self, folder: Path, _: random.Random) -> None:
        options = rl_options.read_command_line(self.book_flags(self.articles / "news.csv", folder / "x", policy=folder))
        task = summarising_task(options, CPU, torch.float32)
        prompts = task.train[:2]
        task.policy.encode(prompts)
        take_apart(open_input(folder, None, None, str(self.articles / "news.txt"), "cpu"))

    def read_articles(self, name: str) -> Callable[[Path, random.Random], None]:
        """`--preset book` with the articles of that file, up to its prompts."""

        def use(folder: Path, _: random.Random) -> None:
            options = rl_options.read_command_line(self.book_flags(folder / name, folder / "x"))
            summarising_task(options, CPU, torch.float32)

        return use

    def choose(self, folder: Path, _: random.Random) -> None:
        """`--preset vilt-b32 --model`: a released ViLT under a new head."""
        flags = ["--preset", "vilt-b32", "--data", str(self.data), "--model", str(folder), "--max-question-tokens", "9"]
        system, data = built(train.read_command_line([*flags, "--steps", "1", "--min-answer-count", "1"]))
        system.answer(data.samples["val"][:2])

    def zero_shot(self, folder: Path, _: random.Random) -> None:
        open_zero_shot(str(folder), CPU).ask(self.picture, "what is it?")

    def caption_from(self, name: str) -> Callable[[Path, random.Random], None]:
        """`--preset coco`: a file of ResNet weights, as safetensors or as a pickle, under a released GPT-2."""

        def use(folder: Path, _: random.Random) -> None:
            options = CaptionOptions(
                preset="coco", init="pretrained", data=self.captioned, steps=1, max_caption_tokens=8,
                image_model=folder / name, decoder_model=str(self.checkpoints["gpt2"]),
            )  # fmt: skip
            built(options)[0].ask(self.picture, None)

        return use

    def cut_words(self, folder: Path, _: random.Random) -> None:
        tokenizer = texts.Tokenizer.from_pretrained(folder)
        tokenizer.decode(tokenizer.encode(QUESTION))
        tokenizer.encode_batch(WORDS, 8)

    def convert(self, folder: Path, _: random.Random) -> None:
        command("convert", folder / "resnet.bin", folder / "out.safetensors")

    # ------------------------------------------------------------------------------------------------ the table

    def all(self) -> list[Place]:
        """Every place, with how often it is tried."""
        images = self.images(self.root / "images")
        json_files = ("v2_*.json",)
        seeking = ("config.json", "text_tokenizer/*.json", "preprocessor_config.json", "model.safetensors")
        run = ("config.json", "answers.json", "*_tokenizer/*.json", "preprocessor_config.json", "model.safetensors")
        resumed = ("config.json", "metrics.jsonl", "checkpoints/last.pt", "checkpoints/last.pt", "model.safetensors")
        folder = ("*.json", "*.safetensors")
        released = self.checkpoints
        return [
            Place("data: train", self.data, (*json_files, "scenes_*.json"), self.learn, 1.5),
            Place("data: evaluate", self.data, json_files, self.score, 1.5),
            Place("data: captions", self.captioned, ("captions_val2014.json",), self.describe, 1.5),
            Place("data: scenes", self.data, ("scenes_val.json",), self.point),
            Place("data: images", self.data, ("*/*.png",), self.score, 0.5),
            *(Place(f"run: {name}", self.plain[name], run, self.ask, 2) for name in ("vqa", "vilt", "caption")),
            Place("run: quantised", self.small, run, self.ask, 1),
            Place("run: clip", self.plain["clip"], seeking, self.seek, 2),
            *(Place(f"resume: {name}", path, resumed, self.go_on(name), 0.5) for name, path in self.plain.items()),
            Place("resume: rlhf", self.tuned, resumed[:-1], self.tune_on, 0.7),
            Place("study: rlhf", self.tuned, ("config.json", "policy/*"), self.study_tuned, 0.5),
            *(Place(f"released: {name}", released[name], folder, self.join(name)) for name in ("vit", "bert", "gpt2")),
            *(Place(f"released: {n}", released[n], folder, self.join(n)) for n in ("opt", "llama", "experts")),
            Place("released: clip's images", released["clip"], folder, self.join("clip"), 0.7),
            *(Place(f"released: {name}", released[name], folder, self.compare) for name in ("clip", "siglip")),
            Place("released: t5", released["t5"], folder, self.summarise),
            Place("released: vilt", released["vilt"], folder, self.choose),
            *(Place(f"released: {n}", released[n], folder, self.zero_shot)
              for n in ("blip2", "llava", "fuyu", "idefics")),
            Place("released: classifier", released["classifier"], folder, self.classify),
            *(Place(f"released: {name}", released["resnet"], (name,), self.caption_from(name), 0.5)
              for name in ("resnet.safetensors", "resnet.bin")),
            Place("tokenizer: vocab.txt", released["wordpiece"], ("*",), self.cut_words),
            Place("tokenizer: merges.txt", released["bytes"], ("*",), self.cut_words),
            Place("tokenizer: CLIP's", released["clip_bytes"], ("*",), self.cut_words),
            *(Place(f"articles: {path.suffix}", self.alone(path), ("*",), self.read_articles(path.name), 0.7)
              for path in sorted(self.articles.iterdir())),
            *(Place(f"own data: {path.suffix}", self.tables, (path.name,), self.own(path.name), 0.5)
              for path in sorted(self.tables.glob("table.*"))),
            *(Place(f"image: {path.suffix}", self.alone(path), ("*",), self.look(path.name), 0.6) for path in images),
            Place("convert", released["resnet"], ("resnet.bin",), self.convert, 0.7),
        ]  # fmt: skip


def built(options: Any) -> tuple[Any, Any]:
    """(a new system with these options, the data it was made for)."""
    kind = systems.find(options.preset)
    data = kind.read(options)
    return kind.build(options, data, FP32), data


@contextmanager
def without_pictures() -> Iterator[None]:
    """Within it, what takes long and reads nothing is left out."""
    with ExitStack() as stack:
        for module, name in ((train, "draw_panels"), (rlhf, "draw_panels"), (rlhf.report, "frontier")):
            stack.enter_context(mock.patch.object(module, name, no_pictures))
        yield
