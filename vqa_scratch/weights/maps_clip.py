"""Key maps of CLIP and SigLIP, whole and one tower at a time; see `maps.py`."""

from vqa_scratch.weights.maps import (
    BLOCK,
    SELF_ATTENTION,
    SQUEEZED,
    SQUEEZED_TWICE,
    Entry,
    KeyMap,
    each,
    linear,
    nested,
    weight,
)

_LAYER = "encoder.layers.{}."
_BLOCKS = (  # of every tower
    *each(linear, BLOCK, _LAYER, SELF_ATTENTION),
    *each(linear, BLOCK, _LAYER, "norm1=layer_norm1 norm2=layer_norm2 mlp.up=mlp.fc1 mlp.down=mlp.fc2"),
)
_TEXT = (
    *each(weight, "", "embeddings.", "tokens=token_embedding positions=position_embedding"),
    *_BLOCKS,
    *linear("norm", "final_layer_norm"),
)
_PLACES = Entry("positions", ("embeddings.position_embedding.weight",), SQUEEZED)
_CLIP_IMAGE = (
    Entry("cls_token", ("embeddings.class_embedding",), SQUEEZED_TWICE),
    _PLACES,
    *weight("patch_embed", "embeddings.patch_embedding"),
    *linear("first_norm", "pre_layrnorm"),  # so spelled in the files
    *_BLOCKS,
)
_SIGLIP_IMAGE = (
    _PLACES,
    *linear("patch_embed", "embeddings.patch_embedding"),
    *_BLOCKS,
    *linear("norm", "post_layernorm"),
)
_CLIP_IMAGE_HEAD = linear("norm", "post_layernorm")
_SIGLIP_IMAGE_HEAD = (
    Entry("probe", ("head.probe",)),
    Entry("cross.qkv.weight", ("head.attention.in_proj_weight",)),
    Entry("cross.qkv.bias", ("head.attention.in_proj_bias",)),
    *each(linear, "", "head.", "cross.out=attention.out_proj norm=layernorm mlp.up=mlp.fc1 mlp.down=mlp.fc2"),
)
_POSITION_IDS = "embeddings.position_ids"  # a buffer that old releases saved with the weights


def _keys(entries: tuple[Entry, ...]) -> tuple[str, ...]:
    return tuple(key for entry in entries for key in entry.theirs)


def _tower(name: str, body: tuple[Entry, ...], *heads: str) -> KeyMap:
    """One tower, saved by itself or with the `heads` that follow it."""
    return KeyMap(prefix=f"{name}.", body=body, dropped=(_POSITION_IDS, *heads))


CLIP_VISION = _tower("vision_model", _CLIP_IMAGE, *_keys(_CLIP_IMAGE_HEAD), "visual_projection.weight")
CLIP_TEXT = _tower("text_model", _TEXT, "text_projection.weight")
SIGLIP_VISION = _tower("vision_model", _SIGLIP_IMAGE, *_keys(_SIGLIP_IMAGE_HEAD))
SIGLIP_TEXT = _tower("text_model", _TEXT, "head.weight", "head.bias")


def _both(image: tuple[Entry, ...], image_head: tuple[Entry, ...], *rest: Entry) -> KeyMap:
    return KeyMap(
        body=(
            *nested("image.", image, "vision_model."),
            *nested("image_head.", image_head, "vision_model."),
            *nested("text.", _TEXT, "text_model."),
            *rest,
        ),
        dropped=tuple(f"{tower}_model.{_POSITION_IDS}" for tower in ("vision", "text")),
    )


CLIP = _both(
    _CLIP_IMAGE,
    _CLIP_IMAGE_HEAD,
    *weight("image_head.projection", "visual_projection"),
    *weight("text_head", "text_projection"),
    Entry("logit_scale", ("logit_scale",), SQUEEZED),
)
SIGLIP = _both(
    _SIGLIP_IMAGE,
    _SIGLIP_IMAGE_HEAD,
    *linear("text_head", "text_model.head"),
    Entry("logit_scale", ("logit_scale",)),
    Entry("logit_bias", ("logit_bias",)),
)
