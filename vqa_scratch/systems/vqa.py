"""Visual question answering: image encoder, text encoder, connector, and a decoder that writes the answer.

Preset `shapes` trains small random models on the built-in data set; `book` starts from released ones.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from vqa_scratch.connectors import connect, connector_class
from vqa_scratch.connectors.base import Conditioning, Connector
from vqa_scratch.data.answers import Answer
from vqa_scratch.data.batches import Batch, Questions
from vqa_scratch.data.feature_store import ImageFeatures, TextFeatures
from vqa_scratch.data.image_store import Images
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer, train_bpe, train_wordpiece
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.released import image_encoder
from vqa_scratch.models.vit import ViTConfig
from vqa_scratch.models.vqa import FROZEN_PARTS, VQAModel, labelled_loss
from vqa_scratch.nn.states import States
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.tasks import Task
from vqa_scratch.storage import read_json, write_json
from vqa_scratch.systems import assembly
from vqa_scratch.systems.base import check_positions, seed_everything
from vqa_scratch.systems.export import export_writer
from vqa_scratch.systems.options import VQAOptions
from vqa_scratch.systems.policy import answering_task, run_options
from vqa_scratch.systems.questions import QuestionData, QuestionSystem
from vqa_scratch.systems.scoring import common_answers
from vqa_scratch.systems.writing import Split, choose, write, writing_figures
from vqa_scratch.training.precision import Precision

CANDIDATES = "answers.json"  # of a run folder: the training answers to choose from, the most frequent first
CANDIDATES_KEPT = 1000
# Questions that are also ranked: at most so many, and so many times candidates; a pass per question and candidate.
RANKED_QUESTIONS, RANKED_PAIRS = 2_000, 120_000
IMAGE_SIZE = 64  # pixels a side, of the small models
VOCABULARY = 512  # tokens at most, of the small models' tokenizers
DISTILBERT = BertConfig(layout="distilbert", layers=6, token_types=0)  # distilbert-base-uncased


class VQASystem(QuestionSystem):
    """Questions about images, answered by a decoder."""

    name = "vqa"
    writes = True
    loss_unit = "nats a token"
    model: VQAModel
    candidates: list[str]  # training answers that it can also choose from; none in runs of older versions
    kept: Sequence[ImageFeatures | TextFeatures] = ()  # cached features of frozen encoders

    # ------------------------------------------------------------------------------------------- build, save, open

    @classmethod
    def build(cls, options: VQAOptions, data: QuestionData, precision: Precision) -> Self:
        seed_everything(options.seed)
        make = small_models if options.preset == "shapes" else released_models
        image, text, connector, decoder, tokenizers, processor = make(options, data.samples["train"])
        model = VQAModel(image, text, connector, decoder)
        system = cls(options, model, tokenizers, processor, precision)
        system.candidates = common_answers(data.samples["train"], CANDIDATES_KEPT)
        return system

    @classmethod
    def open(cls, folder: Path, sizes: dict[str, Any], options: VQAOptions, precision: Precision) -> Self:
        model = assembly.assemble(sizes)
        text = None if model.text is None else Tokenizer.from_pretrained(folder / "text_tokenizer")
        tokenizers = tokenizers_for(options, text, Tokenizer.from_pretrained(folder / "decoder_tokenizer"))
        system = cls(options, model, tokenizers, ImageProcessor.from_pretrained(folder), precision, folder)
        system.candidates = read_candidates(folder / CANDIDATES) if (folder / CANDIDATES).is_file() else []
        return system

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.candidates:
            write_json(folder / CANDIDATES, self.candidates)

    @property
    def sizes(self) -> dict[str, Any]:
        return assembly.sizes_of(self.model)

    # --------------------------------------------------------------------------------------------------- training

    def split(self, samples: Sequence[VQASample]) -> Split:
        questions = Questions(samples, self.tokenizers)
        return Split(questions, Images(questions.image_paths, self.processor))

    def train_on(self, data: QuestionData) -> None:
        self.trainable = self.model.freeze(self.options.freeze)
        super().train_on(data)
        if self.options.feature_cache:
            self.cache_features()
        if self.options.compile:  # what runs is compiled, the model keeps its plain names for checkpoints
            self.loss = torch.compile(self.loss, dynamic=True)

    def about(self) -> list[str]:
        cut = self.tokenizers.cut
        limits = f"cut to the token limits: {cut['questions']} questions, {cut['answers']} answers"
        return [self.trainable, limits]

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of the cross-entropy over the labelled tokens, how many of them are right)."""
        image = self.encode_image(batch.images)
        text = self.encode_text(batch.question, batch.attention_mask)
        hidden = self.model.hidden(image, text, batch.decoder_input_ids, batch.image_index)
        return labelled_loss(hidden, self.model.decoder.head, batch.labels)

    def encode_image(self, images: Tensor) -> States:
        """Bytes (I, H, W, 3) -> states (I, N, ...)."""
        return self.model.encode_image(self.processor.normalize(images))

    def encode_text(self, question: Tensor | None, attention_mask: Tensor | None) -> States | None:
        """Ids (B, T) -> states (B, T, ...); None without a text encoder."""
        return self.model.encode_text(question, attention_mask)

    def condition(self, batch: Batch) -> Conditioning:
        """What the decoder is given for a batch."""
        text = self.encode_text(batch.question, batch.attention_mask)
        return self.model.connector(self.encode_image(batch.images), text, batch.image_index)

    # ----------------------------------------------------------------------------------------- frozen encoders

    def cache_features(self) -> None:
        """Put a file of states in the place of each frozen encoder: batches hold states, and encoding reads them.

        States are those of an encoder in eval mode. They are kept in fp32 under fp32, and under bf16 or fp16 in that
        type, which is what the connector computes in anyway. Nothing is computed yet: a file is made by `precompute`.
        Raises UserError if the images are not of the size that the image encoder was made for.
        """
        model, folder, dtype = self.model, self.options.cache, self.precision.dtype
        frozen, kept = FROZEN_PARTS[self.options.freeze], []

        def at_rest(part: nn.Module, encode: Callable[..., States]) -> Callable[..., States]:
            @torch.no_grad()
            def run(*inputs: Tensor) -> States:
                part.eval()
                with self.precision.autocast():
                    return encode(*(x.to(self.precision.device) for x in inputs))

            return run

        if "image" in frozen:
            encode_image = at_rest(model.image, self.encode_image)
            height, width = self.processor.output_size
            example = model.connector.kept(encode_image(torch.zeros(1, height, width, 3, dtype=torch.uint8)))
            for name, split in self.splits.items():
                states = ImageFeatures(
                    split.images,
                    model.image,
                    lambda images, encode=encode_image: model.connector.kept(encode(images)).tokens,
                    folder,
                    tuple(example.tokens.shape[1:]),
                    dtype,
                )
                self.splits[name] = Split(split.questions, states)
                kept.append(states)
            self.encode_image = partial(States, places=example.places)
        if "text" in frozen and model.text is not None:
            encode_text = at_rest(model.text, self.encode_text)
            for split in self.splits.values():
                states = TextFeatures(
                    split.questions,
                    model.text,
                    lambda ids, mask: encode_text(ids, mask).tokens.cpu(),
                    folder,
                    model.text.dim,
                    dtype,
                )
                split.questions.cached = states.batch
                kept.append(states)
            self.encode_text = States
        self.kept = kept

    def precompute(self) -> None:
        for features in self.kept:
            features.ready()

    # ---------------------------------------------------------------------------------------------------- answers

    def answers(
        self,
        split: Split,
        chosen: Sequence[np.ndarray],
        *,
        image_map: np.ndarray | None = None,
        progress: str | None = None,
        ranked: bool = False,
        top: int = 1,
        decoding: dict[str, Any] | None = None,
    ) -> dict[int, list[Answer]]:
        shown = {"image_map": image_map, "progress": progress}
        if not ranked:
            written = write(self, self.condition, split, chosen, **shown, decoding=decoding)
            return {number: [answer] for number, answer in written.items()}
        return choose(self, self.condition, split, chosen, self.candidates, **shown, top=top)

    def ask(
        self, image: Path, question: str | None, top: int | None = None, decoding: dict[str, Any] | None = None
    ) -> tuple[list[Answer], list[str]]:
        """One written answer; with `top`, so many of the training answers, the likeliest first."""
        if top is not None and decoding:
            flag = "--" + next(iter(decoding)).replace("_", "-")
            raise UserError(f"--top chooses from a list, nothing is decoded: leave out {flag}")
        if top is not None and not self.candidates:
            raise UserError(f"{self.folder} has no {CANDIDATES} to choose from, so leave out --top")
        return super().ask(image, question, top, decoding)

    def answer(self, samples: Sequence[VQASample], limit: int | None = None, **how: Any) -> dict[int, Answer]:
        if how.get("ranked"):
            if not self.candidates:
                return {}
            limit = min(limit or len(samples), self.ranked_questions)
        return super().answer(samples, limit, **how)

    @property
    def ranked_questions(self) -> int:
        """How many questions the figures of ranking are taken over."""
        return min(RANKED_QUESTIONS, max(1, RANKED_PAIRS // len(self.candidates)))

    def figures(self, answers: dict[int, Answer]) -> dict[str, float]:
        return writing_figures(answers)

    def finish(self, folder: Path) -> dict[str, Any]:
        """The figures of every system that answers questions, and how well it chooses among the training answers."""
        figures = super().finish(folder)
        ranking = self.report("test", self.ranked_questions, progress="ranking", ranked=True)
        return figures | {
            "generation_accuracy": figures["accuracy"],
            "ranking_accuracy": ranking.accuracy,
            "ranking_questions": len(ranking.answers),
            "ranking_candidates": len(self.candidates),
            "connector": self.options.connector,
        }

    def lines(self, summary: dict[str, Any]) -> list[str]:
        figures, among, over = (summary[f"ranking_{name}"] for name in ("accuracy", "candidates", "questions"))
        line = f"ranking_accuracy     {figures:.4f} (the best of {among} answers, first {over} questions)"
        return [*super().lines(summary), line]

    def policy(self, options: RLHFOptions, dtype: torch.dtype) -> Task:
        samples = self.read(run_options(self, options)).samples
        return answering_task(self, options, dtype, samples["train"], samples["test"])

    def export(self, folder: Path) -> list[str]:
        return export_writer(self, folder)


def read_candidates(path: Path) -> list[str]:
    """The answers of a run. Raises UserError on a file that holds no list of them."""
    answers = read_json(path)
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a for a in answers):
        raise UserError(f"{path} is not a list of answers, as train.py writes it")
    return answers


# ------------------------------------------------------------------------------------------------ models

Parts = tuple[nn.Module, Bert | None, Connector, GPT2, Tokenizers, ImageProcessor]


def tokenizers_for(options: VQAOptions, text: Tokenizer | None, decoder: Tokenizer) -> Tokenizers:
    """The tokenizers with the limits of a run."""
    names = ("max_question_tokens", "max_answer_tokens", "question_prompt")
    return Tokenizers(text, decoder, **{name: getattr(options, name) for name in names})


def own_tokenizers(train: list[VQASample]) -> tuple[Tokenizer, Tokenizer]:
    """WordPiece for the text encoder and byte-level BPE for the decoder, learned from the training questions."""
    questions = sorted({s.question for s in train})
    answers = sorted({a for s in train for a in (*s.answers, s.answer)})
    return train_wordpiece(questions, VOCABULARY), train_bpe([f" {text}" for text in questions + answers], VOCABULARY)


def small_models(options: VQAOptions, train: list[VQASample]) -> Parts:
    """Small random models of the real classes, with tokenizers learned from the questions."""
    kind, width = connector_class(options.connector), options.width
    text, decoder = own_tokenizers(train)
    shared = {"dim": width, "heads": options.heads, "activation": "relu"}
    none = {"dropout": 0.0, "attention_dropout": 0.0}
    image_config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=options.patch_size,
        layers=options.image_layers,
        hidden=4 * width,
        **shared,
    )
    image = assembly.vit(image_config, options.stem)
    grid = image.places(IMAGE_SIZE, IMAGE_SIZE).grid
    sizes = kind.sizes_for(grid, options)
    text_config = BertConfig(
        layout="distilbert",
        vocab_size=len(text),
        layers=options.text_layers,
        hidden=4 * width,
        max_positions=max(64, options.max_question_tokens),
        token_types=0,
        pad_id=text.pad_id,
        **shared,
        **none,
    )
    longest = options.max_question_tokens + options.max_answer_tokens + 1
    decoder_config = GPT2Config(
        vocab_size=len(decoder),
        max_positions=max(64, longest) + kind.prefix_length(grid, sizes),
        layers=options.decoder_layers,
        embedding_dropout=0.0,
        add_cross_attention=kind.uses_memory,
        bos_id=decoder.bos_id,
        eos_id=decoder.eos_id,
        pad_id=decoder.pad_id,
        **shared,
        **none,
    )
    words, writer = Bert(text_config) if kind.reads_text else None, GPT2(decoder_config)
    connector = connect({"kind": options.connector, **sizes}, image, words, writer)
    table = 0.5 * assembly.grid_positions(grid, width)
    with torch.no_grad():
        image.positions[0, image.prefix_tokens :] = table
    connector.start_from_places(table)
    tokenizers = tokenizers_for(options, text if kind.reads_text else None, decoder)
    return image, words, connector, writer, tokenizers, ImageProcessor(size=(IMAGE_SIZE, IMAGE_SIZE))


