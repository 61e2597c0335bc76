"""Writes a run with quantised weights: a run folder to ask, score and study, but not to train.

Its config.json is the run's, with the name of the format as "quantized"; model.safetensors holds codes and scales.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.nn.gptq import gptq_codes, recorded
from vqa_scratch.nn.quantized import FORMATS, PARTS, round_to_nearest
from vqa_scratch.storage import write_json
from vqa_scratch.systems.export import tensors_of
from vqa_scratch.systems.run_folder import CONFIG, WEIGHTS, read_run_config
from vqa_scratch.systems.splits import SplitSystem
from vqa_scratch.weights.files import write_safetensors

CALIBRATED = 512  # training questions that GPTQ reads
AT_ONCE = 64


@torch.no_grad()
def read_inputs(system: SplitSystem[Any, Any, Any], samples: Sequence[VQASample]) -> dict[str, Tensor]:
    """What the matrices of the system's decoder read while it answers these questions, as `recorded`.

    Raises UserError if there is nothing to quantise.
    """
    split = system.split(samples)
    with recorded(system.model) as grams, system.evaluating():
        for _, batch in split.batches(system.precision.device, split.questions.in_order(len(samples), AT_ONCE)):
            system.loss(batch)
    return grams


def save_quantized(system: SplitSystem[Any, Any, Any], folder: Path, name: str, *, calibrate: bool) -> None:
    """Write the opened run `system` to `folder` in the format `name`, with codes by GPTQ if `calibrate`, else nearest.

    Raises UserError if its weights cannot be quantised so.
    """
    assert system.folder is not None, "a run that was opened"
    config = read_run_config(system.folder)
    if config.get("quantized"):
        raise UserError(f"{system.folder} is quantised already; start from the run that it was exported from")
    kind = FORMATS[name]
    if calibrate:  # UserError if the data are no longer where they were
        inputs = read_inputs(system, system.read(system.options).samples["train"][:CALIBRATED])
        codes = gptq_codes(system.model, kind, inputs)
    else:
        codes = round_to_nearest(system.model, kind)
    system.save(folder)
    tensors = {key: x for key, x in tensors_of(system.model).items() if key.removesuffix(".weight") not in codes}
    for matrix, stored in codes.items():
        tensors |= {f"{matrix}.{part}": x.contiguous() for part, x in zip(PARTS, stored.tensors, strict=False)}
    write_safetensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config | {"quantized": name})
