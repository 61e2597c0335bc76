"""Key maps of image parts joined with a language model: BLIP-2, LLaVA, Fuyu, Idefics; see `maps.py`."""

from collections.abc import Iterable
from dataclasses import replace

from vqa_scratch.weights.maps import (
    BLOCK,
    OPT,
    SQUEEZED_TWICE,
    Entry,
    KeyMap,
    Order,
    bert_block,
    each,
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


_EVA_LAYER = "encoder.layers.{}."
_EVA_VIT = (
    Entry("cls_token", ("embeddings.class_embedding",)),
    Entry("positions", ("embeddings.position_embedding",)),
    *each(linear, "", "", "patch_embed=embeddings.patch_embedding norm=post_layernorm"),
    *each(linear, BLOCK, _EVA_LAYER, "attn.qkv=self_attn.qkv attn.out=self_attn.projection"),  # also one tensor there
    *each(linear, BLOCK, _EVA_LAYER, "norm1=layer_norm1 norm2=layer_norm2 mlp.up=mlp.fc1 mlp.down=mlp.fc2"),
)

_QFORMER = (
    *linear("norm", "layernorm"),
    *bert_block("attention", "_query"),
    *each(
        linear,
        BLOCK,
        "encoder.layer.{}.crossattention.",
        """cross.q=attention.query cross.kv=attention.key+attention.value cross.out=output.dense
        norm_cross=output.LayerNorm""",
    ),
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
        *each(linear, "", "multi_modal_projector.", "up=linear_1 down=linear_2"),
        spellings=(*_LANGUAGE, _TOWER),
        vision=("vision_tower.", vision),
        language=("language_model.", language),
    )


def fuyu(language: KeyMap) -> KeyMap:
    return _joined(
        *linear("patch_embed", "vision_embed_tokens"), spellings=_LANGUAGE, language=("language_model.", language)
    )


_RESAMPLER = (
    Entry("latents", ("latents",)),
    *each(linear, BLOCK, f"{BLOCK}0.", "norm_image=context_layer_norm norm1=latents_layer_norm"),
    *each(weight, f"{BLOCK}cross.", f"{BLOCK}0.", "q=q_proj kv=k_proj+v_proj out=output_proj"),
    *each(linear, f"{BLOCK}cross.", f"{BLOCK}0.", "q_norm=q_layer_norm k_norm=k_layer_norm"),
    *linear("blocks.{}.norm2", "blocks.{}.1.ln"),
    *each(weight, f"{BLOCK}mlp.", f"{BLOCK}1.", "up=fc down=c_proj"),
    *linear("norm", "layer_norm"),
)


def _gated(vector: bool) -> tuple[Entry, ...]:
    """A gated layer; a gate for each number has two more axes there."""
    order = Order(SQUEEZED_TWICE.write, SQUEEZED_TWICE.read) if vector else Order()
    return (
        Entry("cross_gate", ("alpha_cross_attn",), order),
        Entry("mlp_gate", ("alpha_dense",), order),
        *each(weight, "", "", "norm_cross=input_layernorm norm_mlp=post_attention_layernorm"),
        *each(weight, "cross.", "cross_attn.", "q=q_proj kv=k_proj+v_proj out=o_proj"),
        *each(weight, "cross.", "cross_attn.", "q_norm=q_layer_norm k_norm=k_layer_norm"),
        *each(weight, "mlp.", "mlp.", "gate=gate_proj up=up_proj down=down_proj"),
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


_PERCEIVER, _GATED_LAYER = "perceiver.layers.{}.", "lang_encoder.gated_cross_attn_layers.{}."
_OPEN_ATTENTION = "cross.q=to_q cross.kv=to_kv cross.out=to_out"
OPEN_FLAMINGO = KeyMap(  # what it trains; the same layers are also among the decoder's blocks, under its own names
    body=(
        Entry("resampler.latents", ("perceiver.latents",)),
        *each(linear, f"resampler.{BLOCK}", _PERCEIVER, "norm_image=0.norm_media norm1=0.norm_latents norm2=1.0"),
        *each(weight, f"resampler.{BLOCK}", f"{_PERCEIVER}0.", _OPEN_ATTENTION),
        *each(weight, f"resampler.{BLOCK}mlp.", f"{_PERCEIVER}1.", "up=1 down=3"),
        *linear("resampler.norm", "perceiver.norm"),
        Entry("gated.{}.cross_gate", (f"{_GATED_LAYER}attn_gate",)),
        Entry("gated.{}.mlp_gate", (f"{_GATED_LAYER}ff_gate",)),
        *each(linear, "gated.{}.", _GATED_LAYER, "norm_cross=attn.norm norm_mlp=ff.0"),
        *each(weight, "gated.{}.", f"{_GATED_LAYER}attn.", _OPEN_ATTENTION),
        *each(weight, "gated.{}.mlp.", f"{_GATED_LAYER}ff.", "up=1 down=3"),
    ),
    spellings=((r"lang_encoder\..*\.(\d+)\.gated_cross_attn_layer\.", r"lang_encoder.gated_cross_attn_layers.\1."),),
)
