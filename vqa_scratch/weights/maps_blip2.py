"""The key map of BLIP-2 checkpoints; see `maps.py`."""

from vqa_scratch.weights.maps import OPT, Entry, KeyMap, bert_block, linear, nested

_VISION_LAYER = "encoder.layers.{}"
_VISION = (
    Entry("cls_token", ("embeddings.class_embedding",)),
    Entry("positions", ("embeddings.position_embedding",)),
    *linear("patch_embed", "embeddings.patch_embedding"),
    *linear("blocks.{}.attn.qkv", f"{_VISION_LAYER}.self_attn.qkv"),  # also one tensor there
    *linear("blocks.{}.attn.out", f"{_VISION_LAYER}.self_attn.projection"),
    *linear("blocks.{}.norm1", f"{_VISION_LAYER}.layer_norm1"),
    *linear("blocks.{}.norm2", f"{_VISION_LAYER}.layer_norm2"),
    *linear("blocks.{}.mlp.up", f"{_VISION_LAYER}.mlp.fc1"),
    *linear("blocks.{}.mlp.down", f"{_VISION_LAYER}.mlp.fc2"),
    *linear("norm", "post_layernorm"),
)

_CROSS = "encoder.layer.{}.crossattention"
_QFORMER = (
    *linear("norm", "layernorm"),
    *bert_block("attention", "_query"),
    *linear("blocks.{}.cross.q", f"{_CROSS}.attention.query"),
    *linear("blocks.{}.cross.kv", f"{_CROSS}.attention.key", f"{_CROSS}.attention.value"),
    *linear("blocks.{}.cross.out", f"{_CROSS}.output.dense"),
    *linear("blocks.{}.norm_cross", f"{_CROSS}.output.LayerNorm"),
)

BLIP2 = KeyMap(
    body=(
        *nested("vision.", _VISION, "vision_model."),
        Entry("qformer.queries", ("query_tokens",)),
        *nested("qformer.", _QFORMER, "qformer."),
        *linear("projection", "language_projection"),
        *nested("language.", OPT.body, "language_model.model."),
    ),
    tied={f"language_model.{key}": f"language_model.model.{same}" for key, same in OPT.tied.items()},
)
