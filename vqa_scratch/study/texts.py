"""The subjects that read a text alone: a T5, and a decoder that goes on from it."""

from collections.abc import Sequence
from typing import Any

import torch

from vqa_scratch.generate import Generated, generate
from vqa_scratch.generation_options import GenerationOptions
from vqa_scratch.models.hf_config import ReleasedDecoder
from vqa_scratch.models.t5 import T5
from vqa_scratch.nn.connecting import Conditioning
from vqa_scratch.nn.memory import Memory
from vqa_scratch.study.base import Source, block_attentions
from vqa_scratch.study.subject import WritingSubject, question_source


class T5Subject(WritingSubject):
    """A T5 that reads `input_ids`, with their `labels`; the end token is a sink."""

    model: T5

    def __init__(self, model: T5, input_ids: list[int], labels: Sequence[str], max_new_tokens: int = 32) -> None:
        assert len(input_ids) == len(labels)
        config = model.config
        super().__init__(model, model, [config.start_id], max_new_tokens)
        self.decoder = model.decoder
        self.input_ids = torch.tensor([input_ids], device=self.device)
        sinks = tuple(i for i, token in enumerate(input_ids) if token in (*self.end_ids, config.pad_id))
        self.sources = (Source("encoder", tuple(labels), sinks, attentions=block_attentions("encoder", model.encoder)),)
        self.mixing = torch.eye(len(input_ids))

    def conditioning(self, tokens: int) -> Conditioning:
        return Conditioning([Memory(self.model.encode(self.input_ids))])


class LanguageSubject(WritingSubject):
    """A GPT-2, OPT or Llama that goes on from the `ids` of a text, two or more, with their `labels`; `special` are the
    indices of separators.

    All but the last are the prefix of its sequence, so that maps are over them. The first is a sink, whatever it says
    (Xiao et al. 2023, arXiv 2309.17453).
    """

    own_sinks = 0

    def __init__(
        self, model: ReleasedDecoder, ids: list[int], labels: Sequence[str], special: Sequence[int], most: int = 32
    ) -> None:
        assert 1 < len(ids) == len(labels)
        super().__init__(model, model, ids[-1:], most)
        self.decoder, self.input_ids = model, torch.tensor([ids], device=self.device)
        self.prefix = len(ids) - 1
        self.sources = (question_source(None, labels[:-1], [0, *(i for i in special if 0 < i < self.prefix)]),)
        self.mixing = torch.eye(self.prefix)

    def write(self, options: GenerationOptions, **how: Any) -> Generated:
        return generate(self.language, self.input_ids, options=options, **how)  # some options are about all tokens

    def conditioning(self, tokens: int) -> Conditioning:
        return Conditioning(prefix=self.language.embed(self.input_ids[:, :-1]))
