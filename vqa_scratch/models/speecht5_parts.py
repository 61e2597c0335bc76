"""What the two SpeechT5 models share: sizes, encoder, decoder blocks.

Ao et al. 2022 (arXiv 2110.07205). It is no T5 but a post-LN encoder-decoder, as BART is; the encoder has relative keys,
the decoder none.

Shapes: B batch, N input tokens, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.bert import BertBlock, BertConfig
from vqa_scratch.models.gpt2 import GPT2Config, PostNormBlock
from vqa_scratch.models.hf_config import HFConfig, Layout, Released, check_heads, fields_of
from vqa_scratch.nn import taps
from vqa_scratch.nn.layers import init_weights
from vqa_scratch.nn.relative_keys import PassKeys, RelativeKeys
from vqa_scratch.storage import typed
from vqa_scratch.weights import fields
from vqa_scratch.weights.maps import KeyMap

_FIXED = {"scale_embedding": False, "feat_extract_norm": "group", "tie_word_embeddings": True}
_LISTS = {"wave_dims": "conv_dim", "wave_strides": "conv_stride", "wave_kernels": "conv_kernel"}
# Regularisers of the release's training that ours has not.
_LEFT_OUT = "encoder_layerdrop decoder_layerdrop activation_dropout mask_time_prob mask_feature_prob".split()


@dataclass(frozen=True)
class SpeechT5Config(HFConfig[Layout]):
    """Sizes of a SpeechT5. The defaults are those of the released models."""

    LAYOUTS: ClassVar[Mapping[str, Layout]] = {"speecht5": Layout("", fields.SPEECHT5, fixed=_FIXED, lists=_LISTS)}

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
    max_text: int = 450  # tokens; 600 in the released text to speech
    max_speech: int = 4000  # steps of the speech decoder, or states of the speech encoder
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
        for parts in (self.encoder_heads, self.decoder_heads, 2):
            check_heads(self.dim, parts)
        if not len(self.wave_dims) == len(self.wave_strides) == len(self.wave_kernels):
            raise UserError("conv_dim, conv_stride and conv_kernel in config.json must be of one length")
        if max(self.pad_id, self.eos_id, self.start_id) >= self.vocab_size:
            raise UserError(f"a special token is not among the {self.vocab_size} of the vocabulary")

    def to_hf(self) -> dict[str, Any]:
        return {**super().to_hf(), **dict.fromkeys(_LEFT_OUT, 0.0), "is_encoder_decoder": True}

    @property
    def decoder(self) -> GPT2Config:
        """The decoder by GPT-2's names."""
        sizes = fields_of(self, GPT2Config, "decoder")
        return GPT2Config(**sizes, max_positions=self.max_text, add_cross_attention=True)


def decoder_blocks(config: SpeechT5Config) -> nn.ModuleList:
    """The decoder's blocks, which read the encoder's states."""
    sizes = config.decoder
    blocks = nn.ModuleList(PostNormBlock(sizes, layer, sizes.mlp()) for layer in range(sizes.layers))
    taps.name_modules(blocks, "decoder")
    return blocks


class SpeechT5Encoder(nn.Module):
    """A norm, then post-LN blocks whose scores know distances."""

    def __init__(self, config: SpeechT5Config) -> None:
        super().__init__()
        sizes = BertConfig(**fields_of(config, BertConfig, "encoder"))
        self.norm, self.dropout = nn.LayerNorm(config.dim, eps=config.norm_eps), nn.Dropout(config.dropout)
        self.keys = RelativeKeys(config.max_distance, config.dim // config.encoder_heads)
        self.blocks = nn.ModuleList(BertBlock(sizes) for _ in range(config.encoder_layers))
        taps.name_modules(self.blocks, "encoder")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D), mask (B, N), True = may attend -> (B, N, D)."""
        x, keys = self.dropout(self.norm(x)), PassKeys(self.keys, x.shape[1], mask)
        for block in self.blocks:
            x = block(x, bias=keys)
        return x


class SpeechT5Base(Released[SpeechT5Config]):
    """How either model starts, loads and saves."""

    config_class = SpeechT5Config
    architecture: ClassVar[str]  # its class in `transformers`
    layout: ClassVar[KeyMap]

    def reset_parameters(self) -> None:
        """Random weights as in `transformers`, but that convolutions with a norm keep torch's own."""
        self.apply(lambda module: init_weights(module, self.config.init_std))
        for module in self.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx].detach())
            elif isinstance(module, nn.Conv1d) and not hasattr(module, "parametrizations"):
                nn.init.kaiming_normal_(module.weight)

    @property
    def key_map(self) -> KeyMap:
        return self.layout

    def to_hf(self) -> dict[str, Any]:
        return self.config.to_hf() | {"architectures": [self.architecture]}

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], tensors: dict[str, Tensor], source: str) -> Self:
        (named,) = typed("config.json", config, {"architectures": list | None})
        if named and cls.architecture not in named:
            raise UserError(f"{source} holds a {named[0]}, not a {cls.architecture}")
        return super().from_checkpoint(config, tensors, source)
