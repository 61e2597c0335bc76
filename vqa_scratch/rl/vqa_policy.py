"""A trained visual question answering system as PPO's policy, and the official accuracy as its reward.

The prompt is an image with a question; the decoder reads the question's tokens (if it was trained so) and BOS before
the answer. Both parts of the memory, image and question, are encoded once for all sampled answers; an image that
several prompts ask about is encoded, and its keys projected, once for all of them.

Shapes: P prompts, I different images, K samples a prompt, B = P * K answers, R answer tokens, L tokens before the
answer, D width.
"""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from vqa_scratch.data.batches import Encoder, Ragged
from vqa_scratch.data.images import ImageProcessor, load_image
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.generate import State, begin
from vqa_scratch.metrics import vqa_accuracy
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.rl.policy import Context
from vqa_scratch.rl.types import Prompt, Samples

IMAGES_KEPT = 4096  # decoded images held in memory


def prompts_from(samples: list[VQASample], encoder: Encoder) -> list[Prompt]:
    """Questions as prompts; the annotators' majority answer is the reference that samples.html shows."""
    return [Prompt(s.question, tuple(encoder.question(s.question)), s.answer, payload=s) for s in samples]


def official_accuracy(samples: Samples) -> Tensor:
    """(B,): the official VQA accuracy of each answer, in [0, 1]."""
    pairs = zip(samples.texts, samples.prompts, strict=True)
    return torch.tensor([vqa_accuracy(text.strip(), prompt.payload.answers) for text, prompt in pairs])


class VQAPolicy(nn.Module):
    """A `VQAModel` as PPO's backbone."""

    def __init__(self, model: VQAModel, encoder: Encoder, processor: ImageProcessor) -> None:
        super().__init__()
        self.model, self.encoder, self.processor = model, encoder, processor
        config, tokenizer = model.decoder.config, encoder.decoder
        self.width = config.dim
        self.start_id, *_, self.eos_id = encoder.answer("yes")
        self.pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else self.eos_id
        self._pixels = lru_cache(IMAGES_KEPT)(self._read)

    def __deepcopy__(self, memo: dict) -> "VQAPolicy":
        """A copy of the weights; tokenizers and images are shared."""
        model = VQAModel.from_config(self.model.config).to(next(self.model.parameters()).device)
        model.load_state_dict(self.model.state_dict())
        copy = VQAPolicy(model, self.encoder, self.processor)
        copy._pixels = self._pixels
        return copy

    def _read(self, path: Path) -> Tensor:
        return torch.from_numpy(self.processor.to_uint8(load_image(path)).copy())

    def encode(self, prompts: list[Prompt]) -> Context:
        device = self.model.decoder.head.device
        paths = [p.payload.image_path for p in prompts]
        place = {path: number for number, path in enumerate(dict.fromkeys(paths))}
        which = torch.tensor([place[path] for path in paths])  # (P,)
        pixels = torch.stack([self._pixels(path) for path in place]).to(device)  # (I, H, W, 3)
        rows = range(len(prompts))
        ids, lengths = Ragged([p.ids for p in prompts]).padded(rows, self.encoder.text.pad_id or 0)
        mask = torch.arange(ids.shape[1]) < torch.from_numpy(lengths)[:, None]
        text = self.model.encode_text(torch.from_numpy(ids).to(device), mask.to(device))
        image = self.model.encode_image(self.processor.normalize(pixels))
        parts = self.model.fuse(image, text, mask.to(device), which)

        before = [[*self.encoder.prompt(p.text), self.start_id] for p in prompts]
        longest = max(map(len, before))
        ids = torch.tensor([[self.pad_id] * (longest - len(x)) + x for x in before], device=device)  # (P, L)
        real = torch.tensor([[False] * (longest - len(x)) + [True] * len(x) for x in before], device=device)
        states, masks = tuple(m.states for m in parts), tuple(m.mask for m in parts)
        read = which.to(device) if len(place) < len(prompts) else None  # by how many prompts an image is shared
        entries = tuple(read if len(x) == len(place) else None for x in states)
        return Context(states, masks, prompt_ids=ids, prompt_mask=real, entries=entries)

    def _prompt(self, context: Context) -> tuple[Tensor, Tensor]:
        """What the decoder reads before each answer (B, L), the start token last, and which of it is real."""
        return tuple(x.repeat_interleave(context.samples, 0) for x in (context.prompt_ids, context.prompt_mask))

    def begin(self, context: Context, steps: int) -> tuple[Tensor, State]:
        prompt, real = self._prompt(context)
        return begin(self.model.decoder, prompt, real, context.memories(), steps=steps)

    def decode_hidden(self, ids: Tensor, context: Context) -> Tensor:
        prompt, real = self._prompt(context)
        answers = ids[:, 1:]  # without the start token
        mask = torch.cat([real, torch.ones_like(answers, dtype=torch.bool)], 1)
        embeddings = self.model.decoder.embed(torch.cat([prompt, answers], 1))
        hidden = self.model.decoder.hidden(embeddings, mask, memory=context.memories())
        return hidden[:, -ids.shape[1] :]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.decoder.logits(hidden)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Everything but the decoder."""
        return [p for name, p in self.model.named_parameters() if not name.startswith("decoder.")]


def check_answers(samples: list[VQASample], what: str) -> None:
    """The reward needs annotators' answers. Raises UserError if a sample has none."""
    for sample in samples:
        if not sample.answers:
            raise UserError(f"question {sample.question_id} of {what} has no answers: the reward is the VQA accuracy")
