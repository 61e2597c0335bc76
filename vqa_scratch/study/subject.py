"""What is studied: one input of one model, and how its decoder reads the towers before it.

Everything else in `study` works on a `Subject`, so that a VQA model (image and question read by a GPT-2) and a T5
(article read by its decoder) take the same path.

Shapes: T decoder tokens, K cross-attention keys, S source tokens (all towers, one after the other), D width,
V vocabulary. One row (B = 1) throughout.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqa_scratch.generate import greedy
from vqa_scratch.models.t5 import T5
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.nn.memory import Memory


@dataclass(frozen=True)
class Source:
    """One tower whose tokens the decoder reads. Patches, where there are any, are the last tokens, in raster order."""

    tower: str  # its taps' first segment: image, text or encoder
    labels: tuple[str, ...]  # a name for each token
    sinks: tuple[int, ...] = ()  # tokens without content of their own: class token, separators
    grid: tuple[int, int] | None = None  # (rows, columns) of the patches

    def __len__(self) -> int:
        return len(self.labels)


class Subject(ABC):
    """One input, ready to run. `mixing` (K, S) says which source tokens each cross-attention key is made of."""

    model: nn.Module
    decoder: nn.Module  # has `blocks` and `norm`
    sources: tuple[Source, ...]
    mixing: Tensor
    prompt: list[int]  # what the decoder starts from
    max_new_tokens: int

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def head(self) -> Tensor:
        """(V, D): logits = head @ normed state."""
        raise NotImplementedError

    @abstractmethod
    def logits(self, decoder_ids: list[int]) -> Tensor:
        """(T, V): the whole model, teacher-forced and without a cache, so that gradients reach every tower."""

    @abstractmethod
    def generate(self, max_new_tokens: int | None = None) -> list[int]:
        """Greedy decoding through the cache; the new tokens, the end token included if it came.

        At most `max_new_tokens`, or the subject's own limit.
        """

    @property
    @abstractmethod
    def end_id(self) -> int: ...

    def layers(self, tower: str) -> int:
        """How many blocks a tower has."""
        return len(getattr(self.model, tower).blocks)

    def slices(self) -> list[tuple[Source, slice]]:
        """Where each source sits among the S source tokens."""
        start, result = 0, []
        for source in self.sources:
            result.append((source, slice(start, start + len(source))))
            start += len(source)
        return result


class VQASubject(Subject):
    """A question about an image. pixel_values (1, C, H, W); question_ids as the text tower reads them, unpadded.

    `question_labels` name the question's tokens; `special` are the places of separators among them; `prompt` is what
    the decoder starts from, BOS at least.
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
        assert len(pixel_values) == 1 and len(question_ids) == len(question_labels)
        self.model, self.decoder, self.prompt, self.max_new_tokens = model, model.decoder, prompt, max_new_tokens
        self.pixel_values = pixel_values.to(self.device)
        self.input_ids = torch.tensor([question_ids], device=self.device)
        self.mask = torch.ones_like(self.input_ids, dtype=torch.bool)
        patch = model.image.config.patch_size
        rows, columns = (side // patch for side in pixel_values.shape[2:])
        patches = [f"patch {r + 1},{c + 1}" for r in range(rows) for c in range(columns)]
        self.sources = (
            Source("image", ("[class]", *patches), sinks=(0,), grid=(rows, columns)),
            Source("text", tuple(question_labels), sinks=tuple(special)),
        )
        image, text = (len(source) for source in self.sources)
        if model.fusion == "mean":
            self.mixing = torch.cat([torch.full((1, n), 0.5 / n) for n in (image, text)], 1)  # (1, S)
        else:
            self.mixing = torch.eye(image + text)

    @property
    def head(self) -> Tensor:
        return self.decoder.head

    @property
    def end_id(self) -> int:
        return self.model.decoder.config.eos_id

    def logits(self, decoder_ids: list[int]) -> Tensor:
        ids = torch.tensor([decoder_ids], device=self.device)
        return self.model(self.pixel_values, self.input_ids, self.mask, ids).logits[0]

    @torch.no_grad()
    def generate(self, max_new_tokens: int | None = None) -> list[int]:
        memory = self.model.memory(self.pixel_values, self.input_ids, self.mask)
        prompt = torch.tensor([self.prompt], device=self.device)
        limit = max_new_tokens or self.max_new_tokens
        made = greedy(self.decoder, prompt, None, memory, max_new_tokens=limit, eos_id=self.end_id)
        return made.ids[0, : int(made.lengths[0])].tolist()


class T5Subject(Subject):
    """A T5 reading `input_ids`, whose tokens `labels` name; the end token is a sink."""

    def __init__(self, model: T5, input_ids: list[int], labels: Sequence[str], max_new_tokens: int = 32) -> None:
        assert len(input_ids) == len(labels)
        self.model, self.decoder, self.max_new_tokens = model, model.decoder, max_new_tokens
        self.input_ids = torch.tensor([input_ids], device=self.device)
        special = (model.config.eos_id, model.config.pad_id)
        sinks = tuple(i for i, token in enumerate(input_ids) if token in special)
        self.sources = (Source("encoder", tuple(labels), sinks=sinks),)
        self.mixing = torch.eye(len(input_ids))
        self.prompt = [model.config.start_id]

    @property
    def head(self) -> Tensor:
        return self.model.head

    @property
    def end_id(self) -> int:
        return self.model.config.eos_id

    def logits(self, decoder_ids: list[int]) -> Tensor:
        return self.model(self.input_ids, None, torch.tensor([decoder_ids], device=self.device))[0]

    @torch.no_grad()
    def generate(self, max_new_tokens: int | None = None) -> list[int]:
        memory = [Memory(self.model.encode(self.input_ids))]
        prompt = torch.tensor([self.prompt], device=self.device)
        limit = max_new_tokens or self.max_new_tokens
        made = greedy(self.model, prompt, None, memory, max_new_tokens=limit, eos_id=self.end_id)
        return made.ids[0].tolist()
