"""Reads Whisper checkpoints in their three layouts: that of `transformers`, OpenAI's .pt, CTranslate2's model.bin.

The last two have no config.json with sizes; what they do say becomes one in the words of `transformers`.
"""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqa_scratch.errors import UserError, some
from vqa_scratch.storage import typed
from vqa_scratch.weights.files import AGAIN, CONFIG, PICKLE, WEIGHTS, load_plain, read_checkpoint, read_config
from vqa_scratch.weights.hub import locate
from vqa_scratch.weights.maps import KeyMap
from vqa_scratch.weights.maps_whisper import WHISPER, WHISPER_CTRANSLATE2

CTRANSLATE2 = "model.bin"
# In the order of their numbers in the file; of the others only floats are weights that need no scale.
_TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
FIRST_MULTILINGUAL = 51865  # rows of the smallest vocabulary with languages
_DIMS = {  # OpenAI's sizes, and what `transformers` calls them
    "n_vocab": "vocab_size",
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_text_ctx": "max_target_positions",
    "n_audio_state": "d_model",
    "n_audio_layer": "encoder_layers",
    "n_audio_head": "encoder_attention_heads",
    "n_text_layer": "decoder_layers",
    "n_text_head": "decoder_attention_heads",
}


def read_whisper(source: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor], KeyMap]:
    """(config, tensors, their key map) of a folder, a .pt file or a Hub id. Raises UserError for anything else."""
    place = Path(source)
    if place.is_file() and place.suffix == ".pt":
        return (*read_openai(place), WHISPER)
    folder = locate(source, [CONFIG, "*.json", "*.safetensors", CTRANSLATE2], "a Whisper")
    own = [
        name for name in (WEIGHTS, f"{WEIGHTS}.index.json", PICKLE, f"{PICKLE}.index.json") if (folder / name).exists()
    ]
    if not own and (folder / CTRANSLATE2).is_file():
        return (*read_ctranslate2(folder / CTRANSLATE2), WHISPER_CTRANSLATE2)
    released = sorted(folder.glob("*.pt"))
    if not own and len(released) == 1:
        return (*read_openai(released[0]), WHISPER)
    if not own:
        found = f"{some(path.name for path in released)}: give one of them" if released else "none of these"
        raise UserError(f"{folder} holds no Whisper: it is {WEIGHTS}, one .pt file or {CTRANSLATE2}, here is {found}")
    (kind,) = typed(f"{source}: {CONFIG}", read_config(folder), {"model_type": str | None})
    if kind != "whisper":
        raise UserError(f"{source} holds a model of type {kind!r}, not a whisper")
    return (*read_checkpoint(source), WHISPER)


def _config(sizes: dict[str, int]) -> dict[str, Any]:
    """A config.json of these sizes, with the ids that the released vocabulary has."""
    end = 50257 if sizes["vocab_size"] >= FIRST_MULTILINGUAL else 50256
    ids = {f"{role}_token_id": end for role in ("bos", "eos", "pad")}
    return {"model_type": "whisper", **sizes, **ids, "decoder_start_token_id": end + 1}


def read_openai(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a file of OpenAI's: {"dims": sizes, "model_state_dict": tensors}, and no code."""
    content = load_plain(path)
    where = f"{path}, OpenAI's layout of a Whisper,"
    dims, tensors = typed(where, content, {"dims": dict, "model_state_dict": dict})
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()):
        raise UserError(f"{where} must hold tensors only in its model_state_dict")
    sizes = dict(zip(_DIMS.values(), typed(f"{path}: dims", dims, dict.fromkeys(_DIMS, int)), strict=True))
    wide = {f"{side}_ffn_dim": 4 * sizes["d_model"] for side in ("encoder", "decoder")}
    return _config(sizes | wide), dict(tensors)


def read_ctranslate2(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a model.bin: version 6, little endian, a name, a shape, a type and the bytes each.

    Raises UserError for another version or model, for quantised weights, and for a file that is cut short.
    """
    tensors = _tensors(path)
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        sizes = {
            "vocab_size": shape["decoder/embeddings/weight"][0],
            "num_mel_bins": shape["encoder/conv1/weight"][1],
            "max_source_positions": shape["encoder/position_encodings/encodings"][0],
            "max_target_positions": shape["decoder/position_encodings/encodings"][0],
            "d_model": shape["decoder/embeddings/weight"][1],
        }
        for side in ("encoder", "decoder"):
            sizes[f"{side}_layers"] = sum(
                name.startswith(f"{side}/layer_") and name.endswith("/ffn/linear_0/weight") for name in shape
            )
            sizes[f"{side}_ffn_dim"] = shape[f"{side}/layer_0/ffn/linear_0/weight"][0]
            sizes[f"{side}_attention_heads"] = int(tensors[f"{side}/num_heads"])
    except LookupError as error:
        raise UserError(f"{path} is not a Whisper as CTranslate2 writes it: it lacks {error}") from None
    return _config(sizes), {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a model.bin, under all their names."""
    data, at = (np.memmap(path, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)), 0

    def take(count: int) -> bytes:
        nonlocal at
        if at + count > len(data):
            raise UserError(
                f"{path} ends after {len(data):,} bytes, within a tensor: it is no model.bin, or cut short; {AGAIN}"
            )
        at += count
        return data[at - count : at].tobytes()

    def number(kind: str) -> int:
        return struct.unpack(f"<{kind}", take(struct.calcsize(kind)))[0]

    def text() -> str:
        return take(number("H")).rstrip(b"\0").decode(errors="replace")

    version = number("I")
    if version != 6 or (name := text()) != "WhisperSpec":
        what = f"version {version}" if version != 6 else f"a {name}"
        raise UserError(f"{path} is {what} of CTranslate2's files, or none; here it can only be a Whisper of version 6")
    number("I")  # the revision of WhisperSpec
    tensors: dict[str, Tensor] = {}
    for _ in range(number("I")):
        name, shape = text(), [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        if kind >= len(_TYPES) or (kind == 1 and shape):
            raise UserError(
                f"{path} is quantised ({name}); float32 and float16 are read: convert it with --quantization float16"
            )
        values = np.frombuffer(take(size), _TYPES[kind])
        if values.size != np.prod(shape, dtype=np.int64):
            raise UserError(f"{path} says that {name} is {tuple(shape)}, but it has {values.size:,} numbers; {AGAIN}")
        tensors[name] = torch.from_numpy(values.reshape(shape).copy())
    for _ in range(number("I")):
        alias, name = text(), text()
        if name not in tensors:
            raise UserError(f"{path} calls {alias!r} another name of {name!r}, which it does not hold; {AGAIN}")
        tensors[alias] = tensors[name]
    return tensors
