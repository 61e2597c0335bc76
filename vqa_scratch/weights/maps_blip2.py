"""The key map of BLIP-2 checkpoints; see `maps.py`."""

from vqa_scratch.weights.maps import OPT, Entry, KeyMap, linear

_VISION_LAYER = "vision_model.encoder.layers.{}"
_VISION = (
    Entry("vision.cls_token", ("vision_model.embeddings.class_embedding",)),
    Entry("vision.positions", ("vision_model.embeddings.position_embedding",)),
    *linear("vision.patch_embed", "vision_model.embeddings.patch_embedding"),
    *linear("vision.blocks.{}.attn.qkv", f"{_VISION_LAYER}.self_attn.qkv"),  # also one tensor there
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
