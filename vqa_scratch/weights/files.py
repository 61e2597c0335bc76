"""Reads and writes checkpoint files, from a folder or the Hub.

A checkpoint is a folder: config.json with model.safetensors, shards with an index, or pytorch_model.bin. Pickles are
read with weights_only, and refused if they hold anything but tensors. Files are written whole or not at all.
"""

import hashlib
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vqa_scratch.errors import UserError, note, some
from vqa_scratch.storage import is_text, read_json, read_object, typed, write_json, write_whole
from vqa_scratch.weights.hub import first_line, locate
from vqa_scratch.weights.packed import unpacked

logger = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PICKLE = "pytorch_model.bin"
AGAIN = "copy or download it again"
GENERATION = "generation_config.json"
INNER = ("state_dict", "model_state_dict", "model")  # where training programs keep the weights in what they save
_SAFE_FILES = (CONFIG, GENERATION, "*.safetensors", "*.safetensors.index.json")
_PICKLE_FILES = (CONFIG, f"{PICKLE}*", "pytorch_model-*.bin")


def resolve_folder(source: str | os.PathLike[str]) -> Path:
    """The folder itself, or the local copy of a Hub id, with config and weights downloaded; see `locate`.

    Pickles are downloaded only if the repository has no safetensors.
    """
    folder = locate(source, _SAFE_FILES, f"{CONFIG} and the weights")
    if not Path(source).expanduser().is_dir() and not any(folder.glob("*.safetensors")):
        folder = locate(source, _PICKLE_FILES, f"{CONFIG} and the weights")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder."""
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} holds no {CONFIG}")
    return read_object(folder / CONFIG)


def _how_much(path: Path) -> str:
    """How many bytes of a safetensors file are missing, in words; "" if none are or its header cannot be read."""
    try:
        with path.open("rb") as file:
            there = path.stat().st_size
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), there)))
            start = file.tell()
        promised = start + max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return ""
    return f"{there:,} of {promised:,} bytes, as an interrupted download leaves it" if there < promised else ""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, memory-mapped: nothing is copied before it is read."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({_how_much(path) or error}); {AGAIN}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def map_tensor(folder: Path, key: str) -> Tensor | None:
    """One tensor of a folder's safetensors files, with its own memory map: parts that are not read take no memory.

    None if no such file has it. (Pages that were read stay in memory as long as their map.)
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt", device="cpu") as file:
            if key in file.keys():  # noqa: SIM118 (not a dict)
                return file.get_tensor(key)
    return None


def load_plain(path: Path) -> Any:
    """What `torch.save` wrote to a file, if it is tensors and plain values: no code of the file is run.

    Such a file is a zip archive with a checksum of each of its parts, at which torch does not look. Raises UserError on
    a file that is missing, cut short, changed, or holds anything else.
    """
    if torch.__version__ < "2.6":
        # CVE-2025-32434: before 2.6 a crafted file ran code even with weights_only=True.
        raise UserError(f"reading {path} needs torch 2.6 or later, this is {torch.__version__}")
    try:
        if zipfile.is_zipfile(path):  # files of old versions of torch are none
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise UserError(f"{path} is damaged: its part {damaged} does not match its checksum; {AGAIN}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors (or is no torch file); refused, since it could run code"
        ) from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # the zip and pickle readers raise many kinds on broken files
        raise UserError(f"{path} is not a whole torch file ({first_line(error)}); {AGAIN}") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """All tensors of a .bin or .pt file that holds one dictionary of tensors, or has one under a name of `INNER`."""
    content = load_plain(path)
    for name in INNER:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            left = some(str(key) for key in content if key != name)
            if left:
                logger.warning("%s: %s is read, and not %s", path, name, left)
            content = content[name]
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a dictionary of tensors, not a {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str) or not is_text(key) or not isinstance(value, Tensor):
            raise UserError(f"{path} must hold tensors only, but {key!r} is a {type(value).__name__}")
    return dict(content)


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinities; makes no copy of its size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()
    return bool(low.isfinite() & high.isfinite())


