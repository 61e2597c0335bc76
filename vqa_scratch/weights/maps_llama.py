"""Key maps of the decoders built like Llama. What depends on the numbers of heads is made for them."""

from dataclasses import replace

from vqa_scratch.weights.maps import Entry, KeyMap, Order, linear, weight

_TIED = {"lm_head.weight": "embed_tokens.weight"}
_LAYER = "layers.{}"
_SHARED = (
    *weight("tokens", "embed_tokens"),
    *linear("blocks.{}.norm1", f"{_LAYER}.input_layernorm"),
    *linear("blocks.{}.norm2", f"{_LAYER}.post_attention_layernorm"),
)


def _decoder(tied: bool, *body: Entry) -> KeyMap:
    """A decoder with a head of its own, or one that is the token embedding."""
    whole = KeyMap(
        prefix="model.",
        write_prefix=True,
        body=(*_SHARED, *body),
        # Tables that old releases saved with the weights.
        dropped=("layers.{}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
    )
    return replace(whole, tied=_TIED) if tied else replace(whole, head=weight("lm_head", "lm_head"))


def experts(block: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    """A mixture of experts: what its block and the three matrices of an expert are called."""
    parts = {"gate": gate, "up": up, "down": down}
    return (
        *weight("blocks.{}.mlp.router.gate", f"{_LAYER}.{block}.gate"),
        *(
            entry
            for ours, theirs in parts.items()
            for entry in weight(f"blocks.{{}}.mlp.experts.{{}}.{ours}", f"{_LAYER}.{block}.experts.{{}}.{theirs}")
        ),
    )


_PARTS = ("gate", "up", "down")
MIXTRAL = experts("block_sparse_moe", "w1", "w3", "w2")
SHARED = (  # Qwen2-MoE and OLMoE, which has no shared expert, but norms of q and k
    *experts("mlp", "gate_proj", "up_proj", "down_proj"),
    *(e for x in _PARTS for e in weight(f"blocks.{{}}.mlp.shared.mlp.{x}", f"{_LAYER}.mlp.shared_expert.{x}_proj")),
    *weight("blocks.{}.mlp.shared.share", f"{_LAYER}.mlp.shared_expert_gate"),
    *weight("blocks.{}.attn.q_norm.norm", f"{_LAYER}.self_attn.q_norm"),
    *weight("blocks.{}.attn.k_norm.norm", f"{_LAYER}.self_attn.k_norm"),
)


def llama(heads: int, kv_heads: int, tied: bool, *more: Entry) -> KeyMap:
    """Llama and Qwen2, which has biases on q, k and v; `more` has the experts of those with experts."""
    qkv = linear("blocks.{}.attn.qkv", *(f"{_LAYER}.self_attn.{name}_proj" for name in "qkv"))
    return _decoder(
        tied,
        *(entry._replace(shares=(heads, kv_heads, kv_heads)) for entry in qkv),
        *linear("blocks.{}.attn.out", f"{_LAYER}.self_attn.o_proj"),
        *(e for name in _PARTS for e in linear(f"blocks.{{}}.mlp.{name}", f"{_LAYER}.mlp.{name}_proj")),
        *weight("norm", "norm"),
        *more,
    )


def persimmon(heads: int, tied: bool) -> KeyMap:
    """Persimmon, whose q, k and v are one tensor with q, k and v of the first head first, then of the second."""
    by_head = Order(
        lambda tensor: tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2),
        lambda tensor: tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2),
    )
    return _decoder(
        tied,
        *(e._replace(order=by_head) for e in linear("blocks.{}.attn.qkv", f"{_LAYER}.self_attn.query_key_value")),
        *linear("blocks.{}.attn.out", f"{_LAYER}.self_attn.dense"),
        *linear("blocks.{}.attn.q_norm", f"{_LAYER}.self_attn.q_layernorm"),
        *linear("blocks.{}.attn.k_norm", f"{_LAYER}.self_attn.k_layernorm"),
        *linear("blocks.{}.mlp.up", f"{_LAYER}.mlp.dense_h_to_4h"),
        *linear("blocks.{}.mlp.down", f"{_LAYER}.mlp.dense_4h_to_h"),
        *linear("norm", "final_layernorm"),
    )
