"""ViLT: one transformer over the words of a question and the patches of an image. Kim et al. 2021 (arXiv 2102.03334).

The words are embedded as in BERT, the patches as in ViT; each side gets an embedding of its modality, and both go
through the blocks of a ViT as one sequence: words, class token, patches. So this ViLT is a ViT plus a Bert without
layers. The answer is read from the first word, [CLS].

Shapes: B questions, I images (B >= I: an image may serve several questions), T text tokens, N = h*w image tokens in
raster order, D width, L labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.hf_config import Released, fields_of, labels_from_hf, labels_to_hf
from vqa_scratch.models.vit import ViT, ViTConfig, ViTLayout, patch_grid
from vqa_scratch.nn import taps
from vqa_scratch.nn.layers import init_weights
from vqa_scratch.nn.states import Stem
from vqa_scratch.weights import fields, maps
from vqa_scratch.weights.convert import find, load_into

WORD, PATCH = 0, 1  # rows of the modality table
_ALL_PATCHES = {"max_image_length": -1}  # never a random selection of the patches


@dataclass(frozen=True)
class ViLTConfig(ViTConfig):
    """Sizes of a ViLT: patches and blocks as in a ViT, and words. The defaults are ViLT-B/32."""

    LAYOUTS: ClassVar[Mapping[str, ViTLayout]] = {
        "vilt": ViTLayout("ViltModel", fields.VILT, maps.VILT, fixed=_ALL_PATCHES)
    }

    image_size: int = 384  # pixels a side that the position table is made for
    patch_size: int = 32
    vocab_size: int = 30522
    max_positions: int = 40  # of words
    token_types: int = 2
    modalities: int = 2
    layout: str = "vilt"

    def __post_init__(self) -> None:
        self.words, self.tower  # noqa: B018 (they check the sizes)
        if self.modalities < 2:
            raise UserError(f"words and patches are two modalities, the table has {self.modalities}")

    @property
    def words(self) -> BertConfig:
        """The embedding of words: a Bert without layers."""
        return BertConfig(**fields_of(self, BertConfig) | {"layers": 0})

    @property
    def tower(self) -> ViTConfig:
        """The embedding of patches, and the blocks."""
        return ViTConfig(**fields_of(self, ViTConfig))

    def to_hf(self) -> dict[str, Any]:
        return super().to_hf() | _ALL_PATCHES


class ViLT(Released[ViLTConfig]):
    """Words, class token and patches in one sequence of pre-LN blocks; `patch_embed` as in `ViT`."""

    config_class = ViLTConfig

    def __init__(self, config: ViLTConfig, patch_embed: Stem | None = None) -> None:
        super().__init__()
        self.config = config
        self.words = Bert(config.words)
        self.tower = ViT(config.tower, patch_embed)
        self.modality = nn.Embedding(config.modalities, config.dim)
        self.pooler = nn.Linear(config.dim, config.dim)
        for layer in (self.modality, self.pooler):
            init_weights(layer, config.init_std)
        taps.name_modules(self.tower.blocks, "encoder")

    def _positions(self, size: tuple[int, int], whole: tuple[int, int]) -> Tensor:
        """(h*w of `whole`, D): the position table resized to `size` patches, bilinearly with aligned corners, in the
        top left corner of the grid `whole`; zeros elsewhere."""
        grid = self.config.tower.grid
        table = self.tower.positions[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)  # (1, D, rows, columns)
        if size != grid:
            table = F.interpolate(table, size=size, mode="bilinear", align_corners=True)
        if size != whole:
            table = F.pad(table, (0, whole[1] - size[1], 0, whole[0] - size[0]))
        return table[0].flatten(1).T

    def embed_images(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Embeddings (I, 1 + N, D), the class token first, and their mask (I, 1 + N), bool (None: all are real).

        pixel_values (I, C, H, W); pixel_mask (I, H, W), True in the top left rectangle that an image fills; its
        sides are multiples of the patch. Raises ValueError unless patches fit.
        """
        (height, width), tower, p = pixel_values.shape[2:], self.tower, self.config.patch_size
        whole = patch_grid(height, width, p)
        if pixel_mask is None:
            places, real = self._positions(whole, whole)[None], None
        else:
            if pixel_mask.shape != (len(pixel_values), *pixel_values.shape[2:]):
                raise ValueError(f"pixel_mask is {tuple(pixel_mask.shape)}, the images {tuple(pixel_values.shape)}")
            patches = pixel_mask[:, ::p, ::p].bool()  # (I, h, w), by the first pixel of each
            sizes = torch.stack([patches[:, :, 0].sum(1), patches[:, 0].sum(1)], 1).tolist()
            made = {size: self._positions(size, whole) for size in {tuple(size) for size in sizes}}
            places = torch.stack([made[tuple(size)] for size in sizes])  # (I, N, D)
            real = F.pad(patches.flatten(1), (1, 0), value=True)
        x = tower.patch_embed(pixel_values) + places
        first = (tower.get_parameter("cls_token") + tower.positions[:, :1]).expand(len(x), -1, -1)
        return tower.dropout(torch.cat([first, x], 1)), real

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """(B, D): the final state of the first word, after the pooler and tanh.

        input_ids, attention_mask (B, T), True = a real token; image_index (B,) says which image a question is about,
        None means one question an image; images as in `embed_images`. Raises ValueError on more words than positions.
        """
        words = self.words(input_ids, token_type_ids=token_type_ids) + self.modality.weight[WORD]
        images, real = self.embed_images(pixel_values, pixel_mask)
        images = images + self.modality.weight[PATCH]
        if image_index is not None:  # from here on each question needs its own copy
            images, real = images[image_index], None if real is None else real[image_index]
        x = torch.cat([words, images.to(words.dtype)], 1)  # (B, T + 1 + N, D)
        mask = None
        if attention_mask is not None or real is not None:
            mask = x.new_ones(x.shape[:2], dtype=torch.bool)
            if attention_mask is not None:
                mask[:, : words.shape[1]] = attention_mask.bool()
            if real is not None:
                mask[:, words.shape[1] :] = real
        *blocks, last = self.tower.blocks
        for block in blocks:
            x = block(x, mask)
        x = last(x, mask, first=1)
        return torch.tanh(self.pooler(self.tower.norm(x[:, 0])))


