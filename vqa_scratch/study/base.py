"""A subject: one input of one model, ready to run. Its sources are the input tokens, and its writer answers.

Everything else in `study` works on a `Subject`, whatever the model:

* a decoder whose cross-attention reads sources: a VQA model, a captioner, a T5;
* a decoder whose own sequence begins with the image, the prefix: BLIP-2, LLaVA, Fuyu; or with a text: GPT-2, Llama;
* a single stream whose own sequence is all sources: a ViLT, which reads its answer off the first token.

`subject.py`, `texts.py` and `pair.py` have one class a model. Shapes: S source tokens, X tokens of the writer's own
sequence, T of them rows that a map is made for, K keys of cross-attention or tokens of the prefix, D width, V
vocabulary. The batch is always 1.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqa_scratch.models.hf_config import ReleasedDecoder
from vqa_scratch.models.t5 import T5Stack
from vqa_scratch.models.vit import ViT
from vqa_scratch.nn.gated_cross import GatedCrossAttention
from vqa_scratch.nn.states import ImageEncoder, Places
from vqa_scratch.study.trace import Trace, trace


@dataclass(frozen=True)
class Source:
    """Some of the input tokens. Those that are places of an image come last, in raster order."""

    name: str  # image, text, encoder, query: the first segment of its taps, if it has blocks of its own
    labels: tuple[str, ...]  # one for each token
    sinks: tuple[int, ...] = ()  # tokens without content: class token, separators
    places: Places | None = None
    attentions: tuple[str, ...] = ()  # of its own blocks, in the order they run
    reads: str | None = None  # the source that its cross-attention reads: learned queries read the image
    asked: int = 0  # the token whose attention a page shows first

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def of_image(self) -> bool:
        """Whether its tokens are about the image."""
        return self.places is not None or self.reads is not None


@dataclass(frozen=True)
class Change:
    """Something that is changed in a model while it runs on one input."""

    about: dict[str, Any]  # which change, as data that a page can show and a file can hold
    make: Callable[[Trace], None]  # makes it in a trace that is to be entered


@dataclass(frozen=True)
class Flow:
    """How much each source token and each of the writer's own tokens matters, for each row of the writer."""

    sources: Tensor  # (T, S)
    decoder: Tensor  # (T, X - prefix)


