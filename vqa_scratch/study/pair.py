"""A pair: an image and a text that a CLIP or SigLIP compares, and each word of the text alone.

Nothing is written: the "answer" is the whole text and then its words, each with its similarity to the image. Two maps
are of such a model only, both signed:

nearness  each image token through the head as if it were all that is read (of a CLIP: last norm and projection), its
          similarity to the text, less the mean over places. It says what a token holds, and adds up to nothing: of a
          CLIP the class token's own is the similarity.
parts     what each image token adds to the similarity directly, through the attention of the token that is pooled
          (Gandelsman, Efros and Steinhardt 2024, 2310.05916, equations 3 to 5; the last norm and the length of the
          vector are held fixed, as in `lens.py`). With the rest, MLPs, biases and start of that token, it is the
          similarity exactly.

Shapes: N image tokens, S source tokens, V texts, D width of the image tower, P width of the common space.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.models.clip import CLIP, ClassTokenHead, precise
from vqa_scratch.study.base import Flow, ImageSubject, Source, block_attentions, image_source
from vqa_scratch.study.lens import frozen_norm
from vqa_scratch.study.names import attention_at
from vqa_scratch.study.trace import Trace


class PairSubject(ImageSubject):
    """A CLIP or SigLIP with an image and a text `input_ids` (1, T), and the vectors (V - 1, P) of its words alone.

    The first row of the writer's attentions is the token that is pooled: the class token of the image tower, which is
    one stream, or the probe that reads the states of a SigLIP's. Each text has a row of its own in a map.
    """

    measure, has_lens = "similarity", False

    def __init__(
        self,
        model: CLIP,
        pixel_values: Tensor,
        input_ids: Tensor,
        labels: Sequence[str],
        special: Sequence[int],
        words: Tensor,
    ) -> None:
        assert len(pixel_values) == len(input_ids) == 1 and len(labels) == input_ids.shape[1]
        self.model: CLIP = model
        self.decoder, self.prompt, self.max_new_tokens = model.image, [0], 1 + len(words)
        self.pixel_values, self.input_ids = pixel_values.to(self.device), input_ids.to(self.device)
        self.words, self.head_of_image = words.to(self.device), model.image_head
        blocks, probed = block_attentions("image", model.image), not isinstance(model.image_head, ClassTokenHead)
        image = image_source(model.image, pixel_values, blocks if probed else ())
        read = int(model.text.read_position(input_ids)[0])  # the token whose state is the text's
        words_of = block_attentions("text", model.text)
        text = Source("text", tuple(labels), tuple(special), attentions=words_of, asked=read)
        self.sources, self.writer = (image, text), "probe" if probed else "image"
        self.prefix, self.mixing = 0 if probed else len(image), torch.eye(len(image), len(image) + len(text))

    @property
    def attentions(self) -> list[str]:
        return super().attentions if self.prefix else ["probe.0.cross"]

    def rows(self, x: Tensor) -> Tensor:
        return x[..., :1, :].expand(*x.shape[:-2], 1 + len(self.words), -1)

    @property
    def texts(self) -> Tensor:
        """(V, P): the vectors of the whole text and of its words."""
        return torch.cat([self.model.embed_texts(self.input_ids), self.words])

    def logits_of(self, images: Tensor, decoder_ids: list[int]) -> Tensor:
        similar = self.model.embed_images(images) @ self.texts.T
        return similar[:, None].expand(-1, len(decoder_ids), -1)

    @torch.no_grad()
    def generate(self, max_new_tokens: int | None = None) -> list[int]:
        return list(range(self.logits(self.prompt).shape[1]))

    def readout(self, states: Tensor) -> Tensor:
        raise ValueError("a pair has no logits to read off its states")

    def added(self, t: Trace, pooled: Tensor) -> Tensor:
        """(N, P): what each image token adds to the vector of the image, before it is brought to length 1; `pooled`
        (D,) is the last state of the class token."""
        total = torch.zeros_like(pooled)
        for name in self.reading:
            module, pattern = attention_at(t.modules, name), t.pattern(name)[0, :, 0]  # (H, N)
            out = module.out.weight.unflatten(1, (module.heads, module.head_dim))  # (D, H, d)
            total = total + torch.einsum("hn,hnd,ehd->ne", pattern, t[f"{name}.v"][0].float(), out.float())
        head = self.head_of_image
        if not isinstance(head, ClassTokenHead):
            return total
        return frozen_norm(head.norm, pooled)(total) @ head.projection.weight.float().T

    @torch.no_grad()
    def more_flows(self, t: Trace) -> dict[str, Flow]:
        with self.trace(record=False):
            tokens = self.model.image(self.pixel_values)
            whole = precise(self.head_of_image(tokens))[0]
            texts, (_, places) = self.texts, self.image
        alone = F.normalize(precise(self.head_of_image(tokens[0][:, None])), dim=-1)
        near = (texts @ alone.T).cpu()  # (V, N)
        near = near - near[:, places].mean(1, keepdim=True)
        parts = (texts @ self.added(t, precise(tokens[0, 0])).T / whole.norm()).cpu()
        beside = self.mixing.shape[1] - near.shape[1]
        return {
            name: Flow(F.pad(values, (0, beside)), values[:, :0])
            for name, values in (("nearness", near), ("parts", parts))
        }
