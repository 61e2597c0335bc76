"""Reads and writes the preprocessor_config.json of released vision encoders, with the defaults of absent keys.

The files are those of ViT, DeiT, DINO, CLIP, BLIP and SigLIP; the rules are those of the processors of `transformers`.
"""

import re
from typing import Any

from PIL import Image

from vqa_scratch.errors import UserError, some

LARGEST_SIDE = 8_192  # pixels; more is a mistake, and would take hours
HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BILINEAR, _BICUBIC = Image.Resampling.BILINEAR.value, Image.Resampling.BICUBIC.value  # Pillow's numbers
_VIT = {"size": {"height": 224, "width": 224}, "resample": _BILINEAR, "image_mean": HALF, "image_std": HALF}
_CLIP = {
    "size": {"shortest_edge": 224},
    "resample": _BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
# The defaults of each processor type.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": _VIT,
    "DeiTImageProcessor": _VIT
    | {
        "size": {"height": 256, "width": 256},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    },
    "CLIPImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,
    "BlipImageProcessor": _CLIP | {"size": {"height": 384, "width": 384}, "do_center_crop": False},
    "IdeficsImageProcessor": _CLIP | {"size": {"height": 224, "width": 224}, "do_center_crop": False},
    "SiglipImageProcessor": _VIT | {"resample": _BICUBIC},
}
_BARE_SIZE_IS_SHORTEST_EDGE = {f"{name}ImageProcessor" for name in ("CLIP", "Llava", "Bit", "Siglip")}
_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}


def _size(value: Any, key: str, *, square: bool) -> tuple[int, int] | int:
    """(height, width), or an int for the shortest edge, from the forms that configurations use."""
    if isinstance(value, int) and not isinstance(value, bool):
        result: Any = (value, value) if square else value
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        result = tuple(value)
    elif isinstance(value, dict) and {k for k, v in value.items() if v is not None} == {"height", "width"}:
        result = (value["height"], value["width"])
    elif isinstance(value, dict) and {k for k, v in value.items() if v is not None} == {"shortest_edge"}:
        result = value["shortest_edge"]
    else:
        raise UserError(f'{key} must be a number, {{"height", "width"}} or {{"shortest_edge"}}, not {value!r}')
    sides = result if isinstance(result, tuple) else (result,)
    if not all(isinstance(side, int) and not isinstance(side, bool) and 0 < side <= LARGEST_SIDE for side in sides):
        raise UserError(f"{key} must hold whole numbers from 1 to {LARGEST_SIDE:,}, not {value!r}")
    return result


def _number(value: Any, key: str) -> float:
    usual = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6  # NaN is not
    if not usual:
        raise UserError(f"{key} must be a usual number, not {value!r}")
    return float(value)


def _channels(value: Any, key: str) -> tuple[float, float, float]:
    values = value if isinstance(value, (list, tuple)) else (value,) * 3
    if len(values) != 3:
        raise UserError(f"{key} must be a number or three, not {value!r}")
    red, green, blue = (_number(part, key) for part in values)
    return red, green, blue


def kind_of(config: dict[str, Any]) -> tuple[Any, str]:
    """(the type of processor that a config names, the same by its name of today)."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    return name, re.sub(r"(FeatureExtractor|ImageProcessor)(Fast|Pil)?$", "ImageProcessor", str(name))


def read_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of an `ImageProcessor`; UserError for an unknown type, step or size."""
    name, kind = kind_of(config)
    if kind not in _DEFAULTS:
        raise UserError(f"unknown image processor type {name!r}; known are {', '.join(_DEFAULTS)}")
    unknown = [k for k, v in config.items() if k.startswith("do_") and v and k not in _STEPS]
    if unknown:
        raise UserError(f"{name} asks for {some(unknown)}, which is not supported")
    given = {key: value for key, value in config.items() if value is not None}
    values = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    values |= _DEFAULTS[kind] | given
    if kind == "IdeficsImageProcessor" and "image_size" in given:
        values["size"] = given["image_size"]  # its older name
    square = kind not in _BARE_SIZE_IS_SHORTEST_EDGE
    crop = _size(values.get("crop_size"), "crop_size", square=True) if values.get("do_center_crop") else None
    if isinstance(crop, int):
        raise UserError(f'crop_size must be a number or {{"height", "width"}}, not {values["crop_size"]!r}')
    normalize, rescale = values["do_normalize"], values["do_rescale"]
    return {
        "size": _size(values["size"], "size", square=square) if values["do_resize"] else None,
        "resample": values["resample"],
        "crop_size": crop,
        "rescale_factor": _number(values["rescale_factor"], "rescale_factor") if rescale else None,
        "mean": _channels(values["image_mean"], "image_mean") if normalize else None,
        "std": _channels(values["image_std"], "image_std") if normalize else None,
        "kind": kind,
    }


def write_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `read_fields`."""
    size, crop, mean = fields["size"], fields["crop_size"], fields["mean"]
    sides = ("height", "width")
    config = {
        "image_processor_type": fields["kind"],
        "do_convert_rgb": True,
        "do_resize": size is not None,
        "do_center_crop": crop is not None,
        "do_rescale": fields["rescale_factor"] is not None,
        "do_normalize": mean is not None,
        "resample": int(fields["resample"]),
        "size": {"shortest_edge": size} if isinstance(size, int) else size and dict(zip(sides, size, strict=True)),
        "crop_size": crop and dict(zip(sides, crop, strict=True)),
        "rescale_factor": fields["rescale_factor"],
        "image_mean": mean and list(mean),
        "image_std": mean and list(fields["std"]),
    }
    return {key: value for key, value in config.items() if value is not None}