class Subject(ABC):
    """One input, ready to run.

    `mixing` (K, S) gives the source tokens that make up each key of cross-attention or, with a `prefix`, each token of
    the prefix.
    """

    model: nn.Module
    decoder: ReleasedDecoder | T5Stack | ViT  # the writer
    writer: str = "decoder"  # the first segment of its taps
    sources: tuple[Source, ...]
    mixing: Tensor
    prefix: int = 0  # K if the writer's own sequence begins with that many tokens of sources; 0: cross-attention
    prompt: list[int]  # what the writer starts from
    max_new_tokens: int
    head: Tensor | None = None  # (V, D), where logits = head @ normed state, and states are a plain sum
    end_ids: tuple[int, ...] = ()  # each ends an answer
    own_sinks: int = 1  # how many of its own tokens, from the first on, have no content
    measure: str = "probability"  # what the number beside each token of the answer is
    has_lens: bool = True  # whether the writer's states can be read off after any block
    changes: tuple[Change, ...] = ()  # made in every pass of `trace`, and in no other

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def layers(self) -> int:
        """How many blocks the writer has."""
        return len(self.decoder.blocks)

    @property
    def gated(self) -> list[GatedCrossAttention]:
        """The layers before the writer's blocks that read sources; none if the blocks do it themselves."""
        return list(self.gated_at.values())

    @property
    def gated_at(self) -> dict[int, GatedCrossAttention]:
        """The same by the number of the block."""
        layers = ((i, getattr(block, "gated", None)) for i, block in enumerate(self.decoder.blocks))
        return {i: layer for i, layer in layers if layer is not None}

    @property
    def attentions(self) -> list[str]:
        """The writer's attentions, in the order they run."""
        gated = self.gated_at
        kinds = [("self",) if self.prefix or gated else ("self", "cross")] * self.layers
        for i in gated:
            kinds[i] = ("cross", "self")
        return [f"{self.writer}.{i}.{kind}" for i, of_block in enumerate(kinds) for kind in of_block]

    @property
    def self_attentions(self) -> list[str]:
        """The writer's self-attentions, in order."""
        return [name for name in self.attentions if name.endswith(".self")]

    @property
    def reading(self) -> list[str]:
        """The writer's attentions that read sources, in order."""
        return [name for name in self.attentions if name.endswith(".self") == bool(self.prefix)]

    # ------------------------------------------------------------------------------------------ running it

    def trace(self, *patterns: str, grad: bool = False, record: bool = True) -> Trace:
        """A trace of the model, as `study.trace.trace` makes it, in which the `changes` are made."""
        t = trace(self.model, *patterns, grad=grad, record=record)
        for change in self.changes:
            change.make(t)
        return t

    @abstractmethod
    def logits(self, decoder_ids: list[int]) -> Tensor:
        """(T, V): a teacher-forced pass without a cache, so that gradients reach every encoder."""

    @abstractmethod
    def generate(self, max_new_tokens: int | None = None) -> list[int]:
        """The greedy answer, through the cache; with the end token if there is one.

        At most `max_new_tokens`, or the subject's own limit.
        """

    @abstractmethod
    def readout(self, states: Tensor) -> Tensor:
        """(..., T, D) -> (..., T, V): the logits if these were the last states."""

    def more_flows(self, t: Trace) -> dict[str, Flow]:
        """Maps that only this kind of model has; `t` is a trace of an answer."""
        return {}

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """(..., V) -> (..., V)."""
        return logits.float().log_softmax(-1)

    # ------------------------------------------------------------------------------------------ where tokens are

    def slices(self) -> list[tuple[Source, slice]]:
        """Where each source is among the S source tokens."""
        start, result = 0, []
        for source in self.sources:
            result.append((source, slice(start, start + len(source))))
            start += len(source)
        return result

    def where(self, name: str) -> slice:
        """The tokens of one source among the S."""
        return next(where for source, where in self.slices() if source.name == name)

    @property
    def image(self) -> tuple[Places, slice]:
        """The places of the source that has some, and where they are among the S. Raises ValueError without one."""
        for source, where in self.slices():
            if source.places is not None:
                return source.places, slice(where.stop - math.prod(source.places.grid), where.stop)
        raise ValueError("there is no image here: nothing to delete, insert or point at")

    def rows(self, x: Tensor) -> Tensor:
        """(..., X, _) -> (..., T, _): the writer's tokens that have a row in a map."""
        return x[..., self.prefix :, :]

    def readers(self, pattern: Tensor) -> Tensor:
        """(..., X, keys) -> (..., T, keys): the weights behind each row of the plain map."""
        return self.rows(pattern)

    def shares(self, name: str, weights: Tensor) -> Tensor:
        """Weights (..., keys) of one attention as shares of the S source tokens, then of the writer's own.

        The latter are left out if the attention cannot see them.
        """
        stream, _, kind = name.split(".")
        if stream == self.writer:
            given = len(self.mixing) if kind == "cross" else self.prefix
            return torch.cat([weights[..., :given] @ self.mixing[:given], weights[..., given:]], -1)
        source = next(source for source in self.sources if source.name == stream)
        result, own = weights.new_zeros(*weights.shape[:-1], self.mixing.shape[1]), self.where(stream)
        seen = self.where(source.reads) if kind == "cross" and source.reads else slice(own.start, own.start)
        read = seen.stop - seen.start
        result[..., seen] = weights[..., :read]
        if weights.shape[-1] > read:  # learned queries may read themselves too
            result[..., own] = weights[..., read:]
        return result


class ImageSubject(Subject):
    """A subject whose image can be replaced by others of its size. `pixel_values` (1, C, H, W)."""

    pixel_values: Tensor

    @abstractmethod
    def logits_of(self, images: Tensor, decoder_ids: list[int]) -> Tensor:
        """(n, C, H, W) -> (n, T, V): as `logits`, for each of n images."""

    def logits(self, decoder_ids: list[int]) -> Tensor:
        return self.logits_of(self.pixel_values, decoder_ids)[0]


def image_source(
    encoder: ImageEncoder, pixel_values: Tensor, attentions: tuple[str, ...] = (), marks: Sequence[str] = ()
) -> Source:
    """The tokens that an image encoder (see `nn/states.py`) makes of `pixel_values` (1, C, H, W), after the `marks` of
    the connector."""
    before = ["[class]", *(f"[token {i}]" for i in range(2, encoder.prefix_tokens + 1))][: encoder.prefix_tokens]
    before = [*(f"[{mark}]" for mark in marks), *before]
    return grid_source(encoder.places(*pixel_values.shape[2:]), before, attentions)


def grid_source(places: Places, before: Sequence[str], attentions: tuple[str, ...] = ()) -> Source:
    """The tokens of an image: those without a place, with these labels, and one for each of the `places`."""
    patches = [f"patch {r + 1},{c + 1}" for r in range(places.grid[0]) for c in range(places.grid[1])]
    return Source("image", (*before, *patches), tuple(range(len(before))), places, attentions)


def block_attentions(name: str, encoder: nn.Module | None) -> tuple[str, ...]:
    """The attentions of an encoder's blocks in the order they run; none for one without blocks, as a ResNet."""
    kinds = (("self", "attn"), ("cross", "cross"))
    blocks = enumerate(getattr(encoder, "blocks", ()))
    return tuple(f"{name}.{i}.{kind}" for i, block in blocks for kind, child in kinds if hasattr(block, child))
