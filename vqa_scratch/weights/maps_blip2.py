"""Key maps of BLIP-2 and of OPT, the language model in it; see `maps` for how to read one."""

from vqa_scratch.weights.maps import Entry, KeyMap, linear, weight

_OPT_LAYER = "decoder.layers.{}"
OPT = KeyMap(
    prefix="model.",
    write_prefix=True,
    body=(
        *weight("tokens", "decoder.embed_tokens"),
        *weight("positions", "decoder.embed_positions"),
        *weight("project_in", "decoder.project_in"),
        *weight("project_out", "decoder.project_out"),
        *linear("blocks.{}.attn.qkv", *(f"{_OPT_LAYER}.self_attn.{name}_proj" for name in "qkv")),
        *linear("blocks.{}.attn.out", f"{_OPT_LAYER}.self_attn.out_proj"),
        *linear("blocks.{}.norm1", f"{_OPT_LAYER}.self_attn_layer_norm"),
        *linear("blocks.{}.norm2", f"{_OPT_LAYER}.final_layer_norm"),
        *linear("blocks.{}.mlp.up", f"{_OPT_LAYER}.fc1"),
        *linear("blocks.{}.mlp.down", f"{_OPT_LAYER}.fc2"),
        *linear("norm", "decoder.final_layer_norm"),
    ),
    tied={"lm_head.weight": "decoder.embed_tokens.weight"},
)

_VISION_LAYER = "vision_model.encoder.layers.{}"
_VISION = (
    Entry("vision.cls_token", ("vision_model.embeddings.class_embedding",)),
    Entry("vision.positions", ("vision_model.embeddings.position_embedding",)),
    *linear("vision.patch_embed", "vision_model.embeddings.patch_embedding"),
    *linear("vision.blocks.{}.attn.qkv", f"{_VISION_LAYER}.self_attn.qkv"),  # one tensor there too
    *linear("vision.blocks.{}.attn.out", f"{_VISION_LAYER}.self_attn.projection"),
    *linear("vision.blocks.{}.norm1", f"{_VISION_LAYER}.layer_norm1"),
    *linear("vision.blocks.{}.norm2", f"{_VISION_LAYER}.layer_norm2"),
    *linear("vision.blocks.{}.mlp.up", f"{_VISION_LAYER}.mlp.fc1"),
    *linear("vision.blocks.{}.mlp.down", f"{_VISION_LAYER}.mlp.fc2"),
    *linear("vision.norm", "vision_model.post_layernorm"),
)

_QFORMER_LAYER = "qformer.encoder.layer.{}"
_QFORMER = (
    Entry("qformer.queries", ("query_tokens",)),
    *linear("qformer.norm", "qformer.layernorm"),
    *linear(
        "qformer.blocks.{}.attn.qkv",
        *(f"{_QFORMER_LAYER}.attention.attention.{name}" for name in ("query", "key", "value")),
    ),
    *linear("qformer.blocks.{}.attn.out", f"{_QFORMER_LAYER}.attention.output.dense"),
    *linear("qformer.blocks.{}.norm1", f"{_QFORMER_LAYER}.attention.output.LayerNorm"),
    *linear("qformer.blocks.{}.cross.q", f"{_QFORMER_LAYER}.crossattention.attention.query"),
    *linear(
        "qformer.blocks.{}.cross.kv",
        *(f"{_QFORMER_LAYER}.crossattention.attention.{name}" for name in ("key", "value")),
    ),
    *linear("qformer.blocks.{}.cross.out", f"{_QFORMER_LAYER}.crossattention.output.dense"),
    *linear("qformer.blocks.{}.norm_cross", f"{_QFORMER_LAYER}.crossattention.output.LayerNorm"),
    *linear("qformer.blocks.{}.mlp.up", f"{_QFORMER_LAYER}.intermediate_query.dense"),
    *linear("qformer.blocks.{}.mlp.down", f"{_QFORMER_LAYER}.output_query.dense"),
    *linear("qformer.blocks.{}.norm2", f"{_QFORMER_LAYER}.output_query.LayerNorm"),
)

BLIP2 = KeyMap(
    body=(
        *_VISION,
        *_QFORMER,
        *linear("projection", "language_projection"),
        *(
            Entry(f"language.{ours}", tuple(f"language_model.model.{key}" for key in theirs), turned)
            for ours, theirs, turned in OPT.body
        ),
    ),
    tied={f"language_model.{key}": f"language_model.model.{same}" for key, same in OPT.tied.items()},
)
