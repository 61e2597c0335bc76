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

from vqa_scratch.data.images import ImageProcessor, load_image
from vqa_scratch.data.tokenizers import Tokenizers
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.generate import Decoder
from vqa_scratch.metrics import vqa_accuracy
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.rl.decoder_policy import DecoderPolicy
from vqa_scratch.rl.policy import Context, Part, padded
from vqa_scratch.rl.types import Prompt, Samples

IMAGES_KEPT = 4096  # decoded images held in memory


def prompts_from(samples: list[VQASample], tokenizers: Tokenizers) -> list[Prompt]:
    """Questions as prompts; the annotators' majority answer is the reference that samples.html shows."""
    return [Prompt(s.question, tuple(tokenizers.question(s.question)), s.answer, payload=s) for s in samples]


def official_accuracy(samples: Samples) -> Tensor:
    """(B,): the official VQA accuracy of each answer, in [0, 1]."""
    pairs = zip(samples.texts, samples.prompts, strict=True)
    return torch.tensor([vqa_accuracy(text.strip(), prompt.payload.answers) for text, prompt in pairs])


class VQAPolicy(DecoderPolicy):
    """A `VQAModel` as PPO's backbone."""

    def __init__(self, model: VQAModel, tokenizers: Tokenizers, processor: ImageProcessor) -> None:
        super().__init__()
        self.model, self.tokenizers, self.processor = model, tokenizers, processor
        self.width = model.decoder.config.dim
        self.start_id, self.eos_id = tokenizers.start_id, tokenizers.end_id
        self.pad_id = self.eos_id if tokenizers.decoder.pad_id is None else tokenizers.decoder.pad_id
        self._pixels = lru_cache(IMAGES_KEPT)(self._read)  # shared by copies of the policy

    def _read(self, path: Path, upright: bool) -> Tensor:
        return torch.from_numpy(self.processor.to_uint8(load_image(path, upright=upright)).copy())

    def encode(self, prompts: list[Prompt]) -> Context:
        model, device = self.model, self.model.decoder.head.device
        paths = [(p.payload.image_path, p.payload.upright) for p in prompts]
        place = {path: number for number, path in enumerate(dict.fromkeys(paths))}
        which = torch.tensor([place[path] for path in paths])  # (P,)
        pixels = torch.stack([self._pixels(*path) for path in place]).to(device)  # (I, H, W, 3)
        text = None
        if model.text is not None:
            fill = self.tokenizers.by_name["text"].pad_id or 0
            text = model.text.states(*padded([p.ids for p in prompts], fill, device))
        image = model.image.states(self.processor.normalize(pixels))
        given = model.connector(image, text, which.to(device))

        before = [[*self.tokenizers.prompt(p.text), self.start_id] for p in prompts]
        ids, real = padded(before, self.pad_id, device, "left")  # (P, L)
        read = which.to(device) if len(place) < len(prompts) else None  # by how many prompts an image is shared
        parts = (
            Part(memory.states, memory.mask, read if len(memory.states) == len(place) else None)
            for memory in given.memory or ()
        )
        prefix = None if given.prefix is None else given.prefix[which.to(device)]
        return Context(tuple(parts), prompt_ids=ids, prompt_mask=real, prefix=prefix)

    @property
    def decoder(self) -> Decoder:
        return self.model.decoder

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Everything but the decoder."""
        return [p for name, p in self.model.named_parameters() if not name.startswith("decoder.")]
