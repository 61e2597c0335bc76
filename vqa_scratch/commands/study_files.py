"""What `study` opens and writes: a run with one input, and the files about one answer."""

from functools import partial
from pathlib import Path

from PIL.Image import Image

from vqa_scratch.commands.line import open_asked, open_ears
from vqa_scratch.data.images import load_image
from vqa_scratch.errors import UserError
from vqa_scratch.language_model import LanguageModel
from vqa_scratch.storage import read_text, write_json, write_text, write_whole
from vqa_scratch.study.faithfulness import answer_rows, patch_map
from vqa_scratch.study.opened import Opened
from vqa_scratch.study.overlay import overlay, side_by_side
from vqa_scratch.study.record import Study, summary, trace_file
from vqa_scratch.study.report import page
from vqa_scratch.transcription.studied import heard_in


def open_input(
    run: Path | None,
    image: Path | None,
    question: str | None,
    text: str | None,
    device: str,
    model: str | None = None,
    precision: str = "fp32",
    voice: Path | None = None,
) -> Opened:
    """A run, or a released model, with one input: an image and what is asked of it, the text in a file, or a sound
    file for what hears.

    Raises UserError if the input does not fit.
    """
    if voice is not None:
        if (run is None) == (model is None) or any(given is not None for given in (image, question, text)):
            raise UserError("--voice FILE is all that RUN, or a --model, hears: give one of them, and nothing else")
        return heard_in(open_ears(str(run) if model is None else model, device, precision), voice)
    system, name = open_asked(run, model, device, precision), run or model
    if isinstance(system, LanguageModel):
        if text is None or image is not None or question is not None:
            raise UserError(f"{name} reads texts: give it --text FILE, and neither --image nor --question")
        return system.subject(read_text(Path(text)))
    asked, other = (question, text) if system.asked == "question" else (text, question)
    if other is not None or image is None:
        left_out = "text" if system.asked == "question" else "question"
        raise UserError(
            f'{name} looks at images: give it --image FILE and a --{system.asked} "...", and no --{left_out}'
        )
    return system.subject(load_image(image), asked)


def write_overlays(folder: Path, study: Study, image: Image) -> None:
    """overlay_<method>.png: the plain image, then the map of every word of the answer."""
    subject = study.opened.subject
    places, _ = subject.image
    rows = answer_rows(subject, [token.id for token in study.tokens])
    for method, flow in study.flows.items():
        maps = [patch_map(subject, flow, [row]) for row in rows]
        sheet = side_by_side([overlay(image, values, places) for values in (0 * maps[0], *maps)])
        write_whole(folder / f"overlay_{method}.png", partial(sheet.save, format="PNG"))


def write_study(folder: Path, studies: list[Study]) -> None:
    """All files about one answer; a second study goes into the report and the summary beside it."""
    study = studies[0]
    write_text(folder / "report.html", page(studies))
    write_whole(folder / "trace.safetensors", lambda path: path.write_bytes(trace_file(study)))
    if study.opened.image is not None:
        write_overlays(folder, study, study.opened.image)
    compared = {"compared": summary(studies[1])} if len(studies) > 1 else {}
    write_json(folder / "summary.json", summary(study) | compared)
