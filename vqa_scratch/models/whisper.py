"""Whisper, the speech recogniser of Radford et al. 2022 (arXiv 2212.04356): the encoder of a log-mel spectrogram, and a
GPT-2 with cross-attention that writes what it hears.

The encoder is two convolutions, a fixed table of sines, and the blocks of a ViT. Silence that fills a window up is
attended to as any sound, so there are no masks. Whisper's keys have no bias; ours do, and it is zero (see
`weights/maps_whisper.py`).

Shapes: B windows, M mels, F frames (3000 in released models), N = F / 2 states, S tokens, D width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.errors import UserError, naming
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.hf_config import HFConfig, Layout, Released, check_heads, fields_of
from vqa_scratch.models.vit import ViTBlock, ViTConfig
from vqa_scratch.nn import taps
from vqa_scratch.nn.layers import init_weights, sinusoids
from vqa_scratch.nn.memory import Memory
from vqa_scratch.weights import fields, maps_whisper
from vqa_scratch.weights.convert import load_into
from vqa_scratch.weights.whisper_files import read_whisper


@dataclass(frozen=True)
class WhisperConfig(HFConfig[Layout]):
    """Sizes of encoder and decoder. The defaults are those of tiny.en."""

    LAYOUTS: ClassVar[Mapping[str, Layout]] = {
        "whisper": Layout(
            "WhisperForConditionalGeneration", fields.WHISPER, maps_whisper.WHISPER, fixed={"scale_embedding": False}
        )
    }

    vocab_size: int = 51864
    mels: int = 80
    source_positions: int = 1500  # states of a window, N
    max_positions: int = 448  # of the decoder
    dim: int = 384
    encoder_layers: int = 4
    encoder_heads: int = 6
    encoder_hidden: int = 1536  # inner width of the MLPs
    decoder_layers: int = 4
    decoder_heads: int = 6
    decoder_hidden: int = 1536
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02
    start_id: int = 50257  # first input of the decoder
    bos_id: int = 50256
    eos_id: int | tuple[int, ...] = 50256
    pad_id: int | None = 50256
    layout: str = "whisper"

    def __post_init__(self) -> None:
        check_heads(self.dim, self.encoder_heads)
        if self.dim < 4 or self.dim % 2:
            raise UserError(f"a table of sines and cosines needs an even width of 4 or more, not {self.dim}")

    @property
    def frames(self) -> int:
        """Frames of a window, F."""
        return 2 * self.source_positions

    @property
    def blocks(self) -> ViTConfig:
        """A ViT of the encoder's blocks."""
        return ViTConfig(**fields_of(self, ViTConfig, "encoder"), norm_eps=1e-5)

    @property
    def decoder(self) -> GPT2Config:
        """The decoder."""
        sizes = fields_of(self, GPT2Config, "decoder") | {"norm_eps": 1e-5, "embedding_dropout": self.dropout}
        return GPT2Config(**sizes, add_cross_attention=True)

    def to_hf(self) -> dict[str, Any]:
        return super().to_hf() | {"is_encoder_decoder": True, "scale_embedding": False}


class AudioEncoder(nn.Module):
    """Two convolutions over time, the second of which halves it, positions, pre-LN blocks, a last norm."""

    positions: Tensor  # (N, D)

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(config.mels, config.dim, 3, padding=1)
        self.conv2 = nn.Conv1d(config.dim, config.dim, 3, stride=2, padding=1)
        self.register_buffer("positions", sinusoids(config.source_positions, config.dim))  # in files, though fixed
        self.blocks = nn.ModuleList(ViTBlock(config.blocks) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.blocks.apply(lambda module: init_weights(module, config.init_std))
        taps.name_modules(self.blocks, "audio")

    def forward(self, features: Tensor) -> Tensor:
        """(B, M, F) -> (B, N, D). Raises UserError on another number of mels or frames."""
        length, _ = self.positions.shape
        if features.ndim != 3 or features.shape[1:] != (self.conv1.in_channels, 2 * length):
            wanted = f"(windows, {self.conv1.in_channels} mels, {2 * length} frames)"
            raise UserError(f"the features of this model are {wanted}, not {tuple(features.shape)}")
        x = F.gelu(self.conv2(F.gelu(self.conv1(features)))).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Whisper(Released[WhisperConfig]):
    """The encoder of a window of sound, and the decoder whose cross-attention reads it."""

    config_class = WhisperConfig

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = AudioEncoder(config), GPT2(config.decoder)

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str], **options: Any) -> Self:
        """From a folder or Hub id in any of the layouts of `weights/whisper_files.py`."""
        with naming(source):
            config, tensors, key_map = read_whisper(source)
            model = cls(cls.config_class.from_hf(config), **options)
            load_into(model, tensors, key_map, source=str(source))
        return model.eval()

    def encode(self, input_features: Tensor) -> Tensor:
        """(B, M, F) -> the states (B, N, D) that the decoder's cross-attention reads. UserError as in the encoder."""
        return self.encoder(input_features.to(self.encoder.conv1.weight.dtype))

    def forward(
        self, input_features: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor | None = None
    ) -> Tensor:
        """(B, M, F) and (B, S) -> logits (B, S, V); decoder_attention_mask (B, S), True = a real token.

        In training the inputs are the labels shifted right, after `config.start_id`.
        """
        return self.decoder(decoder_input_ids, decoder_attention_mask, memory=[Memory(self.encode(input_features))])


class WhisperCTC(nn.Module):
    """A Whisper, and a second head: `ctc` gives each state of the encoder (B, N, D) logits (B, N, L) of `labels`."""

    def __init__(self, config: WhisperConfig, labels: int) -> None:
        super().__init__()
        self.whisper, self.ctc = Whisper(config), nn.Linear(config.dim, labels)
