"""Key maps of Whisper (Radford et al. 2022, arXiv 2212.04356): of `transformers`, of OpenAI's files, of CTranslate2.

Its keys have no bias, but our joined projections have one for queries, keys and values. The third of the keys is zero:
it would add the same number to all scores of a query, which a softmax does not see. So it is not written either.
"""

from typing import NamedTuple

from vqa_scratch.weights.maps import ABSENT, Entry, KeyMap, linear, weight


class _Names(NamedTuple):
    """What a layout calls the parts of a block; the three projections are a matrix each."""

    layers: str
    attn: str
    cross: str
    projections: tuple[str, str, str, str]  # q, k, v, out
    norms: tuple[str, str, str]  # before self-attention, cross-attention, MLP
    mlp: tuple[str, str]


def _blocks(side: str, names: _Names) -> tuple[Entry, ...]:
    """The blocks of the encoder or of the decoder."""
    ours, theirs = f"{side}.blocks.{{}}", f"{side}.{names.layers}.{{}}"
    (q, k, v, out), (norm1, norm_cross, norm2), (up, down) = names.projections, names.norms, names.mlp
    attn, cross = f"{theirs}.{names.attn}", f"{theirs}.{names.cross}"
    entries = (
        *linear(f"{ours}.norm1", f"{theirs}.{norm1}"),
        *weight(f"{ours}.attn.qkv", f"{attn}.{q}", f"{attn}.{k}", f"{attn}.{v}"),
        Entry(f"{ours}.attn.qkv.bias", (f"{attn}.{q}.bias", ABSENT, f"{attn}.{v}.bias")),
        *linear(f"{ours}.attn.out", f"{attn}.{out}"),
        *linear(f"{ours}.norm2", f"{theirs}.{norm2}"),
        *linear(f"{ours}.mlp.up", f"{theirs}.{up}"),
        *linear(f"{ours}.mlp.down", f"{theirs}.{down}"),
    )
    if side == "encoder":
        return entries
    return (
        *entries,
        *linear(f"{ours}.norm_cross", f"{theirs}.{norm_cross}"),
        *linear(f"{ours}.cross.q", f"{cross}.{q}"),
        *weight(f"{ours}.cross.kv", f"{cross}.{k}", f"{cross}.{v}"),
        Entry(f"{ours}.cross.kv.bias", (ABSENT, f"{cross}.{v}.bias")),
        *linear(f"{ours}.cross.out", f"{cross}.{out}"),
    )


_CONVOLUTIONS = (*linear("encoder.conv1", "encoder.conv1"), *linear("encoder.conv2", "encoder.conv2"))
_TRANSFORMERS = _Names(
    "layers",
    "self_attn",
    "encoder_attn",
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    ("fc1", "fc2"),
)
WHISPER = KeyMap(
    prefix="model.",
    write_prefix=True,
    body=(
        *_CONVOLUTIONS,
        Entry("encoder.positions", ("encoder.embed_positions.weight",)),
        *_blocks("encoder", _TRANSFORMERS),
        *linear("encoder.norm", "encoder.layer_norm"),
        *weight("decoder.tokens", "decoder.embed_tokens"),
        *weight("decoder.positions", "decoder.embed_positions"),
        *_blocks("decoder", _TRANSFORMERS),
        *linear("decoder.norm", "decoder.layer_norm"),
    ),
    tied={"proj_out.weight": "decoder.embed_tokens.weight"},
)

_OPENAI = _Names(
    "blocks",
    "attn",
    "cross_attn",
    ("query", "key", "value", "out"),
    ("attn_ln", "cross_attn_ln", "mlp_ln"),
    ("mlp.0", "mlp.2"),
)
WHISPER_OPENAI = KeyMap(
    body=(
        *_CONVOLUTIONS,
        Entry("encoder.positions", ("encoder.positional_embedding",)),
        *_blocks("encoder", _OPENAI),
        *linear("encoder.norm", "encoder.ln_post"),
        *weight("decoder.tokens", "decoder.token_embedding"),
        Entry("decoder.positions.weight", ("decoder.positional_embedding",)),
        *_blocks("decoder", _OPENAI),
        *linear("decoder.norm", "decoder.ln"),
    ),
    dropped=("decoder.mask",),
)


def _parts(ours: str, theirs: str, names: tuple[str, str] = ("weight", "bias")) -> tuple[Entry, ...]:
    return tuple(Entry(f"{ours}.{part}", (f"{theirs}/{name}",)) for part, name in zip(("weight", "bias"), names))


def _norm(ours: str, theirs: str) -> tuple[Entry, ...]:
    return _parts(ours, f"{theirs}/layer_norm", ("gamma", "beta"))


def _ctranslate2() -> KeyMap:
    """CTranslate2 joins the projections as we do, zeros of the keys included."""
    body = [
        *_parts("encoder.conv1", "encoder/conv1"),
        *_parts("encoder.conv2", "encoder/conv2"),
        Entry("encoder.positions", ("encoder/position_encodings/encodings",)),
        Entry("decoder.tokens.weight", ("decoder/embeddings/weight",)),
        Entry("decoder.positions.weight", ("decoder/position_encodings/encodings",)),
    ]
    for side in ("encoder", "decoder"):
        ours, theirs = f"{side}.blocks.{{}}", f"{side}/layer_{{}}"
        body += _norm(f"{ours}.norm1", f"{theirs}/self_attention")
        body += _parts(f"{ours}.attn.qkv", f"{theirs}/self_attention/linear_0")
        body += _parts(f"{ours}.attn.out", f"{theirs}/self_attention/linear_1")
        body += _norm(f"{ours}.norm2", f"{theirs}/ffn")
        body += _parts(f"{ours}.mlp.up", f"{theirs}/ffn/linear_0")
        body += _parts(f"{ours}.mlp.down", f"{theirs}/ffn/linear_1")
        body += _norm(f"{side}.norm", side)
    cross = "decoder/layer_{}/attention"
    body += _norm("decoder.blocks.{}.norm_cross", cross)
    for number, name in enumerate(("q", "kv", "out")):
        body += _parts(f"decoder.blocks.{{}}.cross.{name}", f"{cross}/linear_{number}")
    return KeyMap(tuple(body), tied={"decoder/projection/weight": "decoder/embeddings/weight"})


WHISPER_CTRANSLATE2 = _ctranslate2()
