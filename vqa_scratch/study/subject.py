"""The subjects: how each kind of model is run and read. Every class takes the model and its inputs directly.

Shapes: n images, C channels, H x W pixels, S source tokens, T rows of the writer, V vocabulary or labels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.generate import greedy
from vqa_scratch.models.blip2 import Blip2
from vqa_scratch.models.caption import CaptionModel
from vqa_scratch.models.t5 import T5
from vqa_scratch.models.vilt import ViLTClassifier
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.nn.memory import Memory
from vqa_scratch.study.base import ImageSubject, Source, Subject, block_attentions, image_source


def question_source(encoder: nn.Module | None, labels: Sequence[str], special: Sequence[int]) -> Source:
    """The tokens of a question, named by `labels`; `special` are the places of separators among them."""
    return Source("text", tuple(labels), tuple(special), attentions=block_attentions("text", encoder))


def _written(subject: Subject, decoder: nn.Module, prompt: Tensor, memory: list[Memory], limit: int) -> list[int]:
    """The new tokens after a prompt (1, T)."""
    made = greedy(decoder, prompt, None, memory, max_new_tokens=limit, eos_id=subject.end_id)
    return made.ids[0, : int(made.lengths[0])].tolist()


class CaptionSubject(ImageSubject):
    """An image that a decoder reads by cross-attention: a caption, or an answer with its question in the prompt.

    `prompt` is what the decoder starts from, BOS at least.
    """

    def __init__(self, model: CaptionModel, pixel_values: Tensor, prompt: list[int], max_new_tokens: int = 32) -> None:
        assert len(pixel_values) == 1
        self.model, self.decoder, self.prompt, self.max_new_tokens = model, model.decoder, prompt, max_new_tokens
        self.pixel_values = pixel_values.to(self.device)
        self.head, self.end_id = model.decoder.tokens.weight, model.decoder.config.eos_id
        self.sources = (image_source(model.image, pixel_values, block_attentions("image", model.image)),)
        self.mixing = torch.eye(len(self.sources[0]))

    def reads(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the model takes beside the decoder's tokens, for n images."""
        return (images,)

    def logits_of(self, images: Tensor, decoder_ids: list[int]) -> Tensor:
        ids = torch.tensor([decoder_ids], device=self.device).expand(len(images), -1)
        return self.model(*self.reads(images), ids).logits

    @torch.no_grad()
    def generate(self, max_new_tokens: int | None = None) -> list[int]:
        memory = self.model.memory(*self.reads(self.pixel_values))
        prompt = torch.tensor([self.prompt], device=self.device)
        return _written(self, self.decoder, prompt, memory, max_new_tokens or self.max_new_tokens)


class VQASubject(CaptionSubject):
    """A question about an image, both read by the decoder's cross-attention.

    pixel_values (1, C, H, W); question_ids as the text encoder reads them, unpadded; `question_labels` name them;
    `special` are the places of separators among them; `prompt` is what the decoder starts from, BOS at least.
    """

    def __init__(
        self,
        model: VQAModel,
        pixel_values: Tensor,
        question_ids: list[int],
        question_labels: Sequence[str],
        special: Sequence[int],
        prompt: list[int],
        max_new_tokens: int = 8,
    ) -> None:
        assert len(question_ids) == len(question_labels)
        super().__init__(model, pixel_values, prompt, max_new_tokens)
        self.input_ids = torch.tensor([question_ids], device=self.device)
        self.sources += (question_source(model.text, question_labels, special),)
        image, text = (len(source) for source in self.sources)
        pooled = torch.cat([torch.full((1, n), 0.5 / n) for n in (image, text)], 1)  # (1, S)
        self.mixing = pooled if model.fusion == "mean" else torch.eye(image + text)

    def reads(self, images: Tensor) -> tuple[Tensor, ...]:
        ids = self.input_ids.expand(len(images), -1)
        return images, ids, torch.ones_like(ids, dtype=torch.bool)


