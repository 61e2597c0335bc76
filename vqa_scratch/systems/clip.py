"""A contrastive system: two towers give an image and its caption nearly the same vector, so each finds the other.

Preset `clip` trains a small CLIP (Radford et al. 2021, 2103.00020), or with `--loss sigmoid` a SigLIP (Zhai et al.
2023, 2303.15343), on the built-in data set or on captions of one's own. A step sees each of its images once, with a
caption drawn anew in every epoch, and tells it from the captions of all others.

Shapes: I images and as many captions, P width of their common space.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqa_scratch.data.contrasts import CLASSES, CONTRASTS, single_objects
from vqa_scratch.data.descriptions import in_places
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.pairs import Captions, PairBatch
from vqa_scratch.data.scenes import HELD_OUT, RIVALS
from vqa_scratch.data.text import Tokenizer, check_text
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.data.vqa_files import first_images
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.models.clip import CLIP
from vqa_scratch.study.opened import Opened
from vqa_scratch.systems.assembly import WithoutNumbers, check_images, stem_of
from vqa_scratch.systems.base import RunData, seed_everything
from vqa_scratch.systems.captions import read_captions_data, read_texts, to_describe
from vqa_scratch.systems.clip_models import model_of, small_model
from vqa_scratch.systems.clip_options import CLIPOptions
from vqa_scratch.systems.clip_report import lines_of, show
from vqa_scratch.systems.clip_texts import classify, embed_labels, embed_texts
from vqa_scratch.systems.export import export_clip
from vqa_scratch.systems.finals import Pass
from vqa_scratch.systems.questions import built_in
from vqa_scratch.systems.retrieval import retrieval, share_preferred
from vqa_scratch.systems.splits import ANY_SAMPLE, TIMED, Key, SplitSystem
from vqa_scratch.systems.studied import pair_subject
from vqa_scratch.systems.vqa_models import IMAGE_SIZE
from vqa_scratch.training.contrastive import clamp_scale_, info_nce, sigmoid_loss, twins
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision

AT_ONCE = 256  # images that are embedded at once when they are not part of a split
EACH_CLASS = 10  # drawn images of each class of single objects
TEMPLATES = tuple(f"a {{}} at the {place}" for place in RIVALS["where"])  # in the words of the drawn scenes
EMPTY = "the text is empty: describe an image, for example 'a small red circle at the top left'"
FINAL = {"retrieval": "test", "hold-out": "holdout"}  # the passes of the final figures, and their splits
CONTRASTED, ALONE = "test contrasts", "every class"  # what the other two count, of drawn scenes: images


class Embedded(NamedTuple):
    """Pairs of a split, in its order: their rows, and the vectors of their images and captions, on the CPU."""

    rows: np.ndarray
    images: Tensor  # (I, P)
    texts: Tensor  # (I, P)


class CLIPSystem(SplitSystem[CLIPOptions, CLIP, Captions]):
    """Pairs of image and caption, each found by the other.

    Its splits but "train" have one caption an image; of drawn scenes the one that names places.
    """

    example = ""
    asked = "text"
    unit = "pairs"
    published_as = ("zero-shot-image-classification", "accuracy")
    loss_unit = "nats a pair"

    def __init__(self, options: CLIPOptions, model: CLIP, tokenizers: Tokenizers, *more: Any) -> None:
        super().__init__(options, model, tokenizers, *more)
        check_images(model.image, self.processor)
        tokenizers.by_name["text"].check_fits(model.text.config.vocab_size, "the text tower")

    # ------------------------------------------------------------------------------------------- build, save, open

    @classmethod
    def check(cls, options: CLIPOptions) -> None:
        with WithoutNumbers():
            small_model(options, [ANY_SAMPLE])

    @classmethod
    def read(cls, options: CLIPOptions) -> RunData:
        return read_captions_data(options, questions=False)

    @classmethod
    def build(cls, options: CLIPOptions, data: RunData, precision: Precision) -> Self:
        seed_everything(options.seed)
        model, text = small_model(options, data.samples["train"])
        processor = ImageProcessor(size=(IMAGE_SIZE, IMAGE_SIZE))
        return cls(options, model, _tokenizers(options, text), processor, precision)

    @classmethod
    def open(cls, folder: Path, sizes: dict[str, Any], options: CLIPOptions, precision: Precision) -> Self:
        tokenizers = _tokenizers(options, Tokenizer.from_pretrained(folder / "text_tokenizer"))
        model = model_of(sizes, str(folder / "config.json"))
        return cls(options, model, tokenizers, ImageProcessor.from_pretrained(folder), precision, folder)

    @property
    def sizes(self) -> dict[str, Any]:
        return self.model.config.to_hf() | {"stem": stem_of(self.model.image)}

    # --------------------------------------------------------------------------------------------------- training

    @property
    def text_width(self) -> int | None:
        """The number of tokens that all texts have, padding included; None: any, as a causal tower reads them."""
        return None if self.model.text.layout.causal else self.model.text.longest

    def grouped(self, samples: Sequence[VQASample]) -> Captions:
        return Captions(samples, self.tokenizers, self.text_width)

    def batch(self, key: Key) -> PairBatch:
        train = self.splits["train"]
        batch = train.questions.batch(key.rows, train.images)
        return self.augmented(self.augment, batch, key) if self.augment else batch

    def train_on(self, data: RunData) -> None:
        self.data = data
        samples = {"train": data.samples["train"]}
        for name in [name for name in data.samples if name != "train"]:
            drawn, first = data.scenes.get(name), to_describe(data.samples[name])
            samples[name] = [replace(s, answer=in_places(drawn[s.image_id])) for s in first] if drawn else first
        self.make_splits(samples)
        train = self.splits["train"].questions
        images, captions = len(train.image_paths), len(np.unique(train.texts))
        if min(images, captions) < 2:  # nothing to be told from
            raise UserError(
                "a contrastive system tells images apart by their captions, and needs two of each to train on: here "
                f"are {images:,} images and {captions:,} different captions"
            )

    def about(self) -> list[str]:
        train, parameters = self.splits["train"].questions, sum(p.numel() for p in self.model.parameters())
        return [
            f"trainable: {parameters:,} parameters",
            f"training on {len(train.image_paths):,} images with {len(train.samples):,} captions",
            f"cut to the token limit: {self.tokenizers.cut['questions']} captions",
        ]

    def trained_by(self, optimizers: Optimizers) -> None:
        """Clamps the scale of the similarities after each step."""
        adamw = optimizers.optimizers[-1]  # has the scale, whichever has the matrices
        adamw.register_step_post_hook(lambda *_: clamp_scale_(self.model.logit_scale))

    def epoch(self, number: int) -> list[Key]:
        options = self.options
        batches = self.splits["train"].questions.pairs_of(options.seed, number, options.pairs_per_step)
        return [Key(rows, (options.seed, number, 1, place)) for place, rows in enumerate(batches)]

    def embed(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """(images (I, P), captions (I, P)) of a batch on the model's device."""
        return self.model.embed_images(self.processor.normalize(batch.images)), self.model.embed_texts(batch.input_ids)

    def loss(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """(sum of the loss over pairs, how many images are told their own caption from all others).

        The others are those of all ranks; one with the same caption is left out.
        """
        images, texts = (vectors[: len(batch.rows)] for vectors in self.embed(batch))
        same, model = twins(batch.texts[: len(batch.rows)], world=self.world), self.model
        if model.logit_bias is None:
            losses, right = info_nce(images, texts, model.logit_scale, left_out=same, world=self.world)
        else:
            scale, bias = model.logit_scale, model.logit_bias
            losses, right = sigmoid_loss(images, texts, scale, bias, left_out=same, world=self.world)
        return losses.sum(), right.sum()

    # ----------------------------------------------------------------------------------------------- evaluation

    def embed_split(self, name: str, limit: int | None = None, *, progress: str | None = None) -> Embedded:
        """The pairs of a split, or its first `limit`; with a label of `progress`, as many as its time allows.

        The ranks take turns at the batches, and all of them get all vectors.
        """
        split = self.splits[name]
        one = Pass(progress or "", name, min(limit or len(split.images.paths), len(split.images.paths)))
        began, until = time.perf_counter(), self.pace.begin(progress) if progress else None
        at_once = self.pace.fitting(one, until, self.options.pairs_per_step)
        batches = [np.arange(start, min(start + at_once, one.samples)) for start in range(0, one.samples, at_once)]
        mine = batches[self.world.rank :: self.world.size]
        own: list[Embedded] = []
        with self.evaluating():
            for rows, batch in split.batches(self.precision.device, mine, progress=progress, until=until):
                with self.precision.autocast():
                    own.append(Embedded(rows, *(vectors.cpu() for vectors in self.embed(batch))))
        parts = sorted((part for some in self.world.gather(own) for part in some), key=lambda part: int(part.rows[0]))
        rows = np.concatenate([part.rows for part in parts])
        self.pace.end(one, began, len(rows))
        return Embedded(rows, torch.cat([part.images for part in parts]), torch.cat([part.texts for part in parts]))

    def captions_of(self, name: str, rows: Iterable[int]) -> list[str]:
        """The captions of these rows of a split."""
        return [self.splits[name].questions.samples[row].answer for row in rows]

    def evaluate(self) -> dict[str, float]:
        found = self.embed_split("val", self.options.eval_images)
        figures = retrieval(found.images, found.texts, self.captions_of("val", found.rows))
        recalls = {f"{way}/{k}": figures[way][k] for way in ("image_to_text", "text_to_image") for k in ("R@1", "R@5")}
        return {"accuracy": figures["accuracy"], **recalls, "scale": self.model.logit_scale.exp().item()}

    def scored(self, figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Recall both ways, beside chance."""
        number = min(self.options.eval_images, len(self.splits["val"].images.paths))
        names = [name for name in (figures[0] if figures else {}) if "/" in name]
        lines = {name.replace("_", " ").replace("/", ", "): [row[name] for row in figures] for name in names}
        title, chance = f"found among {number:,} validation images", {"chance": 1 / number}
        return [{"title": title, "ylabel": "share", "lines": lines, "hlines": chance}]

    def passes(self) -> list[Pass]:
        size = {name: len(split.images.paths) for name, split in self.splits.items()}
        final = [Pass(label, name, size[name]) for label, name in FINAL.items() if name in size]
        if "test" in self.data.scenes:
            final[1:1] = [
                Pass("contrasts", CONTRASTED, size["test"]),
                Pass("zero-shot", ALONE, EACH_CLASS),
            ]
        return [Pass("", "val", min(size["val"], self.options.eval_images)), *final]

    def try_out(self, one: Pass) -> None:
        if one.split == ALONE:
            self.zero_shot(1)
        elif one.split == CONTRASTED:
            self.contrasts(self.embed_split("test", TIMED))
        else:
            self.embed_split(one.split, TIMED)

    def finish(self, folder: Path) -> dict[str, Any]:
        """Retrieval on the test split and the hold-out; of drawn scenes choices between descriptions; samples.html."""
        test = self.embed_split("test", progress="retrieval")
        samples = [self.splits["test"].questions.samples[row] for row in test.rows]
        captions = [sample.answer for sample in samples]
        figures = retrieval(test.images, test.texts, captions)
        other = retrieval(test.images.roll(len(captions) // 2, 0), test.texts, captions)
        figures["baselines"] = {"chance": 1 / len(captions), "shuffled_images": other["accuracy"]}
        if "test" in self.data.scenes:
            figures |= {"contrasts": self.contrasts(test, "contrasts"), "zero_shot": self.zero_shot(label="zero-shot")}
        held = self.embed_split("holdout", progress="hold-out") if "holdout" in self.splits else None
        figures["holdout"] = held and retrieval(held.images, held.texts, self.captions_of("holdout", held.rows))
        if self.world.main:
            show(folder, figures, samples, test.images, test.texts, self.options.samples)
        return figures | {"cut_short": self.pace.cut}

    def contrasts(self, test: Embedded, label: str = "") -> dict[str, Any]:
        """How often an image is nearer to its description than to that of a scene that differs in one respect."""

        def share(of: int) -> dict[str, Any]:
            figures: dict[str, Any] = {}
            scenes = [
                self.data.scenes["test"][self.splits["test"].questions.samples[row].image_id] for row in test.rows
            ]
            for name, change in CONTRASTS.items():
                changed = map(change, scenes[:of])
                others = {place: in_places(scene) for place, scene in enumerate(changed) if scene is not None}
                if others:  # few images may have none that differ in this respect
                    places, wrong = list(others), self.embed_texts(list(others.values()))
                    figures[name] = share_preferred(test.images[places], test.texts[places], wrong)
            return figures

        return self._in_time(Pass(label, CONTRASTED, len(test.rows)), share)

    def zero_shot(self, each: int = EACH_CLASS, label: str = "") -> dict[str, float]:
        """The share of drawn objects, alone in an image, that are given their size, color and shape among all classes;
        apart for pairs of color and shape that training never showed. `each` are drawn of every class."""

        def shares(of: int) -> dict[str, float]:
            drawn = single_objects(of)
            images = self.embed_images([image for image, _ in drawn])
            classes = self.embed_labels([" ".join(words) for words in CLASSES], TEMPLATES).cpu()
            right = (images @ classes.T).argmax(1) == torch.tensor([number for _, number in drawn])
            unseen = torch.tensor([CLASSES[number][1:] in HELD_OUT for _, number in drawn])
            found = {
                name: right[them].float().mean().item() for name, them in (("seen", ~unseen), ("held_out", unseen))
            }
            return found | {"chance": 1 / len(CLASSES)}

        return self._in_time(Pass(label, ALONE, each), shares)

    def _in_time(self, one: Pass, figures: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """The figures of a pass, of as many samples as its time allows."""
        began, until = time.perf_counter(), self.pace.begin(one.label) if one.label else None
        number = self.pace.fitting(one, until, one.samples)
        found = figures(number)
        self.pace.end(one, began, number)
        return found

    def lines(self, summary: dict[str, Any]) -> list[str]:
        return lines_of(summary)

    # ---------------------------------------------------------------------------------------------------- asking

    def lacks(self, what: str) -> NoReturn:
        super().lacks(f"{what}; `python -m vqa_scratch retrieve` finds its images by a text, or texts by an image")

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        parts = []
        with self.evaluating(), self.precision.autocast():
            for start in range(0, len(images), AT_ONCE):
                pixels = self.processor(images[start : start + AT_ONCE]).to(self.precision.device)
                parts.append(self.model.embed_images(pixels).cpu())
        return torch.cat(parts)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        texts = [check_text(text, EMPTY) for text in texts]
        with self.evaluating(), self.precision.autocast():
            return embed_texts(self.model, self.tokenizers.by_name["text"], texts).cpu()

    def embed_labels(self, labels: Sequence[str], templates: Sequence[str]) -> Tensor:
        """(L, P), on the model's device: each label in every template, averaged. Raises UserError as `classify`."""
        with self.evaluating(), self.precision.autocast():
            return embed_labels(self.model, self.tokenizers.by_name["text"], labels, templates)

    def classify(self, image: Image.Image, labels: Sequence[str], templates: Sequence[str]) -> list[float]:
        classes = self.embed_labels(labels, templates)
        pixels = self.processor(image)[None].to(self.precision.device)
        with self.evaluating(), self.precision.autocast():
            return classify(self.model, pixels, classes)[0].tolist()

    def subject(self, image: Image.Image, question: str | None) -> Opened:
        if question is None:
            raise UserError(f"{self.folder} compares images with texts: give it --text")
        return pair_subject(self, image, check_text(question, EMPTY))

    def export(self, folder: Path) -> list[str]:
        return export_clip(self, folder)

    def texts_and_images(self) -> list[VQASample]:
        options = self.options
        texts = read_texts(options.data or built_in(options), options.test_split, seed=options.seed)
        return first_images(to_describe(texts), options.test_images)


def _tokenizers(options: CLIPOptions, text: Tokenizer) -> Tokenizers:
    return Tokenizers(text, None, max_question_tokens=options.max_caption_tokens)
