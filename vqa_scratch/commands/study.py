"""`study`: take one answer of a run apart, or measure its attention over a split of questions."""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from vqa_scratch.commands.line import FOLDER
from vqa_scratch.errors import UserError
from vqa_scratch.options import NearChoice
from vqa_scratch.run import load_run
from vqa_scratch.storage import check_writable, write_json, write_text, write_whole
from vqa_scratch.study.faithfulness import answer_rows, patch_map
from vqa_scratch.study.opened import Opened
from vqa_scratch.study.overlay import overlay, side_by_side
from vqa_scratch.study.record import Study, summary, take_apart, trace_file
from vqa_scratch.study.report import page
from vqa_scratch.study.runs import is_text_run, open_question, open_text, question_subject, score_of
from vqa_scratch.study.splits import ablation_figures, faithfulness_figures, pointing_figures, pointing_table
from vqa_scratch.training.precision import pick_device


def open_input(run: Path, image: Path | None, question: str | None, text: Path | None, device: str) -> Opened:
    """A run on one input: an image with a question, or a text. Raises UserError if the input does not suit the run."""
    if is_text_run(run):
        if text is None or image is not None or question is not None:
            raise UserError(f"{run} reads texts: give it --text FILE, and neither --image nor --question")
        return open_text(run, read_text(text), device)
    if text is not None or image is None or question is None:
        raise UserError(f'{run} answers questions about images: give it --image FILE --question "..."')
    return open_question(run, image, question, device)


def read_text(path: Path) -> str:
    """A text file. Raises UserError if there is none or if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read the text {path}: it is not UTF-8") from None


def write_overlays(folder: Path, study: Study) -> None:
    """overlay_<method>.png: the plain image, then the map of every word of the answer."""
    subject, image = study.opened.subject, study.opened.image
    places = subject.image[0].places
    rows = answer_rows(subject, [token.id for token in study.tokens])
    for method, flow in study.flows.items():
        maps = [patch_map(subject, flow, [row]) for row in rows]
        sheet = side_by_side([overlay(image, values, places) for values in (0 * maps[0], *maps)])
        write_whole(folder / f"overlay_{method}.png", lambda path, sheet=sheet: sheet.save(path, format="PNG"))


def write_study(folder: Path, studies: list[Study]) -> None:
    """All files about one answer; a second study stands beside it in the report and in the summary."""
    study = studies[0]
    write_text(folder / "report.html", page(studies))
    write_whole(folder / "trace.safetensors", lambda path: path.write_bytes(trace_file(study)))
    if study.opened.image is not None:
        write_overlays(folder, study)
    values: dict[str, Any] = summary(study)
    if len(studies) > 1:
        values["compared"] = summary(studies[1])
    write_json(folder / "summary.json", values)


@click.command("study")
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder for the report and all other files.")
@click.option("--image", type=FOLDER, help="Image file (a run of train.py).")
@click.option("--question", help="Question about the image.")
@click.option("--text", type=FOLDER, help="Text file to read (a run of rlhf.py, or any T5 checkpoint).")
@click.option("--compare", type=FOLDER, help="A second run, side by side on the same input.")
@click.option("--pointing", type=FOLDER, help="Embedded data folder: do maps point at the object asked about?")
@click.option("--faithfulness", type=FOLDER, help="Data folder: deletion and insertion curves over questions.")
@click.option("--ablation", type=FOLDER, help="Data folder: accuracy with each head silenced.")
@click.option("--heads", default="decoder.*.cross", show_default=True, help="Attentions that --ablation goes through.")
@click.option("--split", default="val", show_default=True, help="Split of the data folder.")
@click.option("--questions", type=click.IntRange(min=1), default=500, show_default=True, help="How many of them.")
@click.option("--device", type=NearChoice(("auto", "cpu", "cuda", "mps")), default="auto", help="Where to compute.")
def study(
    run: Path,
    out: Path,
    image: Path | None,
    question: str | None,
    text: Path | None,
    compare: Path | None,
    pointing: Path | None,
    faithfulness: Path | None,
    ablation: Path | None,
    heads: str,
    split: str,
    questions: int,
    device: str,
) -> None:
    """Take one answer of the run in the folder RUN apart, or measure its attention over a split."""
    check_writable(out)
    over_split = {"--pointing": pointing, "--faithfulness": faithfulness, "--ablation": ablation}
    asked = [flag for flag, folder in over_split.items() if folder is not None]
    if asked and any(given is not None for given in (image, question, text, compare)):
        raise UserError(f"{asked[0]} goes over a split: leave out --image, --question, --text and --compare")
    if not asked:
        device = str(pick_device(device))
        studies = [take_apart(open_input(f, image, question, text, device)) for f in (run, compare) if f is not None]
        write_study(out, studies)
        for done in studies:
            for note in done.opened.notes:
                print(f"note: {note}", file=sys.stderr)
            print(f"{done.opened.run}: {done.answer or '(nothing)'}  (probability {done.probability:.3f})")
            print(f"certificate: {done.certificate}")
        print(f"see {out / 'report.html'}")
        return
    opened, figures = load_run(run, pick_device(device)), {"run": str(run), "split": split}
    subject_of = partial(question_subject, opened)
    if pointing is not None:
        found = pointing_figures(subject_of, opened.processor, pointing, split, questions)
        figures["pointing"] = {name: asdict(p) | {"ratio": p.ratio} for name, p in found.items()}
        print(pointing_table(found))
    if faithfulness is not None:
        figures["faithfulness"] = faithfulness_figures(subject_of, faithfulness, split, questions, out)
        for name, c in figures["faithfulness"].items():
            print(f"{name:10s} area under deletion {c['deletion_area']:.3f}, insertion {c['insertion_area']:.3f}")
    if ablation is not None:
        figures["ablation"] = ablation_figures(opened.model, score_of(opened, ablation, split, questions), heads, out)
        for effect in figures["ablation"]["heads"][:5]:
            print(f"without {effect['name']} head {effect['head']}: {effect['score']:.4f} ({-effect['drop']:+.4f})")
    write_json(out / "figures.json", figures)
    print(f"see {out / 'figures.json'}")