class Blip2Subject(ImageSubject):
    """An image and words before a BLIP-2: the states of its queries are the prefix of the language model.

    `prompt` are the words that the language model starts from, its start token at least.
    """

    def __init__(self, model: Blip2, pixel_values: Tensor, prompt: list[int], max_new_tokens: int = 32) -> None:
        assert len(pixel_values) == 1
        self.model, self.decoder, self.prompt, self.max_new_tokens = model, model.language, prompt, max_new_tokens
        self.pixel_values = pixel_values.to(self.device)
        self.head, self.end_id = model.language.tokens.weight, model.language.config.eos_id
        self.prefix = model.config.queries
        image = image_source(model.vision, pixel_values, block_attentions("image", model.vision))
        queries = tuple(f"query {i + 1}" for i in range(self.prefix))
        self.sources = (image, Source("query", queries, (), None, block_attentions("query", model.qformer), "image"))
        self.mixing = torch.eye(len(image) + self.prefix)[len(image) :]

    def logits_of(self, images: Tensor, decoder_ids: list[int]) -> Tensor:
        ids = torch.tensor([decoder_ids], device=self.device).expand(len(images), -1)
        return self.model(images, ids)[:, self.prefix :]

    @torch.no_grad()
    def generate(self, max_new_tokens: int | None = None) -> list[int]:
        prompt, _ = self.model.prompt(torch.tensor([self.prompt], device=self.device))
        memory = [Memory(self.model.encode_image(self.pixel_values))]
        return _written(self, self.model, prompt, memory, max_new_tokens or self.max_new_tokens)


class ViLTSubject(ImageSubject):
    """A question about an image in one stream: words, class token and patches, and the answer off the first word.

    Arguments as for `VQASubject`; an answer is the index of a label. Its maps have one row, that of the first token,
    but for the plain map of weights: there it is the mean over the question's tokens.
    """

    writer = "encoder"

    def __init__(
        self,
        model: ViLTClassifier,
        pixel_values: Tensor,
        question_ids: list[int],
        question_labels: Sequence[str],
        special: Sequence[int],
    ) -> None:
        assert len(pixel_values) == 1 and len(question_ids) == len(question_labels)
        self.model, self.decoder, self.prompt, self.max_new_tokens = model, model.vilt.tower, question_ids[:1], 1
        self.pixel_values = pixel_values.to(self.device)
        self.input_ids = torch.tensor([question_ids], device=self.device)
        self.sources = (question_source(None, question_labels, special), image_source(model.vilt.tower, pixel_values))
        self.prefix = sum(map(len, self.sources))
        self.mixing = torch.eye(self.prefix)

    def rows(self, x: Tensor) -> Tensor:
        return x[..., :1, :]

    def readers(self, pattern: Tensor) -> Tensor:
        return pattern[..., self.where("text"), :].mean(-2, keepdim=True)

    def logits_of(self, images: Tensor, decoder_ids: list[int]) -> Tensor:
        return self.model(images, self.input_ids.expand(len(images), -1))[:, None]

    @torch.no_grad()
    def generate(self, max_new_tokens: int | None = None) -> list[int]:
        return [int(self.logits(self.prompt)[0].argmax())]

    def readout(self, states: Tensor) -> Tensor:
        pooled = torch.tanh(self.model.vilt.pooler(self.decoder.norm(states)))
        return self.model.out(F.gelu(self.model.norm(self.model.up(pooled))))

    def log_probabilities(self, logits: Tensor) -> Tensor:
        return F.logsigmoid(logits.float())  # each label has a probability of its own


class T5Subject(Subject):
    """A T5 reading `input_ids`, whose tokens `labels` name; the end token is a sink."""

    def __init__(self, model: T5, input_ids: list[int], labels: Sequence[str], max_new_tokens: int = 32) -> None:
        assert len(input_ids) == len(labels)
        self.model, self.decoder, self.max_new_tokens = model, model.decoder, max_new_tokens
        self.input_ids = torch.tensor([input_ids], device=self.device)
        config = model.config
        sinks = tuple(i for i, token in enumerate(input_ids) if token in (config.eos_id, config.pad_id))
        self.sources = (Source("encoder", tuple(labels), sinks, attentions=block_attentions("encoder", model.encoder)),)
        self.mixing = torch.eye(len(input_ids))
        self.prompt, self.end_id = [config.start_id], config.eos_id
        weight = model.embedding.weight if model.head is None else model.head.weight
        self.head = weight.detach() * (config.dim**-0.5 if config.scaled else 1.0)

    def logits(self, decoder_ids: list[int]) -> Tensor:
        return self.model(self.input_ids, None, torch.tensor([decoder_ids], device=self.device))[0]

    @torch.no_grad()
    def generate(self, max_new_tokens: int | None = None) -> list[int]:
        cache, states = self.model.new_cache(), self.model.encode(self.input_ids)
        answer, new = [], self.prompt
        while len(answer) < (max_new_tokens or self.max_new_tokens) and self.end_id not in answer:
            hidden = self.model.decode_hidden(torch.tensor([new], device=self.device), states, cache=cache)
            new = [int(self.model.logits(hidden[:, -1]).argmax())]
            answer += new
        return answer
