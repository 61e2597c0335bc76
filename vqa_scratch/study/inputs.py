"""From a run folder and what the user gives to a subject of study, with a readable label for every token."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from vqa_scratch.data.images import ImageProcessor, load_image
from vqa_scratch.data.text import Tokenizer, check_question
from vqa_scratch.errors import UserError
from vqa_scratch.models.t5 import T5
from vqa_scratch.run import Run, load_run, read_run_config
from vqa_scratch.storage import read_json
from vqa_scratch.study.subject import Subject, T5Subject, VQASubject

POLICY = "policy"  # where a run of rlhf.py keeps its tuned model


@dataclass(frozen=True)
class Opened:
    """A subject, what it was made from, and how to read its decoder's ids."""

    run: str
    subject: Subject
    text: str  # the question or the article
    image: Image.Image | None  # as the model saw it: resized and cropped
    tokenizer: Tokenizer  # the decoder's
    notes: tuple[str, ...] = ()  # what the user should know about how it was read


def token_label(tokenizer: Tokenizer, index: int) -> str:
    """One id as readable text, its leading space kept."""
    if index >= len(tokenizer):
        return f"[unused {index}]"  # checkpoints have more rows than their vocabulary
    token = tokenizer.backend.id_to_token(index)
    if tokenizer.byte_level and token not in tokenizer.special.values():
        return tokenizer.decode([index], skip_special_tokens=False)
    return token.replace("▁", " ")


def text_labels(tokenizer: Tokenizer, text: str, ids: list[int]) -> tuple[str, ...]:
    """A label for each of `ids`, which begin as `text` does: the user's own characters, unknown words included."""
    encoding = tokenizer.backend.encode(text)
    labels = []
    for place, index in enumerate(ids):
        start, end = encoding.offsets[place] if encoding.ids[place : place + 1] == [index] else (0, 0)
        labels.append(text[start:end] if end > start else token_label(tokenizer, index))
    return tuple(labels)


def _where(tokenizer: Tokenizer, ids: list[int]) -> tuple[int, ...]:
    special = {tokenizer.cls_id, tokenizer.sep_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} - {None}
    return tuple(place for place, index in enumerate(ids) if index in special)


def question_subject(run: Run, image: Image.Image, question: str) -> VQASubject:
    """A question about an image, for a run of train.py."""
    encoder, question = run.encoder, check_question(question)
    ids = encoder.question(question)
    prompt = [*encoder.prompt(question), encoder.answer("yes")[0]]
    return VQASubject(
        run.model,
        run.processor(image)[None],
        ids,
        text_labels(encoder.text, question, ids),
        _where(encoder.text, ids),
        prompt,
        encoder.max_answer_tokens,
    )


def shown_image(processor: ImageProcessor, image: Image.Image) -> Image.Image:
    """The pixels that reach the model, so that overlays fit."""
    return Image.fromarray(processor.to_uint8(image))


def open_question(folder: Path, image_file: Path, question: str, device: str = "cpu") -> Opened:
    """Open a run of train.py on one question. Raises UserError for a bad run, image or question."""
    run = load_run(_vqa_folder(folder), device)
    image, question = load_image(image_file), check_question(question)
    subject, shown = question_subject(run, image, question), shown_image(run.processor, image)
    return Opened(str(folder), subject, question, shown, run.encoder.decoder, tuple(run.encoder.notes_on(question)))


def is_text_run(folder: Path) -> bool:
    """Whether the folder is a run of rlhf.py with a T5 in it, or a T5 checkpoint. Raises UserError if it is no run."""
    if _t5_folder(folder) is not None:
        return True
    if "program" not in _config(_vqa_folder(folder)):
        if (folder / "config.json").is_file():
            raise UserError(
                f"{folder} has no model to study: neither model.safetensors of train.py nor {POLICY}/ of rlhf.py"
            )
        read_run_config(folder)
    return False


def _config(folder: Path) -> dict:
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def _t5_folder(folder: Path) -> Path | None:
    candidates = (folder / POLICY, folder)
    return next((c for c in candidates if _config(c).get("model_type") == "t5"), None)


def _vqa_folder(folder: Path) -> Path:
    """Of a run of rlhf.py that tuned a VQA system: the tuned system, which is laid out like a run of train.py."""
    return folder / POLICY if "program" in _config(folder / POLICY) else folder


def open_text(folder: Path, text: str, device: str = "cpu") -> Opened:
    """Open a run of rlhf.py, or any T5 checkpoint with its tokenizer, on one text. Raises UserError."""
    checkpoint = _t5_folder(folder)
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
    return Opened(str(folder), subject, text, None, tokenizer, notes)
