"""Key maps of image parts joined with a language model: BLIP-2, LLaVA, Fuyu; see `maps.py`."""

from vqa_scratch.weights.maps import OPT, Entry, KeyMap, bert_block, linear, nested

# Newer files spell some beginnings otherwise, and what a program saved without `save_pretrained` is spelled as the
# modules of today's `transformers` are, after the "model." that is in `WRAPPERS` of convert.py.
_LANGUAGE = (
    (r"language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)
_TOWER = (r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.")


def _joined(*own: Entry, spellings: tuple[tuple[str, str], ...] = (), **parts: tuple[str, KeyMap]) -> KeyMap:
    """A model with entries of its `own`, and of parts: our name, what its keys begin with, and its own map."""
    body, dropped, tied = list(own), list[str](), dict[str, str]()
    for name, (theirs, part) in parts.items():
        whole = theirs + part.prefix
        body += nested(f"{name}.", part.body, whole) + nested(f"{name}.", part.head, theirs)
        dropped += [whole + key for key in part.dropped]
        tied |= {theirs + key: whole + same for key, same in part.tied.items()}
    return KeyMap(body=tuple(body), dropped=tuple(dropped), tied=tied, spellings=spellings)


_EVA_LAYER = "encoder.layers.{}"
_EVA_VIT = (
    Entry("cls_token", ("embeddings.class_embedding",)),
    Entry("positions", ("embeddings.position_embedding",)),
    *linear("patch_embed", "embeddings.patch_embedding"),
    *linear("blocks.{}.attn.qkv", f"{_EVA_LAYER}.self_attn.qkv"),  # also one tensor there
    *linear("blocks.{}.attn.out", f"{_EVA_LAYER}.self_attn.projection"),
    *linear("blocks.{}.norm1", f"{_EVA_LAYER}.layer_norm1"),
    *linear("blocks.{}.norm2", f"{_EVA_LAYER}.layer_norm2"),
    *linear("blocks.{}.mlp.up", f"{_EVA_LAYER}.mlp.fc1"),
    *linear("blocks.{}.mlp.down", f"{_EVA_LAYER}.mlp.fc2"),
    *linear("norm", "post_layernorm"),
)

_QFORMER_CROSS = "encoder.layer.{}.crossattention"
_QFORMER = (
    *linear("norm", "layernorm"),
    *bert_block("attention", "_query"),
    *linear("blocks.{}.cross.q", f"{_QFORMER_CROSS}.attention.query"),
    *linear("blocks.{}.cross.kv", f"{_QFORMER_CROSS}.attention.key", f"{_QFORMER_CROSS}.attention.value"),
    *linear("blocks.{}.cross.out", f"{_QFORMER_CROSS}.output.dense"),
    *linear("blocks.{}.norm_cross", f"{_QFORMER_CROSS}.output.LayerNorm"),
)

BLIP2 = _joined(
    Entry("qformer.queries", ("query_tokens",)),
    *linear("projection", "language_projection"),
    vision=("vision_model.", KeyMap(body=_EVA_VIT)),
    qformer=("qformer.", KeyMap(body=_QFORMER)),
    language=("language_model.", OPT),
)


def llava(vision: KeyMap, language: KeyMap) -> KeyMap:
    """LLaVA; the Hub's files have `vision_tower.vision_model.*`, those of transformers 5 `vision_tower.*`."""
    return _joined(
        *linear("up", "multi_modal_projector.linear_1"),
        *linear("down", "multi_modal_projector.linear_2"),
        spellings=(*_LANGUAGE, _TOWER),
        vision=("vision_tower.", vision),
        language=("language_model.", language),
    )


def fuyu(language: KeyMap) -> KeyMap:
    return _joined(
        *linear("patch_embed", "vision_embed_tokens"), spellings=_LANGUAGE, language=("language_model.", language)
    )
