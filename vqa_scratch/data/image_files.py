"""Reads any image file as 8-bit RGB, or says in one line why it cannot."""

import base64
import binascii
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vqa_scratch.errors import UserError

# `load_image` raises an error instead. Appended, so that filters set by a program take precedence.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any 8- or 16-bit image as RGB.

    Transparent pixels (an alpha channel, or a transparent palette entry or colour) get a white background. 16-bit grey
    is scaled to 8 bits; Pillow's own conversion would clip it to white. Raises UserError for 32-bit modes, whose values
    have no defined white, and ValueError for modes that Pillow cannot convert.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray(((grey * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UserError(f"32-bit pixels (mode {image.mode}) have no defined range; save the image with 8 or 16 bits")
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _check_pixels(name: object, pixels: int, limit: int | None) -> None:
    if limit is not None and pixels > limit:
        raise UserError(f"{name} has {pixels:,} pixels, over the limit of {limit:,}; scale it down first")


def load_image(path: str | Path, *, upright: bool = True) -> Image.Image:
    """The image as RGB, fully decoded; of an animation, the first frame.

    `upright` turns a photo as its EXIF orientation says. The official files of VQA v2 and COCO are read as they are
    stored: models were trained and measured on those pixels.
    Raises UserError, naming the file, if it is missing, empty, truncated, no image, or over Pillow's limit of pixels.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"{path} not found: there is no such image")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes), not an image")
    return decode_image(path, path, upright=upright, most=Image.MAX_IMAGE_PIXELS)


def decode_image(
    source: Path | BinaryIO,
    name: object,
    *,
    upright: bool = True,
    most: int | None,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """`load_image` of a file or of bytes in memory, with at most so many pixels, in one of Pillow's `formats` (None:
    any). Errors call it `name`.
    """
    try:
        with Image.open(source, formats=formats) as file:
            _check_pixels(name, file.width * file.height, most)
            file.load()
            turned = upright and file.getexif().get(ExifTags.Base.Orientation, 1) != 1
            image = ImageOps.exif_transpose(file) if turned else file
    except (UserError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # from open(), before our check
        if found := re.search(r"\d+", str(error)):
            _check_pixels(name, int(found[0]), most)
        raise
    except Image.UnidentifiedImageError as error:
        known = "a format that Pillow reads" if formats is None else f"one of the formats {', '.join(formats)}"
        raise UserError(f"{name} is not an image in {known}") from error
    except Exception as error:  # decoders raise whatever they like on broken files
        if isinstance(error, OSError) and error.strerror:  # of the system, not of a decoder
            raise UserError(f"{name} cannot be read: {error.strerror}") from error
        raise UserError(f"{name} is damaged or truncated: {error or type(error).__name__}") from error
    try:
        return to_rgb(image)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def data_url(image: Image.Image, largest: int) -> str:
    """The image as text for a page, at most `largest` pixels a side: PNG if it is a small drawing, else JPEG."""
    kind, buffer = "png" if is_small(image) else "jpeg", io.BytesIO()
    image = image.convert("RGB")
    image.thumbnail((largest, largest))
    image.save(buffer, kind, optimize=True, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def wav_url(wav: bytes) -> str:
    """A WAV as text for a page."""
    return f"data:audio/wav;base64,{base64.b64encode(wav).decode('ascii')}"


def bytes_in(address: str, kind: str) -> bytes:
    """The bytes in a data URL of a kind, image or audio. Raises UserError for anything else."""
    about, _, coded = address.partition(";base64,")
    if not about.startswith(f"data:{kind}/") or not coded:
        raise UserError(f"what is sent is a data URL: data:{kind}/...;base64,...")
    try:
        return base64.b64decode(coded, validate=True)
    except binascii.Error:
        raise UserError("what was sent is no base64") from None


def is_small(image: Image.Image) -> bool:
    """Whether an image is so small that a page enlarges it, pixel by pixel."""
    return max(image.size) <= 128


def pad(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Images (h, w, 3) in the top left corners of one array (B, H, W, 3), and a mask of their pixels (B, H, W)."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    pixels, mask = np.zeros((len(images), height, width, 3), np.uint8), np.zeros((len(images), height, width), bool)
    for row, image in enumerate(images):
        pixels[row, : image.shape[0], : image.shape[1]] = image
        mask[row, : image.shape[0], : image.shape[1]] = True
    return pixels, mask
