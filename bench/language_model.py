"""A small GPT-2 that has read texts alone: descriptions of drawn scenes, and questions with their answers.

It stands for the language model that LLaVA and Flamingo start from. Half of its rows describe a scene before they ask
about it, so it learns to answer from what was said; the others only ask.

Shapes: R rows, T tokens.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from train import train_step
from vqa_scratch.data.batches import IGNORE, Ragged
from vqa_scratch.data.captions import read_captions
from vqa_scratch.data.text import Tokenizer, answer_ids, train_bpe
from vqa_scratch.data.vqa_v2 import VQASample, read_vqa
from vqa_scratch.generate import GenerationOptions, generate
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.vqa import labelled_loss
from vqa_scratch.storage import write_json
from vqa_scratch.training.optimizers import Optimizers, schedule
from vqa_scratch.training.precision import Precision

LENGTH, ROWS = 128, 64  # tokens of a row, rows of a step
ROOM = 160  # positions: a prefix of 64 tokens, question and answer fit too
VOCABULARY = 512
Scenes = dict[int | str, tuple[list[str], list[VQASample]]]  # by image: descriptions, questions


@dataclass
class Texts:
    """Rows of tokens, as `train_step` takes a batch."""

    ids: Tensor  # (R, T + 1), IGNORE behind the end

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.ids), int((self.ids[:, 1:] >= 0).sum())

    def parts(self, number: int) -> Iterator["Texts"]:
        yield self


def read(data: Path, split: str, seed: int) -> Scenes:
    """The texts about each scene of a split."""
    scenes: Scenes = {}
    for sample in read_captions(data, split, seed=seed).samples:
        scenes.setdefault(sample.image_id, ([], []))[0].append(sample.answer)
    for sample in read_vqa(data, split).samples:
        scenes[sample.image_id][1].append(sample)
    return scenes


def ids_of(scene: tuple[list[str], list[VQASample]], words: Tokenizer, rng: random.Random) -> list[int]:
    """One row: in half of the cases a description, then questions with their answers."""
    descriptions, questions = scene
    ids = words.encode(f" {rng.choice(descriptions)}") if rng.random() < 0.5 else []
    for sample in rng.sample(questions, len(questions)):
        ids += words.encode(f" {sample.question}") + answer_ids(words, sample.answer)
    return (ids + [IGNORE] * (LENGTH + 1))[: LENGTH + 1]


@torch.no_grad()
def answered(model: GPT2, words: Tokenizer, scenes: Scenes, described: bool, number: int) -> float:
    """The share of the first `number` questions answered right, after a description of their scene or without one."""
    pairs = [(texts[0], sample) for texts, samples in scenes.values() for sample in samples][:number]
    start = answer_ids(words, "yes")[0]
    prompts = [
        [*(words.encode(f" {text}") if described else []), *words.encode(f" {sample.question}"), start]
        for text, sample in pairs
    ]
    ids, mask = Ragged(prompts).padded(torch.arange(len(prompts)).numpy(), words.pad_id or 0, left=True)
    options = GenerationOptions(max_new_tokens=8, eos_id=words.eos_id)
    made = generate(model.eval(), ids, mask, None, options=options)
    texts = [words.decode(row[:n]).strip() for row, n in zip(made.ids.tolist(), made.lengths.tolist(), strict=True)]
    return sum(text == sample.answer for text, (_, sample) in zip(texts, pairs, strict=True)) / len(pairs)


def train_language_model(
    folder: Path, data: Path, steps: int, seed: int, kind: str, *, width: int = 128, heads: int = 4, layers: int = 4
) -> dict[str, float]:
    """Train one and write it to `folder` as a GPT-2 checkpoint with its tokenizer. Returns how well it answers."""
    scenes = read(data, "train", seed)
    texts = {f" {text}" for descriptions, _ in scenes.values() for text in descriptions}
    texts |= {f" {text}" for _, samples in scenes.values() for s in samples for text in (s.question, s.answer)}
    words = train_bpe(sorted(texts), VOCABULARY)
    torch.manual_seed(seed)
    none = {"dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}
    special = {"bos_id": words.bos_id, "eos_id": words.eos_id, "pad_id": words.pad_id}
    sizes = {"dim": width, "heads": heads, "layers": layers, "activation": "relu", "max_positions": ROOM}
    model = GPT2(GPT2Config(vocab_size=len(words), **sizes, **none, **special)).train()
    optimizers = Optimizers(model, kind="muon", learning_rate=2e-3, matrix_learning_rate=0.02, weight_decay=0.1)
    precision, rng = Precision(kind, torch.device("cpu")), random.Random(seed)

    def loss(batch: Texts) -> tuple[Tensor, Tensor]:
        ids, labels = batch.ids[:, :-1].clamp(min=0), batch.ids[:, 1:]
        return labelled_loss(model.hidden(model.embed(ids)), model.head, labels)

    order: list[int | str] = []
    for step in range(steps):
        if len(order) < ROWS:
            order += rng.sample(list(scenes), len(scenes))
        taken, order = order[:ROWS], order[ROWS:]
        batch = Texts(torch.tensor([ids_of(scenes[image], words, rng) for image in taken]))
        optimizers.set_factor(schedule(step, step / steps, min(50, steps // 4), 0.4))
        mean = train_step(loss, batch, optimizers, precision)[0]
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            print(f"language model: step {step + 1} of {steps}, {float(mean):.3f} nats a token", flush=True)
    unseen = read(data, "val", seed)
    figures = {name: answered(model, words, unseen, name == "described", 500) for name in ("described", "blind")}
    model.save_pretrained(folder)
    words.save(folder)
    write_json(folder / "answers.json", figures)  # last: it says that the folder is whole
    return figures
