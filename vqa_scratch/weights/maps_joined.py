"""Key maps of image parts joined with a language model: BLIP-2, LLaVA, Fuyu, Idefics; see `maps.py`."""

from collections.abc import Iterable
from dataclasses import replace

from vqa_scratch.weights.maps import (
    OPT,
    SQUEEZED_TWICE,
    Entry,
    KeyMap,
    Order,
    bert_block,
    linear,
    nested,
    weight,
)

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


_RESAMPLER_ATTENTION, _RESAMPLER_MLP = "blocks.{}.0", "blocks.{}.1"
_RESAMPLER = (
    Entry("latents", ("latents",)),
    *linear("blocks.{}.norm_image", f"{_RESAMPLER_ATTENTION}.context_layer_norm"),
    *linear("blocks.{}.norm1", f"{_RESAMPLER_ATTENTION}.latents_layer_norm"),
    *weight("blocks.{}.cross.q", f"{_RESAMPLER_ATTENTION}.q_proj"),
    *weight("blocks.{}.cross.kv", f"{_RESAMPLER_ATTENTION}.k_proj", f"{_RESAMPLER_ATTENTION}.v_proj"),
    *linear("blocks.{}.cross.q_norm", f"{_RESAMPLER_ATTENTION}.q_layer_norm"),
    *linear("blocks.{}.cross.k_norm", f"{_RESAMPLER_ATTENTION}.k_layer_norm"),
    *weight("blocks.{}.cross.out", f"{_RESAMPLER_ATTENTION}.output_proj"),
    *linear("blocks.{}.norm2", f"{_RESAMPLER_MLP}.ln"),
    *weight("blocks.{}.mlp.up", f"{_RESAMPLER_MLP}.fc"),
    *weight("blocks.{}.mlp.down", f"{_RESAMPLER_MLP}.c_proj"),
    *linear("norm", "layer_norm"),
)


def _gated(vector: bool) -> tuple[Entry, ...]:
    """A gated layer; a gate for each number has two more axes there."""
    order = Order(SQUEEZED_TWICE.write, SQUEEZED_TWICE.read) if vector else Order()
    return (
        Entry("cross_gate", ("alpha_cross_attn",), order),
        Entry("mlp_gate", ("alpha_dense",), order),
        *weight("norm_cross", "input_layernorm"),
        *weight("cross.q", "cross_attn.q_proj"),
        *weight("cross.kv", "cross_attn.k_proj", "cross_attn.v_proj"),
        *weight("cross.q_norm", "cross_attn.q_layer_norm"),
        *weight("cross.k_norm", "cross_attn.k_layer_norm"),
        *weight("cross.out", "cross_attn.o_proj"),
        *weight("norm_mlp", "post_attention_layernorm"),
        *(e for name in ("gate", "up", "down") for e in weight(f"mlp.{name}", f"mlp.{name}_proj")),
    )


def idefics(
    vision: KeyMap, language: KeyMap, *, vocabulary: tuple[int, int], before: Iterable[int], vector: bool
) -> KeyMap:
    """Idefics: words of its own have their own tables; the n-th gated layer is before the n-th of these blocks."""

    def words(entry: Entry, second: str) -> Entry:
        if entry.ours not in ("tokens.weight", "lm_head.weight") or not vocabulary[1]:
            return entry
        key, name = entry.theirs[0], f"{entry.theirs[0].removesuffix('weight')}{second}.weight"
        return entry._replace(theirs=(key, name), shares=vocabulary)

    tied = dict(language.tied)
    if tied and vocabulary[1]:
        tied["lm_head.additional_fc.weight"] = "embed_tokens.additional_embedding.weight"
    tables = tuple(
        f"{key}.rotary_emb.inv_freq" for key in ("layers.{}.self_attn", "gated_cross_attn_layers.{}.cross_attn")
    )
    gated = ((f"language.blocks.{block}.gated.", f"gated_cross_attn_layers.{n}.") for n, block in enumerate(before))
    return replace(
        language,
        body=(
            *nested("vision.", vision.body, vision.prefix),
            *nested("resampler.", _RESAMPLER, "perceiver_resampler."),
            *nested("language.", tuple(words(e, "additional_embedding") for e in language.body)),
            *(e for ours, theirs in gated for e in nested(ours, _gated(vector), theirs)),
        ),
        head=nested("language.", tuple(words(e, "additional_fc") for e in language.head)),
        dropped=(*tables, *(vision.prefix + key for key in vision.dropped)),
        tied=tied,
    )


def _open_flamingo_mlp(norm: str, ours: str, theirs: str) -> tuple[Entry, ...]:
    return (*linear(norm, f"{theirs}.0"), *weight(f"{ours}.up", f"{theirs}.1"), *weight(f"{ours}.down", f"{theirs}.3"))


_GATED_LAYER = "lang_encoder.gated_cross_attn_layers.{}"
OPEN_FLAMINGO = KeyMap(  # what it trains; the same layers are also among the decoder's blocks, under its own names
    body=(
        Entry("resampler.latents", ("perceiver.latents",)),
        *linear("resampler.blocks.{}.norm_image", "perceiver.layers.{}.0.norm_media"),
        *linear("resampler.blocks.{}.norm1", "perceiver.layers.{}.0.norm_latents"),
        *weight("resampler.blocks.{}.cross.q", "perceiver.layers.{}.0.to_q"),
        *weight("resampler.blocks.{}.cross.kv", "perceiver.layers.{}.0.to_kv"),
        *weight("resampler.blocks.{}.cross.out", "perceiver.layers.{}.0.to_out"),
        *_open_flamingo_mlp("resampler.blocks.{}.norm2", "resampler.blocks.{}.mlp", "perceiver.layers.{}.1"),
        *linear("resampler.norm", "perceiver.norm"),
        Entry("gated.{}.cross_gate", (f"{_GATED_LAYER}.attn_gate",)),
        Entry("gated.{}.mlp_gate", (f"{_GATED_LAYER}.ff_gate",)),
        *linear("gated.{}.norm_cross", f"{_GATED_LAYER}.attn.norm"),
        *weight("gated.{}.cross.q", f"{_GATED_LAYER}.attn.to_q"),
        *weight("gated.{}.cross.kv", f"{_GATED_LAYER}.attn.to_kv"),
        *weight("gated.{}.cross.out", f"{_GATED_LAYER}.attn.to_out"),
        *_open_flamingo_mlp("gated.{}.norm_mlp", "gated.{}.mlp", f"{_GATED_LAYER}.ff"),
    ),
    spellings=((r"lang_encoder\..*\.(\d+)\.gated_cross_attn_layer\.", r"lang_encoder.gated_cross_attn_layers.\1."),),
)
