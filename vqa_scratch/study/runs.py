"""From a run folder and what the user gives to what is studied. The rest of `study` knows no runs."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from vqa_scratch.data.batches import Images, Questions
from vqa_scratch.data.images import ImageProcessor, load_image
from vqa_scratch.data.text import Tokenizer, check_question
from vqa_scratch.data.vqa_v2 import read_vqa
from vqa_scratch.errors import UserError
from vqa_scratch.metrics import vqa_accuracy
from vqa_scratch.models.t5 import T5
from vqa_scratch.run import Run, load_run, read_run_config
from vqa_scratch.storage import read_json
from vqa_scratch.study.opened import Opened, special_tokens, text_labels, written
from vqa_scratch.study.subject import T5Subject, VQASubject
from vqa_scratch.training.evaluation import answer_questions

POLICY = "policy"  # where a run of rlhf.py keeps its tuned model


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
        special_tokens(encoder.text, ids),
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
    words, notes = written(run.encoder.decoder, subject.prompt), tuple(run.encoder.notes_on(question))
    return Opened(str(folder), subject, question, shown, **words, notes=notes)


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
    return Opened(str(folder), subject, text, None, **written(tokenizer, subject.prompt), notes=notes)


def score_of(run: Run, data: Path, split: str, number: int) -> Callable[[], float]:
    """A function that answers the first questions of a split and gives their official accuracy."""
    questions = Questions(read_vqa(data, split).samples, run.encoder)
    images = Images(questions.image_paths, run.processor)
    batches = questions.in_order(number, 256)
    by_id = {sample.question_id: sample for sample in questions.samples}

    def score() -> float:
        answers = answer_questions(run.model, questions, images, run.precision, batches)
        scored = [vqa_accuracy(answer.text, by_id[i].answers) for i, answer in answers.items()]
        return sum(scored) / len(scored)

    return score
