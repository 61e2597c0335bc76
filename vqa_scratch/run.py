"""A run folder of `train.py`: how it is laid out, written and opened again.

config.json            what was trained: {"program", "train": the flags, "model": the towers}
text_tokenizer/        tokenizer.json of the text tower;  decoder_tokenizer/  that of the decoder
preprocessor_config.json
model.safetensors      the best weights so far
checkpoints/last.pt    everything needed to go on
metrics.jsonl, curves.png, samples.html, summary.json
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vqa_scratch.data.batches import Encoder
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.errors import UserError
from vqa_scratch.models.vqa import VQAConfig, VQAModel
from vqa_scratch.options import choices_of, from_json, to_json
from vqa_scratch.storage import write_json
from vqa_scratch.systems.options import RunOptions, VQAOptions
from vqa_scratch.training.checkpoint import load_model_state
from vqa_scratch.training.distributed import ALONE, World
from vqa_scratch.training.parallel import for_main
from vqa_scratch.training.precision import Precision, pick_precision
from vqa_scratch.weights.files import write_safetensors

PROGRAM = "train.py"
VQA_PRESETS = choices_of(VQAOptions, "preset")


@dataclass
class Run:
    """The first system, trained and ready: model, both tokenizers (in `encoder`) and image preprocessing."""

    folder: Path
    config: VQAOptions
    model: VQAModel
    encoder: Encoder
    processor: ImageProcessor
    device: torch.device
    precision: Precision


def encoder_for(config: VQAOptions, text: Tokenizer, decoder: Tokenizer) -> Encoder:
    return Encoder(
        text,
        decoder,
        max_question_tokens=config.max_question_tokens,
        max_answer_tokens=config.max_answer_tokens,
        question_prompt=config.question_prompt,
    )


def write_run_config(folder: Path, config: RunOptions, sizes: dict[str, Any]) -> None:
    """config.json: the options of the run, and `sizes`, what is needed to build its model again."""
    write_json(folder / "config.json", {"program": PROGRAM, "train": to_json(config), "model": sizes})


def save_parts(folder: Path, config: VQAOptions, model: VQAModel, encoder: Encoder, processor: ImageProcessor) -> None:
    """Everything of the first system but the weights."""
    write_run_config(folder, config, model.config.to_json())
    encoder.text.save(folder / "text_tokenizer")
    encoder.decoder.save(folder / "decoder_tokenizer")
    processor.save_pretrained(folder)


def save_weights(path: Path, model: nn.Module, world: World = ALONE) -> None:
    """All parameters as safetensors, atomically; called by all ranks, written by the main one."""
    tensors = for_main(model.state_dict(), world)
    if world.main:
        write_safetensors(path, {name: p.detach().cpu().contiguous() for name, p in tensors.items()})


def load_file_state(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. Raises UserError if it is missing or cut short."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from None


def read_run_config(folder: Path) -> dict[str, Any]:
    """config.json of a run. Raises UserError if the folder is no run."""
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; a run is a folder, as train.py leaves it below runs/")
    if not folder.exists():
        raise UserError(f"no run folder {folder}; train one with: python train.py --out {folder}")
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or "program" not in values:
        raise UserError(f"{path} is not the config of a run: it does not say which program wrote it")
    if values["program"] == PROGRAM and not all(isinstance(values.get(key), dict) for key in ("train", "model")):
        raise UserError(f"{path} is not the config of a run: it lacks the options or the sizes of the model")
    return values


def load_weights(model: nn.Module, folder: Path, precision: Precision) -> None:
    """Give `model` the best weights of a run, in eval mode on the device. Raises UserError if there are none yet."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} has no model.safetensors yet: the run has not reached its first checkpoint")
    load_model_state(model, load_file_state(weights), str(weights))
    model.to(precision.device).eval()
    precision.suit_attention(model)


def open_run(folder: Path, values: dict[str, Any], config: VQAOptions, precision: Precision) -> Run:
    """A run of the first system from the content of its config.json and its options."""
    model = VQAModel.from_config(VQAConfig.from_json(values["model"]))
    load_weights(model, folder, precision)
    text = Tokenizer.from_pretrained(folder / "text_tokenizer")
    decoder = Tokenizer.from_pretrained(folder / "decoder_tokenizer")
    processor = ImageProcessor.from_pretrained(folder)
    return Run(folder, config, model, encoder_for(config, text, decoder), processor, precision.device, precision)


def load_run(folder: Path, device: torch.device | str = "cpu", precision: str = "fp32") -> Run:
    """Open a run of `train.py` that holds the first system, with its best weights, in eval mode.

    `precision` is fp32, bf16, fp16 or auto. Raises UserError if the folder is no such run, has no weights yet, or if
    they do not fit. (`systems.open_trained` opens a run of any system, for what all of them can do.)
    """
    folder, device = Path(folder), torch.device(device)
    values = read_run_config(folder)
    if values["program"] != PROGRAM:
        raise UserError(f"{folder} is a run of {values['program']}, not of {PROGRAM}")
    if values["train"].get("preset") not in VQA_PRESETS:
        preset, needed = values["train"].get("preset"), " or ".join(VQA_PRESETS)
        raise UserError(f"{folder} is a run of preset {preset}; this needs one of preset {needed}")
    config = from_json(VQAOptions, values["train"], f"{folder / 'config.json'}")
    return open_run(folder, values, config, Precision(pick_precision(precision, device)[0], device))
