"""What the tests of the system that hears share: a folder of short recordings, and a finished tiny run."""

import random
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from train import train_step
from vqa_scratch.audio.reading import write_wav
from vqa_scratch.data.voices import Speaker, sentences, speak
from vqa_scratch.systems.run_folder import save_weights
from vqa_scratch.systems.voice import VoiceSystem
from vqa_scratch.systems.voice_options import VoiceOptions
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision

CPU = torch.device("cpu")
TINY = {"width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 2, "utterances": 12, "test_utterances": 4}


def small_recordings(folder: Path, seed: int = 0, train: int = 24, test: int = 6) -> Path:
    """Drawn voices as WAV files, with a table for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, texts = np.random.default_rng(seed), sentences(random.Random(seed))
    for split, number in {"train": train, "val": test, "test": test}.items():
        rows = ["audio,text"]
        for place, text in enumerate(islice((t for t in texts if len(t) < 30), number)):
            write_wav(folder / f"{split}{place}.wav", torch.from_numpy(speak(text, Speaker.draw(rng), rng).wave))
            rows.append(f"{split}{place}.wav,{text}")
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return folder


def tiny_options(folder: Path, **changes) -> VoiceOptions:
    shared = {"out": folder / "run", "cache": folder / "cache", "device": "cpu", "precision": "fp32", "steps": 2}
    return VoiceOptions(**TINY | shared | changes)


def tiny_system(options: VoiceOptions) -> VoiceSystem:
    """The system that `train.py` would train, ready for its first step."""
    data = VoiceSystem.read(options)
    system = VoiceSystem.build(options, data, Precision("fp32", CPU))
    system.train_on(data)
    return system


def make_voice_run(folder: Path, **changes) -> Path:
    """A run folder as train.py leaves it, whose decoder has begun to write words."""
    options = tiny_options(folder, **changes)
    system = tiny_system(options)
    rates = {"kind": "adamw", "learning_rate": 1e-2, "matrix_learning_rate": 0.0, "weight_decay": 0.0}
    optimizers = Optimizers(system.model, **rates)
    for number in range(8):
        train_step(system.loss, system.batch(system.epoch(number)[0]), optimizers, system.precision)
    system.save(options.out)
    save_weights(options.out / "model.safetensors", system.model)
    return options.out