class ViLTClassifier(Released[ViLTConfig]):
    """A ViLT and two layers over the answers; `labels` names them in the order of the logits."""

    key_map = maps.VILT_CLASSIFIER

    def __init__(self, vilt: ViLT, labels: tuple[str, ...]) -> None:
        super().__init__()
        different = len(set(labels))
        if not labels or different != len(labels):
            raise UserError(f"a classifier needs different labels, got {len(labels)}, {different} of them different")
        self.vilt, self.labels = vilt, tuple(labels)
        width = vilt.config.dim
        self.up, self.norm = nn.Linear(width, 2 * width), nn.LayerNorm(2 * width)
        self.out = nn.Linear(2 * width, len(labels))
        for layer in (self.up, self.out):
            init_weights(layer, vilt.config.init_std)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any
    ) -> Tensor:
        """Logits (B, L); arguments as in `ViLT.forward`. Each label has its own probability (sigmoid)."""
        return self.out(F.gelu(self.norm(self.up(self.vilt(pixel_values, input_ids, attention_mask, **more)))))

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], tensors: dict[str, Tensor], source: str) -> Self:
        """As in `Released`, for a checkpoint with a head over answers (ViltForQuestionAnswering)."""
        bias = find(tensors, "classifier.3.bias")
        if bias is None:
            raise UserError(f"{source} has no head over answers (classifier.3): it was not trained to answer questions")
        model = cls(ViLT(ViLTConfig.from_hf(config)), labels_from_hf(config, bias.numel(), source))
        load_into(model, tensors, cls.key_map, source=source)
        return model.eval()

    def to_hf(self) -> dict[str, Any]:
        """config.json of ViltForQuestionAnswering."""
        return self.vilt.config.to_hf() | {"architectures": ["ViltForQuestionAnswering"], **labels_to_hf(self.labels)}


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of (B, L) logits and soft targets in [0, 1], in nats: summed over labels and questions.

    Divided by B it is the mean over both times the number of labels, as in Teney et al. 2018, "Tips and Tricks for
    Visual Question Answering", and in ViLT, so that its size does not depend on the number of labels.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum")