def check_finite(key: str, tensor: Tensor, source: object) -> None:
    """Raise UserError, naming `source`, for a tensor that holds NaN or infinities."""
    if not is_finite(tensor):
        raise UserError(f"{key} in {source} holds NaN or infinite numbers: the weights are damaged")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file: safetensors by its suffix, otherwise a pickle of tensors only."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def _read_sharded(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors of the shards that an index file lists. One UserError names every shard that is absent or broken."""
    (places,) = typed(index, read_json(index), {"weight_map": dict})
    if not all(isinstance(shard, str) for shard in places.values()):
        raise UserError(f"{index} is not a shard index: its weight_map must name a file for each tensor")
    tensors: dict[str, Tensor] = {}
    problems = []
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            problems.append(f"it lacks {shard}, which {index.name} lists; download it")
            continue
        try:
            tensors |= read(index.parent / shard)
        except UserError as error:
            problems.append(str(error).replace(f"{index.parent}/", ""))
    if problems:
        raise UserError(f"{index.parent} is not a whole checkpoint: {some(problems, 2, '; ')}")
    lost = [key for key in places if key not in tensors]
    if lost:
        where = some(f"{key} (should be in {places[key]})" for key in lost)
        raise UserError(f"{index} promises {where}, but no shard holds them; the files are of different versions")
    return tensors


def with_generation_ids(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config with the special tokens of generation_config.json if there is one, which come first in `transformers`.

    A note says where the two disagree.
    """
    path = folder / GENERATION
    ids = read_object(path) if path.is_file() else {}
    result = dict(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        own, value = config.get(name), ids.get(name)
        if value is not None:
            result[name] = value
            if own not in (None, value):
                note(f"{name} is {own} in {folder / CONFIG}, {value} in {GENERATION}, which counts")
    return result


def read_checkpoint(source: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a checkpoint folder or Hub id; safetensors first, then shards, then .bin.

    Weights that GPTQ or AWQ quantised are plain ones here (`packed`).

    Raises UserError in one line when something is absent, cut short, not allowed or out of reach.
    """
    folder = resolve_folder(source)
    config = with_generation_ids(folder, read_config(folder))
    readers = (
        (WEIGHTS, read_safetensors),
        (f"{WEIGHTS}.index.json", lambda path: _read_sharded(path, read_safetensors)),
        (PICKLE, read_pickle),
        (f"{PICKLE}.index.json", lambda path: _read_sharded(path, read_pickle)),
    )
    for name, read in readers:
        if (folder / name).is_file():
            return config, unpacked(config, read(folder / name), folder)
    raise UserError(f"{folder} holds no weights: expected {WEIGHTS}, {WEIGHTS}.index.json or {PICKLE}")


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, whole or not at all. Raises UserError if it cannot be written.

    `format: pt` in the metadata is what other readers look for.
    """

    def save(file: Path) -> None:
        try:
            save_file(tensors, file, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # how that library reports a full disk
            raise OSError(str(error)) from error

    write_whole(path, save)


def write_checkpoint(folder: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """model.safetensors, then config.json in `folder`, made if needed; each whole or not at all."""
    write_safetensors(Path(folder) / WEIGHTS, tensors)
    write_json(Path(folder) / CONFIG, config)


def convert(source: Path, out: Path) -> tuple[int, str]:
    """Turn a .bin into safetensors: tensors only, contiguous, none sharing memory with another.

    Returns the number of tensors and the sha256 of the source, which the metadata of the new file also holds.
    """
    if out.is_dir():
        out = out / WEIGHTS
    if out.exists() and source.exists() and out.samefile(source):
        raise UserError(f"{out} is the file to convert itself, which would be lost; give another OUT")
    tensors = read_pickle(source)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    seen: set[int] = set()
    for key, tensor in tensors.items():
        check_finite(key, tensor, source)
        address = tensor.untyped_storage().data_ptr()
        alone = tensor.is_contiguous() and address not in seen and tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[key] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(address)
    write_safetensors(out, tensors, {"source_sha256": digest})
    return len(tensors), digest
