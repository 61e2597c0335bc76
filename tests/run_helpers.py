"""What the tests of the commands share: a run folder, a picture, and the answer that a plain loop gives."""

from pathlib import Path

import torch
from PIL import Image
from vqa_helpers import small_options, small_system

from vqa_scratch import systems
from vqa_scratch.__main__ import PROGRAM
from vqa_scratch.commands.line import call
from vqa_scratch.data.vqa_v2 import read_vqa
from vqa_scratch.systems.options import BY_PRESET
from vqa_scratch.systems.run_folder import save_weights
from vqa_scratch.training.precision import Precision


def make_run(data: Path, folder: Path, **changes) -> Path:
    """A run folder as train.py leaves it, with weights uneven enough to give different answers."""
    system = small_system(small_options(data, folder, **changes))
    with torch.no_grad():
        for parameter in system.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    system.save(folder)
    save_weights(folder / "model.safetensors", system.model)
    return folder


def make_other(data: Path, folder: Path, **given) -> Path:
    """As `make_run`, of any preset, with the weights it begins with."""
    options = BY_PRESET[given["preset"]](**given, data=data, cache=folder, out=folder, device="cpu")
    kind = systems.find(options.preset)
    built = kind.build(options, kind.read(options), Precision("fp32", torch.device("cpu")))
    built.save(folder)
    save_weights(folder / "model.safetensors", built.model)
    return folder


def command(*argv: object) -> None:
    call(PROGRAM, [str(a) for a in argv], "python -m vqa_scratch")


@torch.no_grad()
def by_hand(folder: Path, image: Path, question: str) -> tuple[str, float]:
    """One token after the other with the whole model, and the product of their probabilities."""
    opened = systems.load(folder)
    words, probability = opened.tokenizers, 1.0
    pixels = opened.processor(Image.open(image).convert("RGB"))[None]
    start = [*words.prompt(question), words.decoder.bos_id]
    ids = list(start)
    for _ in range(words.max_answer_tokens):
        logits = opened.model(pixels, torch.tensor([words.question(question)]), None, torch.tensor([ids])).logits
        p, token = logits[0, -1].softmax(-1).max(-1)
        probability *= float(p)
        ids.append(int(token))
        if ids[-1] == words.decoder.eos_id:
            break
    return words.decoder.decode(ids[len(start) :]).strip(), probability


def picture(data: Path) -> Path:
    return read_vqa(data, "val").samples[0].image_path
