"""What the tests of the commands share: a run folder, a picture, and the answer that a plain loop gives."""

from pathlib import Path

import torch
from PIL import Image
from vqa_helpers import small_config, small_task
from vqa_scratch.run import load_run, save_weights

from vqa_scratch.__main__ import PROGRAM
from vqa_scratch.commands.line import call
from vqa_scratch.data.vqa_v2 import read_vqa


def make_run(data: Path, folder: Path, **changes) -> Path:
    """A run folder as train.py leaves it, with weights uneven enough to give different answers."""
    config = small_config(data, folder, **changes)
    task = small_task(config)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    task.save_parts(folder)
    save_weights(folder / "model.safetensors", task.model)
    return folder


def command(*argv: object) -> None:
    call(PROGRAM, [str(a) for a in argv], "python -m vqa_scratch")


@torch.no_grad()
def by_hand(folder: Path, image: Path, question: str) -> tuple[str, float]:
    """One token after the other with the whole model, and the product of their probabilities."""
    opened = load_run(folder)
    encoder, probability = opened.encoder, 1.0
    pixels = opened.processor(Image.open(image).convert("RGB"))[None]
    start = [*encoder.prompt(question), encoder.decoder.bos_id]
    ids = list(start)
    for _ in range(encoder.max_answer_tokens):
        logits = opened.model(pixels, torch.tensor([encoder.question(question)]), None, torch.tensor([ids])).logits
        p, token = logits[0, -1].softmax(-1).max(-1)
        probability *= float(p)
        ids.append(int(token))
        if ids[-1] == encoder.decoder.eos_id:
            break
    return encoder.decoder.decode(ids[len(start) :]).strip(), probability


def picture(data: Path) -> Path:
    return read_vqa(data, "val").samples[0].image_path
