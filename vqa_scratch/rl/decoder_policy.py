"""A decoder that reads what is before a response in its own sequence, as PPO's backbone.

Prompts are padded on the left and positions count real tokens, so a response depends on its own prompt alone. Padding
is known by lengths, never by ids: it may be an end token.

Shapes: P prompts, K samples a prompt, B = P * K responses, R response tokens, L tokens before a response, D width.
"""

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from vqa_scratch.generate import Decoder, State, begin
from vqa_scratch.generate.start import padding
from vqa_scratch.models.hf_config import ReleasedDecoder
from vqa_scratch.rl.policy import Backbone, Context, padded
from vqa_scratch.rl.types import Prompt


class DecoderPolicy(Backbone):
    """The last of a context's `prompt_ids` is the decoder's first input."""

    @property
    @abstractmethod
    def decoder(self) -> Decoder:
        """What writes the response."""

    def before(self, context: Context) -> tuple[Tensor, Tensor]:
        """What stands before each response: ids (B, L), and which of them are real."""
        assert context.prompt_ids is not None and context.prompt_mask is not None  # made by `encode`
        rows = context.prompt_of_row(context.prompt_ids.device)
        return context.prompt_ids[rows], context.prompt_mask[rows]

    def begin(self, context: Context, steps: int) -> tuple[Tensor, State]:
        return begin(self.decoder, *self.before(context), context.given(), steps=steps)

    def decode_hidden(self, ids: Tensor, context: Context) -> Tensor:
        before, real = self.before(context)
        answers = ids[:, 1:]  # without the first input, which `before` has
        mask = torch.cat([real, torch.ones_like(answers, dtype=torch.bool)], 1)
        embeddings = self.decoder.embed(torch.cat([before, answers], 1))
        return self.decoder.hidden_after(context.given(), embeddings, mask)[:, -ids.shape[1] :]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden)


class LanguagePolicy(DecoderPolicy):
    """A GPT-2, OPT or Llama. All but the last token of a prompt are a prefix, which its responses share."""

    def __init__(self, model: ReleasedDecoder, pad_id: int, eos_id: int | tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.width = model, model.head.shape[1]
        self.pad_id = self.start_id = pad_id
        self.eos_id = eos_id

    @property
    def decoder(self) -> Decoder:
        return self.model

    def encode(self, prompts: list[Prompt]) -> Context:
        ids, real = padded([p.ids for p in prompts], self.pad_id, self.model.head.device, "left")
        return Context((), prompt_ids=ids, prompt_mask=real)

    def begin(self, context: Context, steps: int) -> tuple[Tensor, State]:
        return super().begin(self.with_prefix(context), steps)

    def decode_hidden(self, ids: Tensor, context: Context) -> Tensor:
        return super().decode_hidden(ids, self.with_prefix(context))

    def with_prefix(self, context: Context) -> Context:
        """The same, with only the last token of each prompt among the ids."""
        ids, real = context.prompt_ids, context.prompt_mask
        assert ids is not None and real is not None  # made by `encode`
        if ids.shape[1] == 1:
            return context
        prefix, mask = self.model.embed(ids[:, :-1]), padding(real[:, :-1])
        return replace(context, prompt_ids=ids[:, -1:], prompt_mask=real[:, -1:], prefix=prefix, prefix_mask=mask)

    def encoder_parameters(self) -> list[nn.Parameter]:
        return []
