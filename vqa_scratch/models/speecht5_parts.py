"""What the two SpeechT5 models share: sizes, encoder, decoder blocks.

Ao et al. 2022 (arXiv 2110.07205). It is no T5 but a post-LN encoder-decoder, as BART is; the encoder has relative keys,
the decoder none.

Shapes: B batch, N input tokens, T output tokens, D width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.bert import BertBlock, BertConfig
from vqa_scratch.models.gpt2 import GPT2Config, PostNormBlock
from vqa_scratch.models.hf_config import HFConfig, Layout, check_heads, sizes_in
from vqa_scratch.nn import taps
from vqa_scratch.nn.relative_keys import PassKeys, RelativeKeys
from vqa_scratch.storage import typed
from vqa_scratch.weights import fields

_FIXED = {"scale_embedding": False, "feat_extract_norm": "group", "tie_word_embeddings": True}
# Regularisers of the release's training that are not part of ours.
_LEFT_OUT: dict[str, Any] = dict.fromkeys(
    "encoder_layerdrop decoder_layerdrop activation_dropout mask_time_prob mask_feature_prob".split(), 0.0
)
_LEFT_OUT["apply_spec_augment"] = False


@dataclass(frozen=True)
class SpeechT5Config(HFConfig[Layout]):
    """Sizes of a SpeechT5. The defaults are those of the released models."""

    LAYOUTS: ClassVar[Mapping[str, Layout]] = {"speecht5": Layout("", fields.SPEECHT5, fixed=_FIXED)}

    layout: str = "speecht5"
    vocab_size: int = 81
    dim: int = 768
    encoder_layers: int = 12
    encoder_heads: int = 12
    encoder_hidden: int = 3072  # inner width of the MLP
    decoder_layers: int = 6
    decoder_heads: int = 12
    decoder_hidden: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-5
    dropout: float = 0.1
    attention_dropout: float = 0.1
    position_dropout: float = 0.1
    init_std: float = 0.02
    max_distance: int = 160  # of relative keys
    max_text: int = 450  # tokens
    max_speech: int = 4000  # steps of the speech decoder
    pad_id: int = 1
    eos_id: int = 2
    start_id: int = 2  # first input of the text decoder
    # text to speech
    mels: int = 80
    reduction: int = 2  # frames a step of the decoder
    prenet_layers: int = 2
    prenet_units: int = 256
    prenet_dropout: float = 0.5  # always on
    speaker_dim: int = 512
    postnet_layers: int = 5
    postnet_units: int = 256
    postnet_kernel: int = 5
    postnet_dropout: float = 0.5
    guided: bool = True  # whether training holds some heads to the diagonal: `training/spectrogram.py`
    guided_heads: int = 2
    guided_sigma: float = 0.4
    guided_scale: float = 10.0
    # speech to text
    wave_dims: tuple[int, ...] = (512,) * 7  # of the convolutions over samples
    wave_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    wave_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    wave_bias: bool = False
    wave_activation: str = "gelu"
    place_kernel: int = 128  # of the convolution that tells places
    place_groups: int = 16

    def __post_init__(self) -> None:
        check_heads(self.dim, self.encoder_heads)
        check_heads(self.dim, self.decoder_heads)
        check_heads(self.dim, self.place_groups)
        if self.dim % 2:
            raise UserError(f"width {self.dim} has no half for sines and half for cosines")
        if not len(self.wave_dims) == len(self.wave_strides) == len(self.wave_kernels):
            raise UserError("conv_dim, conv_stride and conv_kernel in config.json must be of one length")
        if max(self.pad_id, self.eos_id, self.start_id) >= self.vocab_size:
            raise UserError(f"a special token is not among the {self.vocab_size} of the vocabulary")

    @classmethod
    def further_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        names = (("wave_dims", "conv_dim"), ("wave_strides", "conv_stride"), ("wave_kernels", "conv_kernel"))
        return {ours: sizes_in(config, theirs, getattr(cls, ours)) for ours, theirs in names}

    def to_hf(self) -> dict[str, Any]:
        lists = {"conv_dim": self.wave_dims, "conv_stride": self.wave_strides, "conv_kernel": self.wave_kernels}
        return super().to_hf() | lists | _LEFT_OUT | {"is_encoder_decoder": True}


def check_architecture(config: Mapping[str, Any], wanted: str, source: str) -> None:
    """Raise UserError if config.json names another architecture than the wanted one."""
    (named,) = typed(f"{source}: config.json", config, {"architectures": list | None})
    if named and wanted not in named:
        raise UserError(f"{source} holds a {named[0]}, not a {wanted}")


def decoder_config(config: SpeechT5Config) -> GPT2Config:
    """The decoder's sizes by the names of its blocks."""
    return GPT2Config(
        vocab_size=config.vocab_size,
        max_positions=config.max_text,
        dim=config.dim,
        layers=config.decoder_layers,
        heads=config.decoder_heads,
        hidden=config.decoder_hidden,
        activation=config.activation,
        norm_eps=config.norm_eps,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        add_cross_attention=True,
    )


def decoder_blocks(config: SpeechT5Config) -> nn.ModuleList:
    """The decoder's blocks, which read the encoder's states."""
    sizes = decoder_config(config)
    blocks = nn.ModuleList(PostNormBlock(sizes, layer, sizes.mlp()) for layer in range(sizes.layers))
    taps.name_modules(blocks, "decoder")
    return blocks


class SpeechT5Encoder(nn.Module):
    """A norm, then post-LN blocks whose scores know distances."""

    def __init__(self, config: SpeechT5Config) -> None:
        super().__init__()
        block = BertConfig(
            dim=config.dim,
            heads=config.encoder_heads,
            hidden=config.encoder_hidden,
            activation=config.activation,
            norm_eps=config.norm_eps,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
        )
        self.norm, self.dropout = nn.LayerNorm(config.dim, eps=config.norm_eps), nn.Dropout(config.dropout)
        self.keys = RelativeKeys(config.max_distance, config.dim // config.encoder_heads)
        self.blocks = nn.ModuleList(BertBlock(block) for _ in range(config.encoder_layers))
        taps.name_modules(self.blocks, "encoder")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D), mask (B, N), True = may attend -> (B, N, D)."""
        x, keys = self.dropout(self.norm(x)), PassKeys(self.keys, x.shape[1], mask)
        for block in self.blocks:
            x = block(x, bias=keys)
        return x


class ScaledPositions(nn.Module):
    """x + alpha * sines and cosines in turn, with alpha learned (Li et al. 2019, arXiv 1809.08895, section 3.2)."""

    table: Tensor

    def __init__(self, dim: int, most: int, dropout: float) -> None:
        super().__init__()
        self.alpha, self.dropout = nn.Parameter(torch.tensor(1.0)), nn.Dropout(dropout)
        rates = torch.exp(torch.arange(0, dim, 2).float() * -(math.log(10_000.0) / dim))
        angles = torch.arange(most)[:, None].float() * rates
        self.register_buffer("table", torch.stack([angles.sin(), angles.cos()], -1).flatten(1), persistent=False)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """(B, T, D) at the positions from `first` on. Raises ValueError beyond the table."""
        if first + x.shape[1] > len(self.table):
            raise ValueError(f"{first + x.shape[1]} positions, but the table serves {len(self.table)}")
        return self.dropout(x + self.alpha * self.table[first : first + x.shape[1]])
