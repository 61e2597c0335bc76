"""Key maps of Whisper (Radford et al. 2022, arXiv 2212.04356): of `transformers` and OpenAI's files, of CTranslate2.

Its keys have no bias, but our joined projections have one for queries, keys and values. The third of the keys is zero:
it would add the same number to all scores of a query, which a softmax does not see. So it is not written either.
"""

from vqa_scratch.weights.maps import ABSENT, BLOCK, Entry, KeyMap, each, linear, weight

# OpenAI's names of the parts, and those of `transformers`: of a block, and of the whole.
_BLOCK = """attn.query self_attn.q_proj attn.key self_attn.k_proj attn.value self_attn.v_proj
    attn.out self_attn.out_proj cross_attn.query encoder_attn.q_proj cross_attn.key encoder_attn.k_proj
    cross_attn.value encoder_attn.v_proj cross_attn.out encoder_attn.out_proj attn_ln self_attn_layer_norm
    cross_attn_ln encoder_attn_layer_norm mlp_ln final_layer_norm mlp.0 fc1 mlp.2 fc2""".split()
_WHOLE = """encoder.ln_post encoder.layer_norm encoder.positional_embedding encoder.embed_positions.weight
    decoder.ln decoder.layer_norm decoder.positional_embedding decoder.embed_positions.weight
    decoder.token_embedding decoder.embed_tokens""".split()
_SPELLINGS = tuple(
    (rf"(\w+)\.blocks\.(\d+)\.{theirs}\.", rf"\1.layers.\2.{here}.")
    for theirs, here in zip(_BLOCK[::2], _BLOCK[1::2], strict=True)
) + tuple((rf"{theirs}\b", here) for theirs, here in zip(_WHOLE[::2], _WHOLE[1::2], strict=True))


def _whisper() -> KeyMap:
    body = [*each(linear, "encoder.", "encoder.", "conv1=conv1 conv2=conv2 norm=layer_norm")]
    body += [Entry("encoder.positions", ("encoder.embed_positions.weight",))]
    body += each(weight, "decoder.", "decoder.", "positions=embed_positions tokens=embed_tokens")
    body += linear("decoder.norm", "decoder.layer_norm")
    for side in ("encoder", "decoder"):
        ours, layer = f"{side}.{BLOCK}", f"{side}.layers.{{}}."
        q, k, v = (f"{layer}self_attn.{name}_proj" for name in "qkv")
        body += weight(f"{ours}attn.qkv", q, k, v)
        body += [Entry(f"{ours}attn.qkv.bias", (f"{q}.bias", ABSENT, f"{v}.bias"))]
        body += each(linear, ours, layer, "attn.out=self_attn.out_proj mlp.up=fc1 mlp.down=fc2")
        body += each(linear, ours, layer, "norm1=self_attn_layer_norm norm2=final_layer_norm")
    ours, cross = f"decoder.{BLOCK}", "decoder.layers.{}.encoder_attn"
    body += each(linear, ours, cross, "cross.q=.q_proj cross.out=.out_proj norm_cross=_layer_norm")
    body += weight(f"{ours}cross.kv", f"{cross}.k_proj", f"{cross}.v_proj")
    body += [Entry(f"{ours}cross.kv.bias", (ABSENT, f"{cross}.v_proj.bias"))]
    return KeyMap(
        tuple(body),
        prefix="model.",
        write_prefix=True,
        dropped=("decoder.mask",),  # the causal mask, in early files of OpenAI's
        tied={"proj_out.weight": "decoder.embed_tokens.weight"},
        spellings=_SPELLINGS,
    )


def _ctranslate2() -> KeyMap:
    """CTranslate2 joins the projections as we do, zeros of the keys included."""

    def both(ours: str, theirs: str, weight: str = "weight", bias: str = "bias") -> list[Entry]:
        return [Entry(f"{ours}.weight", (f"{theirs}/{weight}",)), Entry(f"{ours}.bias", (f"{theirs}/{bias}",))]

    def norm(ours: str, theirs: str) -> list[Entry]:
        return both(ours, f"{theirs}/layer_norm", "gamma", "beta")

    body = both("encoder.conv1", "encoder/conv1") + both("encoder.conv2", "encoder/conv2")
    body += [Entry("encoder.positions", ("encoder/position_encodings/encodings",))]
    body += [Entry("decoder.positions.weight", ("decoder/position_encodings/encodings",))]
    body += [Entry("decoder.tokens.weight", ("decoder/embeddings/weight",))]
    for side in ("encoder", "decoder"):
        ours, layer = f"{side}.blocks.{{}}", f"{side}/layer_{{}}"
        body += norm(f"{ours}.norm1", f"{layer}/self_attention") + norm(f"{ours}.norm2", f"{layer}/ffn")
        body += both(f"{ours}.attn.qkv", f"{layer}/self_attention/linear_0")
        body += both(f"{ours}.attn.out", f"{layer}/self_attention/linear_1")
        body += both(f"{ours}.mlp.up", f"{layer}/ffn/linear_0") + both(f"{ours}.mlp.down", f"{layer}/ffn/linear_1")
        body += norm(f"{side}.norm", side)
    cross = "decoder/layer_{}/attention"
    body += norm("decoder.blocks.{}.norm_cross", cross)
    for number, name in enumerate(("q", "kv", "out")):
        body += both(f"decoder.blocks.{{}}.cross.{name}", f"{cross}/linear_{number}")
    return KeyMap(tuple(body), tied={"decoder/projection/weight": "decoder/embeddings/weight"})


WHISPER = _whisper()
WHISPER_CTRANSLATE2 = _ctranslate2()
