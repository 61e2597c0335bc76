"""Llama (Touvron et al. 2023, arXiv 2302.13971; Grattafiori et al. 2024, arXiv 2407.21783) and what is built like it.

One block, whose parts the config names: root-mean-square norms or LayerNorms, rotary positions on the whole of each
head or a share of it, as many or fewer heads of keys and values than of queries, a gated or a plain MLP, or experts.
Qwen2 (arXiv 2407.10671) has biases on q, k and v; Persimmon (Adept 2023), the decoder of Fuyu, has LayerNorms, also of
q and k; `llama_experts.py` has what Mixtral, Qwen2-MoE and OLMoE add.

Shapes: B rows, T tokens, D width, H heads, d head size, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.block_decoder import BlockDecoder, ExpertBlock, PreNormBlock
from vqa_scratch.models.hf_config import HFConfig, Layout, check_heads, is_number
from vqa_scratch.models.llama_experts import AcrossHeads, Clipped, Mixture, mixture_from_hf, mixture_to_hf
from vqa_scratch.nn import taps
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.decoding import FastParts, fast_blocks
from vqa_scratch.nn.gated import GatedMLP
from vqa_scratch.nn.layers import MLP, activation, init_weights
from vqa_scratch.nn.rms_norm import RMSNorm
from vqa_scratch.nn.rotary import Rotary, Rotation
from vqa_scratch.storage import typed
from vqa_scratch.weights import fields, maps_llama
from vqa_scratch.weights.maps import KeyMap

# What each kind of rotary positions has in a config.json besides theta: our field and the one there.
ROTARY_KINDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low": "low_freq_factor",
        "high": "high_freq_factor",
        "original": "original_max_position_embeddings",
    },
}
USUAL_ROTARY: dict[Any, dict[str, float]] = {"persimmon": {"share": 0.5}, "mixtral": {"theta": 1e6}}
NORMS: dict[str, type[RMSNorm] | type[nn.LayerNorm]] = {"rms": RMSNorm, "layer": nn.LayerNorm}
_PERSIMMON = {"norm": "layer", "qk_norm": True, "gated": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True}
_PERSIMMON |= {"activation": "relu2", "norm_eps": 1e-5}


@dataclass(frozen=True)
class LlamaConfig(HFConfig):
    """Sizes and parts of a decoder. The defaults are Llama 7B."""

    LAYOUTS: ClassVar[Mapping[str, Layout]] = {
        "llama": Layout("LlamaForCausalLM", fields.LLAMA, fixed={"sliding_window": None}),
        "qwen2": Layout(
            "Qwen2ForCausalLM", fields.QWEN2, defaults={"qkv_bias": True}, fixed={"use_sliding_window": False}
        ),
        "persimmon": Layout("PersimmonForCausalLM", fields.PERSIMMON, defaults=_PERSIMMON),
        "mixtral": Layout(
            "MixtralForCausalLM", fields.MIXTRAL, defaults={"norm_eps": 1e-5}, fixed={"sliding_window": None}
        ),
        "qwen2_moe": Layout(
            "Qwen2MoeForCausalLM", fields.QWEN2_MOE, defaults={"qkv_bias": True}, fixed={"use_sliding_window": False}
        ),
        "olmoe": Layout("OlmoeForCausalLM", fields.OLMOE, defaults={"norm_eps": 1e-5, "qk_norm": True}),
    }

    vocab_size: int = 32000
    max_positions: int = 2048  # of the training; there is no table that ends there
    dim: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int | None = None  # None: heads
    head_dim: int | None = None  # None: dim / heads
    hidden: int = 11008  # inner width of the MLP
    activation: str = "silu"
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-6
    qk_norm: bool = False  # norms of queries and keys before they turn: LayerNorms of each head, RMSNorms of all heads
    clip: float | None = None  # largest size of a number in q, k and v
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    dropout: float = 0.0  # of what the MLP adds
    attention_dropout: float = 0.0
    init_std: float = 0.02
    tied: bool = False  # the head is the embedding
    rotary: Rotary = Rotary()
    experts: Mixture | None = None  # in place of the MLP, at least in some layers
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None  # any of several ends a text
    pad_id: int | None = None

    layout: str = "llama"
    add_cross_attention: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.head_dim is None:
            check_heads(self.dim, self.heads)
        size, kv_heads = self.head_dim or self.dim // self.heads, self.kv_heads or self.heads
        object.__setattr__(self, "head_dim", size)
        object.__setattr__(self, "kv_heads", kv_heads)
        if self.heads % kv_heads:
            raise UserError(f"{kv_heads} heads of keys and values cannot serve {self.heads} of queries evenly")
        turning = int(size * self.rotary.share)
        if turning % 2 or not 0 < turning <= size:
            raise UserError(f"rotary positions turn pairs: not {turning} of the {size} numbers of a head")

    @classmethod
    def further_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The rotary positions, in the spelling of transformers 5 or in the one before, and the experts."""
        (layers,) = typed("config.json", config, {"layer_types": list | None})
        if any(kind != "full_attention" for kind in layers or []):
            raise UserError("config.json asks for layers with a sliding window; here every token sees all before it")
        return {"rotary": rotary_from_hf(config), "experts": mixture_from_hf(config)}

    @property
    def key_map(self) -> KeyMap:
        if self.layout == "persimmon":
            return maps_llama.persimmon(self.heads, self.tied)
        more = maps_llama.MIXTRAL if self.layout == "mixtral" else maps_llama.SHARED
        return maps_llama.llama(self.heads, self.kv_heads or self.heads, self.tied, *more)

    def to_hf(self) -> dict[str, Any]:
        """The inverse of `from_hf`, in the newer spelling."""
        experts = mixture_to_hf(self.experts, self.layout)
        return super().to_hf() | experts | {"rope_parameters": rotary_to_hf(self.rotary)}

    def before_attention(self) -> tuple[nn.Module, ...]:
        """What is done to q, k and v before q and k turn."""
        size, kv_heads = self.head_dim or self.dim // self.heads, self.kv_heads or self.heads
        clipped = nn.Identity() if self.clip is None else Clipped(self.clip)
        if not self.qk_norm:
            return clipped, clipped, clipped
        if self.norm == "layer":
            return nn.LayerNorm(size, self.norm_eps), nn.LayerNorm(size, self.norm_eps), clipped
        q, k = (AcrossHeads(heads * size, self.norm_eps, clipped) for heads in (self.heads, kv_heads))
        return q, k, clipped


