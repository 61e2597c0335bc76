"""OPT, the open decoders of Zhang et al. 2022 (arXiv 2205.01068): GPT-2's block with ReLU, and three habits of its own.

Positions count attended tokens and start at row 2 of their table; the embedding may be narrower than the blocks, with a
linear map on either side; and one model (350M) norms after each sublayer, not before. The head is the token embedding.

Shapes: B rows, T tokens, D width, E width of the embedding (mostly D), V vocabulary.
"""

from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.gpt2 import GPT2Block, GPT2Config
from vqa_scratch.models.hf_config import check_heads, fields_from_hf
from vqa_scratch.nn import taps
from vqa_scratch.nn.cache import DecoderCache, KVCache
from vqa_scratch.nn.decoding import Decoder, FastParts
from vqa_scratch.nn.layers import decoder_positions, init_weights
from vqa_scratch.nn.memory import Memory
from vqa_scratch.weights import fields as names
from vqa_scratch.weights import maps_blip2
from vqa_scratch.weights.convert import load_into, to_hf
from vqa_scratch.weights.files import read_checkpoint, write_checkpoint

OFFSET = 2  # rows of the position table that no token uses: fairseq kept them for padding
# Options of the layout that no released OPT uses, with the only value this model has.
_FIXED = {"enable_bias": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False}


@dataclass(frozen=True)
class OPTConfig:
    """Sizes of an OPT. The defaults are the 125M model."""

    vocab_size: int = 50272
    max_positions: int = 2048
    dim: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072  # inner width of the MLP
    embedding_dim: int | None = None  # None: dim
    norm_first: bool = True  # False: post-LN, and no norm at the end
    activation: str = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    init_std: float = 0.02
    bos_id: int = 2
    eos_id: int = 2
    pad_id: int = 1

    def __post_init__(self) -> None:
        check_heads(self.dim, self.heads)
        if self.embedding_dim is None:
            object.__setattr__(self, "embedding_dim", self.dim)

    @property
    def block(self) -> GPT2Config:
        """The same sizes as GPT-2's block takes them."""
        return GPT2Config(
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            hidden=self.hidden,
            activation=self.activation,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
        )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """From a config.json of model type "opt". Raises UserError if it asks for something this model is not."""
        fields = fields_from_hf(config, names.OPT, "opt")
        for name, value in _FIXED.items():
            if config.get(name, value) != value:
                raise UserError(f"config.json asks for {name} = {config[name]}; this OPT has {value} alone")
        if not isinstance(fields.get("eos_id", 2), int):
            raise UserError(f"config.json names several end tokens {fields['eos_id']}; this OPT takes one")
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The inverse of `from_hf`."""
        fields = {theirs: getattr(self, ours) for ours, theirs in names.OPT.items()}
        return {"architectures": ["OPTForCausalLM"], "model_type": "opt", **fields}


class PostNormBlock(GPT2Block):
    """GPT-2's parts with each norm after its sublayer: OPT-350M."""

    def forward(self, x: Tensor, key_mask: Tensor | None, memory: list[Memory] | None, cache: KVCache | None) -> Tensor:
        x = taps.tap(self.tap_prefix, "resid_pre", x)
        x = self.norm1(x + self.dropout(self.attn(x, key_mask=key_mask, causal=True, cache=cache)))
        x = taps.tap(self.tap_prefix, "resid_mid", x)
        return taps.tap(self.tap_prefix, "resid_post", self.norm2(x + self.mlp(x)))


class OPT(Decoder):
    """Tokens and positions, blocks, a last norm, and a head that is the token embedding."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.config = config
        block = GPT2Block if config.norm_first else PostNormBlock
        narrow = config.embedding_dim != config.dim
        self.tokens = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.positions = nn.Embedding(config.max_positions + OFFSET, config.dim)
        self.project_in = nn.Linear(config.embedding_dim, config.dim, bias=False) if narrow else nn.Identity()
        self.blocks = nn.ModuleList(block(config.block, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.dim) if config.norm_first else nn.Identity()
        self.project_out = nn.Linear(config.dim, config.embedding_dim, bias=False) if narrow else nn.Identity()
        self.apply(lambda module: init_weights(module, config.init_std))
        taps.name_modules(self, "decoder")

    @property
    def head(self) -> Tensor:
        """(V, E): the token embedding."""
        return self.tokens.weight

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, E), without positions."""
        return self.tokens(ids)

    def hidden(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None = None,
        *,
        memory: None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, T, E) -> (B, T, E), the states under the head; see `Decoder.hidden`.

        Positions count the tokens that attention_mask (B, cached + T) leaves. Raises ValueError on more tokens than
        positions, a mask of another length, or a memory.
        """
        if memory is not None:
            raise ValueError("OPT has no cross-attention to read a memory with")
        rows, new, _ = embeddings.shape
        past = 0 if cache is None else cache.length
        position_ids = decoder_positions(rows, past, new, attention_mask, self.config.max_positions, embeddings.device)
        x = self.project_in(embeddings) + self.positions(position_ids + OFFSET)  # (B, T, D)
        for layer, block in enumerate(self.blocks):
            x = block(x, attention_mask, None, None if cache is None else cache[layer])
        return self.project_out(self.norm(x))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, cache: DecoderCache | None = None
    ) -> Tensor:
        """(B, T) -> logits (B, T, V). Arguments as in `hidden`."""
        return self.logits(self.hidden(self.embed(input_ids), attention_mask, cache=cache))

    def fast_state(self) -> FastParts | None:
        """What a fast decoding state is made of; None for post-LN, the 350M model."""
        if not self.config.norm_first:
            return None

        def embed(tokens: Tensor, positions: Tensor) -> Tensor:
            return self.project_in(self.tokens(tokens)) + self.positions(positions + OFFSET)

        narrow = self.config.embedding_dim != self.config.dim
        norm = nn.Sequential(self.norm, self.project_out) if narrow else self.norm
        return FastParts(embed, [block.fast_block() for block in self.blocks], norm, self.head)

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str]) -> Self:
        """From a checkpoint folder or Hub id, in eval mode. Raises UserError when something does not fit."""
        config, tensors = read_checkpoint(source)
        model = cls(OPTConfig.from_hf(config))
        load_into(model, tensors, maps_blip2.OPT, source=str(source))
        return model.eval()

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """config.json and model.safetensors that `from_pretrained` and `transformers` read."""
        write_checkpoint(folder, self.config.to_hf(), to_hf(self, maps_blip2.OPT))
