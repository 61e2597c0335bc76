"""Prepares a system and one input for study: its subject, and the labels of its tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vqa_scratch.data.vqa_v2 import read_vqa
from vqa_scratch.models.clip import CLIP
from vqa_scratch.models.vilt import ViLTClassifier
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.study.base import Subject
from vqa_scratch.study.opened import Opened, chosen, run_name, special_tokens, text_labels, written
from vqa_scratch.study.pair import PairSubject
from vqa_scratch.study.subject import ViLTSubject, VQASubject
from vqa_scratch.systems.base import System
from vqa_scratch.systems.clip_texts import text_ids
from vqa_scratch.systems.scoring import score
from vqa_scratch.systems.splits import SplitSystem
from vqa_scratch.systems.writing import own_options


def _opened(system: SplitSystem, image: Image.Image, question: str, subject: Subject, answer: dict[str, Any]) -> Opened:
    """`answer` from `written` or `chosen`. Shown are the pixels that reach the model, so that overlays fit."""
    shown = Image.fromarray(system.processor.to_uint8(image))
    notes = tuple(system.tokenizers.notes_on(question, system.asked))
    return Opened(run_name(system.folder or system.options.out), subject, question, shown, **answer, notes=notes)


def writing_subject(system: SplitSystem[Any, VQAModel, Any], image: Image.Image, question: str) -> Opened:
    """A system of encoder, connector and decoder with one image and a question; "" for a caption."""
    tokenizers, text = system.tokenizers, system.tokenizers.text
    prompt, ids = [*tokenizers.prompt(question), tokenizers.start_id], tokenizers.question(question)
    labels, special = ((), ()) if text is None else (text_labels(text, question, ids), special_tokens(text, ids))
    pixels = system.processor(image)[None]
    subject = VQASubject(system.model, pixels, prompt, ids, labels, special, tokenizers.max_answer_tokens)
    subject.decide_by(own_options(tokenizers))
    return _opened(system, image, question, subject, written(tokenizers.decoder, prompt))


def choosing_subject(system: SplitSystem[Any, ViLTClassifier, Any], image: Image.Image, question: str) -> Opened:
    """A ViLT with one image and a question."""
    text, ids = system.tokenizers.by_name["text"], system.tokenizers.question(question)
    labels = text_labels(text, question, ids)
    subject = ViLTSubject(system.model, system.processor(image)[None], ids, labels, special_tokens(text, ids))
    return _opened(system, image, question, subject, chosen(system.model.labels, labels[0]))


def pair_subject(system: SplitSystem[Any, CLIP, Any], image: Image.Image, text: str) -> Opened:
    """A contrastive system with one image and one text; its words are compared with the image too, each alone."""
    tokenizer, stripped = system.tokenizers.by_name["text"], (word.strip(".,;:!?\"'()") for word in text.split())
    texts = list(dict.fromkeys([text, *filter(None, stripped)]))
    words = system.embed_texts(texts[1:]) if len(texts) > 1 else torch.zeros(0, system.model.config.projection_dim)
    ids = text_ids(system.model, tokenizer, [text])
    listed = ids[0].tolist()
    labels, special = text_labels(tokenizer, text, listed), special_tokens(tokenizer, listed)
    subject = PairSubject(system.model, system.processor(image)[None], ids, labels, special, words)
    return _opened(system, image, text, subject, chosen(texts, "the image"))


def score_of(system: System, data: Path, split: str, number: int) -> Callable[[], float]:
    """A function that answers about the first `number` questions of a split and returns their official accuracy."""
    samples = read_vqa(data, split).samples
    answered = system.answer(samples, number)
    first = [sample for sample in samples if sample.question_id in answered]
    return lambda: score(first, system.answer(first)).accuracy
