"""What each preset of `train.py` sets differently from its system's defaults."""

from pathlib import Path
from typing import Any

# Presets that train on files of the user's, and which these are; the others draw a data set of their own.
NEEDS_DATA = {"book": "the VQA v2 files", "vilt-b32": "the VQA v2 files", "coco": "the captions files and images"}

PRESETS: dict[str, dict[str, Any]] = {
    "shapes": {"question_prompt": True},
    "book": {
        "out": Path("runs/book"),
        "init": "pretrained",
        "image_model": "facebook/dino-vitb16",
        "text_model": "distilbert-base-uncased",
        "decoder_model": "gpt2",
        "test_split": "val",
        "val_split": "auto",
        "image_cache": False,
        "questions_per_step": 64,
        "questions_per_image": 5,
        "optimizer": "adamw",
        "learning_rate": 5e-5,
        "weight_decay": 0.01,
        "warmup_steps": 1000,
        "decay_from": 0.1,
        "max_question_tokens": 32,
        "max_answer_tokens": 8,
        "eval_every": 2000,
        "save_every": 2000,
    },
    "vilt": {},
    "vilt-b32": {
        "out": Path("runs/vilt-b32"),
        "model": "dandelin/vilt-b32-mlm",
        "test_split": "val",
        "val_split": "auto",
        "image_cache": False,
        "questions_per_step": 256,
        "questions_per_image": 5,
        "accumulate": 8,
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "warmup_steps": 2000,
        "decay_from": 0.1,
        "eval_every": 2000,
        "save_every": 2000,
    },
    "caption": {"weight_decay": 0.0},
    "coco": {
        "out": Path("runs/coco"),
        "init": "pretrained",
        "decoder_model": "gpt2",
        "test_split": "val",
        "val_split": "auto",
        "image_cache": False,
        "captions_per_step": 64,
        "optimizer": "adamw",
        "learning_rate": 5e-5,
        "weight_decay": 0.01,
        "warmup_steps": 1000,
        "decay_from": 0.1,
        "max_caption_tokens": 40,
        "eval_every": 2000,
        "save_every": 2000,
    },
}
