"""T5, the encoder-decoder of Raffel et al. 2020 (arXiv 1910.10683); version 1.1 and FLAN are the gated, untied kind.

It differs from other transformers in four points. Positions enter only as a learned bias on the attention scores, one
number for each head and bucket of distances, shared by all layers of the encoder or decoder. Scores are not divided by
sqrt(d). Norms have no mean and no bias. No linear layer has a bias.

Shapes: B batch, N input tokens, T output tokens, D width, H heads, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.generation_options import end_ids
from vqa_scratch.models.hf_config import Released, fields_from_hf
from vqa_scratch.nn import taps
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.cache import DecoderCache, KVCache
from vqa_scratch.nn.decoding import Decoder, FastBlock, FastMLP, FastParts, Reader, fast_blocks
from vqa_scratch.nn.gated import GatedMLP
from vqa_scratch.nn.layers import MLP, activation
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.relative_bias import PassBias, RelativeBias
from vqa_scratch.nn.rms_norm import RMSNorm
from vqa_scratch.storage import typed
from vqa_scratch.weights import fields, maps
from vqa_scratch.weights.convert import find, load_into


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5. The defaults are flan-t5-small."""

    vocab_size: int = 32128
    dim: int = 512
    head_dim: int = 64  # heads * head_dim need not be dim
    hidden: int = 1024  # inner width of the feed-forward layers
    encoder_layers: int = 8
    decoder_layers: int = 8
    heads: int = 6
    buckets: int = 32  # of relative distances, in the encoder and in the decoder
    max_distance: int = 128  # all greater distances share the last bucket
    activation: str = "gelu_new"
    gated: bool = True
    dropout: float = 0.1
    norm_eps: float = 1e-6
    tied: bool = False  # the head is the embedding
    scaled: bool = False  # the decoder's output is multiplied by dim**-0.5 before the head
    pad_id: int = 0
    eos_id: int | tuple[int, ...] = 1  # any of several ends a text
    start_id: int = 0  # first input of the decoder
    max_positions: ClassVar[None] = None  # relative positions have no limit

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise UserError(f"{self.buckets} buckets do not divide distances up to {self.max_distance}")
        if max(self.pad_id, *end_ids(self.eos_id), self.start_id) >= self.vocab_size:
            raise UserError(f"a special token is not among the {self.vocab_size} of the vocabulary")

    @property
    def key_map(self) -> maps.KeyMap:
        """Where each parameter is in a checkpoint."""
        return maps.T5_GATED if self.gated else maps.T5

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From a config.json. It does not say whether the head is tied: that depends on the weights."""
        known = fields_from_hf(config, fields.T5, cls)
        (feed_forward,) = typed("config.json", config, {"feed_forward_proj": str | None})
        feed_forward = feed_forward or "relu"
        name = feed_forward.removeprefix("gated-")
        return cls(
            **{"decoder_layers": known.get("encoder_layers", cls.encoder_layers), "start_id": known.get("pad_id", 0)}
            | known,
            gated=feed_forward.startswith("gated-"),
            # The released gated models were trained with the tanh approximation, although their files say "gelu".
            activation="gelu_new" if feed_forward == "gated-gelu" else name,
            scaled=config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False),
        )

    def to_hf(self) -> dict[str, Any]:
        """The inverse of `from_hf`."""
        name = "gelu" if self.gated and self.activation == "gelu_new" else self.activation
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            **{theirs: getattr(self, ours) for ours, theirs in fields.T5.items()},
            "feed_forward_proj": f"gated-{name}" if self.gated else name,
            "tie_word_embeddings": self.scaled,
            "scale_decoder_outputs": self.scaled,
        }


class T5Block(taps.Tapped):
    """Self-attention, cross-attention in a decoder, and a feed-forward layer, each after its norm."""

    def __init__(self, config: T5Config, decoder: bool) -> None:
        super().__init__()

        def attention(context_dim: int | None = None) -> MultiHeadAttention:
            return MultiHeadAttention(
                config.dim,
                config.heads,
                head_dim=config.head_dim,
                context_dim=context_dim,
                bias=False,
                out_bias=False,
                scale=1.0,
                dropout=config.dropout,
            )

        self.attn_norm, self.attn = RMSNorm(config.dim, config.norm_eps), attention()
        if decoder:
            self.cross_norm, self.cross = RMSNorm(config.dim, config.norm_eps), attention(config.dim)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        kind, own = GatedMLP if config.gated else MLP, activation(config.activation)
        self.mlp = kind(config.dim, config.hidden, own, bias=False, dropout=config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, bias: PassBias, memory: Memory | None = None, cache: KVCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); `bias` includes the masks."""
        x = taps.tap(self.tap_prefix, "resid_pre", x)
        x = x + self.dropout(self.attn(self.attn_norm(x), bias=bias, cache=cache))
        if memory is not None:
            x = x + self.dropout(self.cross(self.cross_norm(x), memory, cache=cache))
        x = taps.tap(self.tap_prefix, "resid_mid", x)
        return taps.tap(self.tap_prefix, "resid_post", x + self.mlp(self.mlp_norm(x)))

    def fast_block(self) -> FastBlock:
        """The parts of the block, for `generate`."""
        cross = Reader(self.cross_norm, self.cross)
        return FastBlock(self.attn_norm, self.attn, cross, FastMLP(self.mlp_norm, self.mlp))