def rotary_from_hf(config: Mapping[str, Any]) -> Rotary:
    """The rotary positions of a config.json. Raises UserError for a kind that is not one of `ROTARY_KINDS`, or for a
    number that is missing or cannot be one."""
    older, newer = typed("config.json", config, {"rope_scaling": dict | None, "rope_parameters": dict | None})
    outside = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    given = {name: value for name, value in outside.items() if value is not None}
    given |= older or newer or {}  # where both are there, transformers reads the older
    where, kind = f"config.json: rope_{'scaling' if older else 'parameters'}", given.get("rope_type", given.get("type"))
    kind = "default" if kind is None else kind
    if not isinstance(kind, str) or kind not in ROTARY_KINDS:
        raise UserError(f"{where} is of type {kind!r}; here rotary positions are {', '.join(ROTARY_KINDS)}")
    if any(isinstance(value, dict) for value in given.values()):
        raise UserError(f"{where} differs between layers; here all layers have the same rotary positions")
    names = {"theta": "rope_theta", "share": "partial_rotary_factor", **ROTARY_KINDS[kind]}
    usual = {"theta": Rotary.theta, "share": 1.0, "original": config.get("max_position_embeddings")}
    usual |= USUAL_ROTARY.get(config.get("model_type"), {})
    values: dict[str, Any] = {ours: given.get(theirs, usual.get(ours)) for ours, theirs in names.items()}
    for ours, value in values.items():
        if not is_number(value) or value <= 0:
            raise UserError(f"{where}: {names[ours]} must be a number above 0, not {value!r}")
    if kind == "llama3" and values["low"] >= values["high"]:
        raise UserError(f"{where}: low_freq_factor must be below high_freq_factor, not {values['low']}")
    return Rotary(kind=kind, **values)


def rotary_to_hf(rotary: Rotary) -> dict[str, Any]:
    """The inverse of `rotary_from_hf`."""
    names = {"theta": "rope_theta", **ROTARY_KINDS[rotary.kind]}
    if rotary.share != 1.0:
        names["share"] = "partial_rotary_factor"
    return {"rope_type": rotary.kind} | {theirs: getattr(rotary, ours) for ours, theirs in names.items()}


class LlamaBlock(PreNormBlock):
    """Pre-LN, with the norms and the attention that the config names."""

    def __init__(self, config: LlamaConfig, mlp: nn.Module) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.norm1 = norm(config.dim, config.norm_eps)
        self.attn = MultiHeadAttention(
            config.dim,
            config.heads,
            head_dim=config.head_dim,
            kv_heads=config.kv_heads,
            bias=config.qkv_bias,
            out_bias=config.out_bias,
            dropout=config.attention_dropout,
            before=config.before_attention(),
        )
        self.norm2 = norm(config.dim, config.norm_eps)
        self.mlp = mlp


class LlamaExpertBlock(ExpertBlock, LlamaBlock):
    """With experts."""


class Llama(BlockDecoder[LlamaConfig]):
    """Token embedding, blocks, a last norm, and a head of its own or one that is the embedding."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(self.block(layer) for layer in range(config.layers))
        self.norm = NORMS[config.norm](config.dim, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.apply(lambda module: init_weights(module, config.init_std))
        taps.name_modules(self.blocks, "decoder")

    def block(self, layer: int) -> LlamaBlock:
        """A new block."""
        config = self.config
        if config.experts is None or not config.experts.has(layer):
            return LlamaBlock(config, self.mlp(config.hidden))
        return LlamaExpertBlock(config, config.experts.make(config.dim, self.mlp))

    def mlp(self, hidden: int) -> nn.Module:
        """A new MLP, or expert, of this inner width."""
        config, kind = self.config, GatedMLP if self.config.gated else MLP
        return kind(config.dim, hidden, activation(config.activation), bias=config.mlp_bias, dropout=config.dropout)

    @property
    def head(self) -> Tensor:
        return (self.tokens if self.lm_head is None else self.lm_head).weight

    def rotation(self, positions: Tensor) -> Rotation:
        """Positions (...) -> what turns queries and keys there."""
        return self.config.rotary.rotation(positions, self.config.head_dim or self.config.dim // self.config.heads)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V). A head of its own runs as a module, which training may replace."""
        return super().logits(hidden) if self.lm_head is None else self.lm_head(hidden)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, cache: DecoderCache | None = None
    ) -> Tensor:
        """(B, T) -> logits (B, T, V); other arguments as in `hidden`."""
        return self.logits(self.hidden(self.embed(input_ids), attention_mask, cache=cache))

    def fast_state(self) -> FastParts:
        table = self.tokens.weight.detach()

        def embed(tokens: Tensor, positions: Tensor) -> Tensor:
            return table.index_select(0, tokens)

        head = self.tokens if self.lm_head is None else self.lm_head
        return FastParts(embed, fast_blocks(self.blocks), self.norm, head, rotation=self.rotation)
