"""Opens a T5 with one text for study: from a run of rlhf.py, or any checkpoint with its tokenizer."""

from pathlib import Path

import torch

from vqa_scratch.data.text import Tokenizer
from vqa_scratch.errors import UserError
from vqa_scratch.models.t5 import T5
from vqa_scratch.storage import read_json
from vqa_scratch.study.opened import Opened, text_labels, written
from vqa_scratch.study.subject import T5Subject

POLICY = "policy"  # where a run of rlhf.py keeps its tuned model


def config_of(folder: Path) -> dict:
    """The config.json of a folder; {} if there is none."""
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def t5_folder(folder: Path) -> Path | None:
    """The folder of the T5 checkpoint: policy/ of a run of rlhf.py, or the folder itself; None if there is none."""
    candidates = (folder / POLICY, folder)
    return next((c for c in candidates if config_of(c).get("model_type") == "t5"), None)


def open_text(folder: Path, text: str, device: str = "cpu") -> Opened:
    """Open a run of rlhf.py, or any T5 checkpoint, with one text. Raises UserError if it cannot read it."""
    checkpoint = t5_folder(folder)
    if checkpoint is None:
        raise UserError(f"{folder} holds no T5: it is no run of rlhf.py with a {POLICY}/ folder")
    if not text.strip():
        raise UserError("the text is empty: there is nothing to read")
    options = read_json(folder / "config.json") if checkpoint != folder else {}
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    model = T5.from_pretrained(checkpoint).to(torch.device(device))
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}")
    text = options.get("prefix", "") + text.strip()
    limit = options.get("max_prompt_tokens", 512)
    ids, _ = tokenizer.encode_batch([text], max_length=limit)
    ids = ids[0].tolist()
    notes = (f"the text is longer than {limit} tokens; only its beginning was read",) if tokenizer.truncated else ()
    subject = T5Subject(model, ids, text_labels(tokenizer, text, ids), options.get("max_new_tokens", 32))
    return Opened(str(folder), subject, text, None, **written(tokenizer, subject.prompt), notes=notes)
