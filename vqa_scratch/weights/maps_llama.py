"""Key maps of the decoders built like Llama. What depends on the numbers of heads is made for them."""

from dataclasses import replace

from vqa_scratch.weights.maps import BLOCK, Entry, KeyMap, Order, each, linear, weight

_TIED = {"lm_head.weight": "embed_tokens.weight"}
_LAYER = "layers.{}."
_SHARED = (
    *weight("tokens", "embed_tokens"),
    *each(linear, BLOCK, _LAYER, "norm1=input_layernorm norm2=post_attention_layernorm"),
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


def experts(block: str, parts: str) -> tuple[Entry, ...]:
    """A mixture of experts: what its block and, as pairs, the three matrices of an expert are called."""
    router = weight("blocks.{}.mlp.router.gate", f"{_LAYER}{block}.gate")
    return (*router, *each(weight, f"{BLOCK}mlp.experts.{{}}.", f"{_LAYER}{block}.experts.{{}}.", parts))


_PARTS = "gate=gate_proj up=up_proj down=down_proj"
MIXTRAL = experts("block_sparse_moe", "gate=w1 up=w3 down=w2")
SHARED = (  # Qwen2-MoE and OLMoE, which has no shared expert, but norms of q and k
    *experts("mlp", _PARTS),
    *each(weight, f"{BLOCK}mlp.shared.mlp.", f"{_LAYER}mlp.shared_expert.", _PARTS),
    *weight("blocks.{}.mlp.shared.share", f"{_LAYER}mlp.shared_expert_gate"),
    *each(weight, f"{BLOCK}attn.", f"{_LAYER}self_attn.", "q_norm.norm=q_norm k_norm.norm=k_norm"),
)


def llama(heads: int, kv_heads: int, tied: bool, *more: Entry) -> KeyMap:
    """Llama and Qwen2, which has biases on q, k and v; `more` has the experts of those with experts."""
    qkv = linear("blocks.{}.attn.qkv", *(f"{_LAYER}self_attn.{name}_proj" for name in "qkv"))
    return _decoder(
        tied,
        *(entry._replace(shares=(heads, kv_heads, kv_heads)) for entry in qkv),
        *linear("blocks.{}.attn.out", f"{_LAYER}self_attn.o_proj"),
        *each(linear, f"{BLOCK}mlp.", f"{_LAYER}mlp.", _PARTS),
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
        *(e._replace(order=by_head) for e in linear("blocks.{}.attn.qkv", f"{_LAYER}self_attn.query_key_value")),
        *each(linear, f"{BLOCK}attn.", f"{_LAYER}self_attn.", "out=dense q_norm=q_layernorm k_norm=k_layernorm"),
        *each(linear, f"{BLOCK}mlp.", f"{_LAYER}mlp.", "up=dense_h_to_4h down=dense_4h_to_h"),
        *linear("norm", "final_layernorm"),
    )
