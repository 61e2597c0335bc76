"""T5, the encoder-decoder of Raffel et al. 2020 (arXiv 1910.10683); version 1.1 and FLAN are the gated, untied kind.

What sets it apart from other transformers: positions enter only as a learned bias on the attention scores, one number
for each head and bucket of distances, shared by all layers of a tower; scores are not divided by sqrt(d); norms have
no mean and no bias; no linear layer has a bias.

Shapes: B batch, N input tokens, T output tokens, D width, H heads, V vocabulary.
"""

from dataclasses import replace
from os import PathLike
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.t5_config import T5Config
from vqa_scratch.nn import taps
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.cache import DecoderCache, KVCache
from vqa_scratch.nn.decoding import Decoder, FastBlock, FastParts
from vqa_scratch.nn.gated import gated_mlp
from vqa_scratch.nn.layers import MLP, Activation, activation
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.relative_bias import PassBias, RelativeBias
from vqa_scratch.nn.rms_norm import RMSNorm
from vqa_scratch.weights import convert, files, maps


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))` (Shazeer 2020, 2002.05202). (B, T, D) -> (B, T, D)."""

    tap_prefix: str | None = None

    def __init__(self, dim: int, hidden: int, activation: Activation, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.activation, self.dropout = activation, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if taps.wanted(self.tap_prefix, "pre", "post"):
            gate = taps.tap(self.tap_prefix, "pre", self.gate(x))
            out = self.down(taps.tap(self.tap_prefix, "post", self.activation(gate) * self.up(x)))
        else:
            out = gated_mlp(x, self.gate.weight, self.up.weight, self.down.weight, self.activation)
        return taps.tap(self.tap_prefix, "out", self.dropout(out))


class T5Block(nn.Module):
    """Self-attention, in a decoder cross-attention, and a feed-forward layer, each behind its norm."""

    tap_prefix: str | None = None

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
        if config.gated:
            self.mlp = GatedMLP(config.dim, config.hidden, activation(config.activation), dropout=config.dropout)
        else:
            self.mlp = MLP(config.dim, config.hidden, activation(config.activation), bias=False, dropout=config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        bias: PassBias,
        memory: Memory | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); `bias` says where a token may look as well."""
        x = taps.tap(self.tap_prefix, "resid_pre", x)
        x = x + self.dropout(self.attn(self.attn_norm(x), bias=bias, cache=cache))
        if memory is not None:
            x = x + self.dropout(self.cross(self.cross_norm(x), memory, cache=cache))
        x = taps.tap(self.tap_prefix, "resid_mid", x)
        return taps.tap(self.tap_prefix, "resid_post", x + self.mlp(self.mlp_norm(x)))

    def fast_block(self) -> FastBlock:
        """The block taken apart, for `generate`."""
        norms, mlp = (self.attn_norm, self.attn, self.cross_norm, self.cross, self.mlp_norm), self.mlp
        return FastBlock(*norms, mlp.up, mlp.activation, mlp.down, mlp.gate if isinstance(mlp, GatedMLP) else None)


class T5Tower(nn.Module):
    """The encoder, or with `decoder=True` the decoder: embeddings in, normed states out."""

    def __init__(self, config: T5Config, decoder: bool) -> None:
        super().__init__()
        self.bias = RelativeBias(config.buckets, config.heads, config.max_distance, bidirectional=not decoder)
        layers = config.decoder_layers if decoder else config.encoder_layers
        self.blocks = nn.ModuleList(T5Block(config, decoder) for _ in range(layers))
        self.norm, self.dropout = RMSNorm(config.dim, config.norm_eps), nn.Dropout(config.dropout)
        taps.name_modules(self, "decoder" if decoder else "encoder")

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


class T5(Decoder):
    """Encoder, decoder and language-model head."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.encoder = T5Tower(config, decoder=False)
        self.decoder = T5Tower(config, decoder=True)
        self.lm_head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random weights that keep the scale of states and scores, attention unscaled as it is."""
        nn.init.normal_(self.embedding.weight, std=1.0)
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, RelativeBias):
                nn.init.normal_(module.table.weight, std=self.config.dim**-0.5)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                inner = self.config.heads * self.config.head_dim
                queries = module.weight[:inner] if name.endswith((".qkv", ".q")) else None
                if queries is not None:  # no 1/sqrt(d) in the scores: it is in the queries from the start
                    with torch.no_grad():
                        queries.mul_(self.config.head_dim**-0.5)

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str]) -> Self:
        """From a folder or Hub id in the layout of T5ForConditionalGeneration."""
        config, tensors = files.read_checkpoint(source)
        if config.get("model_type") != "t5":
            raise UserError(f"{source} holds a {config.get('model_type')} model, not a t5")
        model = cls(replace(T5Config.from_hf(config), tied="lm_head.weight" not in tensors))
        convert.load_into(model, tensors, model.key_map, source=str(source))
        return model.eval()

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write config.json and model.safetensors as `transformers` reads them."""
        files.write_checkpoint(folder, self.config.to_hf(), convert.to_hf(self, self.key_map))

    @property
    def key_map(self) -> maps.KeyMap:
        return maps.T5_GATED if self.config.gated else maps.T5

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, N) -> (B, N, D). attention_mask (B, N), True = real token."""
        return self.encoder(self.embedding(input_ids), attention_mask)

    @property
    def max_positions(self) -> None:
        return None  # relative positions serve any number of tokens

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
        memory: list[Memory],
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), the decoder's states; `memory` holds one part, those of the encoder."""
        (encoder_states,) = memory
        return self.decoder(embeddings, attention_mask, encoder_states, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V). An untied head runs as a module: training may exchange it (`rl/large_tables.py`)."""
        if self.config.scaled:
            hidden = hidden * self.config.dim**-0.5
        return F.linear(hidden, self.embedding.weight) if self.lm_head is None else self.lm_head(hidden)

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
        """What a fast decoding state is made of."""
        norm, scale = self.decoder.norm, self.config.dim**-0.5
        return FastParts(
            embed=lambda tokens, positions: self.embedding(tokens),
            blocks=[block.fast_block() for block in self.decoder.blocks],
            norm=(lambda x: norm(x) * scale) if self.config.scaled else norm,
            head=(self.embedding if self.lm_head is None else self.lm_head).weight,
            bias=lambda keys: self.decoder.bias(1, keys),
        )