class T5Stack(nn.Module):
    """The encoder, or with `decoder=True` the decoder: embeddings in, normed states out."""

    def __init__(self, config: T5Config, decoder: bool) -> None:
        super().__init__()
        self.bias = RelativeBias(config.buckets, config.heads, config.max_distance, bidirectional=not decoder)
        layers = config.decoder_layers if decoder else config.encoder_layers
        self.blocks = nn.ModuleList(T5Block(config, decoder) for _ in range(layers))
        self.norm, self.dropout = RMSNorm(config.dim, config.norm_eps), nn.Dropout(config.dropout)
        taps.name_modules(self.blocks, "decoder" if decoder else "encoder")

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        memory: Memory | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). With a cache x holds the new tokens only."""
        past = 0 if cache is None else cache.length
        sizes = x.shape[1], past + x.shape[1]
        bias = PassBias(self.bias, *sizes, causal=memory is not None, key_mask=key_mask)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, bias, memory, None if cache is None else cache[layer])
        return self.dropout(self.norm(x))


class T5(Released[T5Config], Decoder):
    """Encoder, decoder and language-model head."""

    config_class = T5Config

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.encoder = T5Stack(config, decoder=False)
        self.decoder = T5Stack(config, decoder=True)
        self.lm_head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random weights that keep the scale of states and of the unscaled attention scores."""
        nn.init.normal_(self.embedding.weight, std=1.0)
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, RelativeBias):
                nn.init.normal_(module.table.weight, std=self.config.dim**-0.5)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if name.endswith((".qkv", ".q")):  # no 1/sqrt(d) in the scores: it is in the initial queries
                    with torch.no_grad():
                        module.weight[: self.config.heads * self.config.head_dim].mul_(self.config.head_dim**-0.5)

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], tensors: dict[str, Tensor], source: str) -> Self:
        """As in `Released`, for the layout of T5ForConditionalGeneration."""
        if config.get("model_type") != "t5":
            raise UserError(f"{source} holds a {config.get('model_type')} model, not a t5")
        model = cls(replace(T5Config.from_hf(config), tied=find(tensors, "lm_head.weight") is None))
        load_into(model, tensors, model.key_map, source=source)
        return model.eval()

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, N) -> (B, N, D). attention_mask (B, N), True = real token."""
        return self.encoder(self.embedding(input_ids), attention_mask)

    @property
    def head(self) -> Tensor:
        """(V, D): the embedding or a weight of its own, scaled where the release scales its states."""
        weight = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        return weight * self.config.dim**-0.5 if self.config.scaled else weight

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)

    def hidden(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None = None,
        *,
        memory: list[Memory] | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), the decoder's states; `memory` holds one item, the encoder's states."""
        if memory is None:
            raise ValueError("the decoder of a T5 reads a memory: the states of its encoder")
        return self.decoder(embeddings, attention_mask, *memory, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V). An untied head runs as a module, which training may replace (`rl/large_tables.py`)."""
        if self.config.scaled:
            hidden = hidden * self.config.dim**-0.5
        own = self.lm_head if self.head_copy is None else self.head_copy
        return F.linear(hidden, self.embedding.weight) if own is None else own(hidden)

    def after_blocks(self, x: Tensor) -> Tensor:
        return self.decoder.norm(x)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, N), (B, T) -> logits (B, T, V)."""
        if decoder_input_ids is None:
            raise ValueError("T5 needs decoder_input_ids; shift the labels right, starting with config.start_id")
        memory = [Memory(self.encode(input_ids, attention_mask), attention_mask)]
        return self.logits(self.hidden(self.embed(decoder_input_ids), decoder_attention_mask, memory=memory))

    def new_cache(self) -> DecoderCache:
        return DecoderCache(self.config.decoder_layers)

    def fast_state(self) -> FastParts:
        norm, scale = self.decoder.norm, self.config.dim**-0.5
        return FastParts(
            embed=lambda tokens, positions: self.embedding(tokens),
            blocks=fast_blocks(self.decoder.blocks),
            norm=(lambda x: norm(x) * scale) if self.config.scaled else norm,
            head=self.embedding if self.lm_head is None else self.lm_head,
            bias=lambda keys: self.decoder.bias(1, keys),
        )