def released_models(options: VQAOptions, train: list[VQASample]) -> Parts:
    """Models, tokenizers and preprocessing from checkpoints; or, with `--init random`, random ones of book size."""
    kind = connector_class(options.connector)
    if options.init == "random":
        text, decoder = own_tokenizers(train)
        image, words = assembly.vit(ViTConfig(), "linear"), Bert(DISTILBERT)
        writer, processor = GPT2(GPT2Config(add_cross_attention=kind.uses_memory)), ImageProcessor()
    else:
        text = Tokenizer.from_pretrained(options.text_model)
        decoder = Tokenizer.from_pretrained(options.decoder_model)
        image, words = image_encoder(options.image_model), Bert.from_pretrained(options.text_model)
        writer = GPT2.from_pretrained(options.decoder_model, add_cross_attention=kind.uses_memory)
        processor = ImageProcessor.from_pretrained(options.image_model)
    check_positions(options, ["max_question_tokens"], words.longest, options.text_model or "DistilBERT")
    if processor.output_size is None:
        raise UserError(f"training needs images of one size; {options.image_model} takes each at a size of its own")
    grid = image.places(*processor.output_size).grid
    sizes = kind.sizes_for(grid, options)
    written = [*(["max_question_tokens"] if options.question_prompt else []), "max_answer_tokens"]
    room = writer.config.max_positions - kind.prefix_length(grid, sizes)
    check_positions(options, written, room, options.decoder_model or "GPT-2")
    words = words if kind.reads_text else None
    connector = connect({"kind": options.connector, **sizes}, image, words, writer)
    return image, words, connector, writer, tokenizers_for(options, text if words else None, decoder), processor
