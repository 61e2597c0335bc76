"""What each preset of `train.py` sets differently from its system's defaults."""

from pathlib import Path
from typing import Any

# Presets that need --data, and what must be in that folder; the others use the built-in data set.
NEEDS_DATA = {"book": "the VQA v2 files", "vilt-b32": "the VQA v2 files", "coco": "the captions files and images"}

RELEASED = {  # what every preset shares that starts from released models
    "test_split": "val",
    "val_split": "auto",
    "image_cache": False,
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "decay_from": 0.1,
    "eval_every": 2000,
    "save_every": 2000,
}
AUGMENTED = {"flip": 0.5, "rotate": 5.0, "brightness": 0.1, "contrast": 0.1}
PRESETS: dict[str, dict[str, Any]] = {
    "shapes": {"question_prompt": True, "text_encoder": False, "question_loss": True},
    "book": {
        **RELEASED,
        "out": Path("runs/book"),
        "init": "pretrained",
        "image_model": "facebook/dino-vitb16",
        "text_model": "distilbert-base-uncased",
        "decoder_model": "gpt2",
        "questions_per_step": 64,
        "questions_per_image": 5,
        "learning_rate": 5e-5,
        "warmup_steps": 1000,
        "max_question_tokens": 32,
        "max_answer_tokens": 8,
    },
    "vilt": {},
    "vilt-b32": {
        **RELEASED,
        "out": Path("runs/vilt-b32"),
        "model": "dandelin/vilt-b32-mlm",
        "questions_per_step": 256,
        "questions_per_image": 5,
        "accumulate": 8,
        "learning_rate": 1e-4,
        "warmup_steps": 2000,
    },
    "caption": {**AUGMENTED, "weight_decay": 0.0},
    "coco": {
        **RELEASED,
        **AUGMENTED,
        "out": Path("runs/coco"),
        "init": "pretrained",
        "decoder_model": "gpt2",
        "captions_per_step": 64,
        "learning_rate": 5e-5,
        "warmup_steps": 1000,
        "max_caption_tokens": 40,
    },
    "clip": {},
    "voice": {},
    "spoken": {"matrix_learning_rate": 0.01},
}
