"""`study`: analyse one answer of a run, or measure its attention over a split of questions."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from vqa_scratch.command_line import Flag, GroupedCommand
from vqa_scratch.commands.line import DEVICE, FOLDER, MODEL, PRECISIONS, check_no_run, open_asked
from vqa_scratch.errors import UserError

ONE, SPLIT = "One answer", "Over a split"


@click.command(
    "study",
    cls=GroupedCommand,
    params=[
        click.Argument(["run"], type=FOLDER, required=False),
        MODEL,
        Flag(["--out"], type=FOLDER, required=True, help="Folder for the report and all other files."),
        Flag(["--image"], type=FOLDER, help="Image file (a run of train.py, or --model).", group=ONE),
        Flag(["--voice"], type=FOLDER, help="Sound file (a run of preset voice, or --model, a Whisper).", group=ONE),
        Flag(["--question"], help="Question about the image.", group=ONE),
        Flag(["--text"], help="Compared with the image (preset clip); a file to read (language models).", group=ONE),
        Flag(["--compare"], type=FOLDER, help="A second run, side by side on the same input.", group=ONE),
        Flag(["--pointing"], type=FOLDER, help="Built-in data set: do maps point at the right object?", group=SPLIT),
        Flag(["--faithfulness"], type=FOLDER, help="Data folder: deletion and insertion curves.", group=SPLIT),
        Flag(["--ablation"], type=FOLDER, help="Data folder: accuracy with each head silenced.", group=SPLIT),
        Flag(
            ["--heads"],
            default="decoder.*.cross",
            help="Attentions, or routers, that --ablation silences.",
            group=SPLIT,
        ),
        Flag(["--split"], default="val", help="Split of the data folder.", group=SPLIT),
        Flag(["--questions"], type=click.IntRange(min=1), default=500, help="Number of questions to use.", group=SPLIT),
        DEVICE,
        Flag(["--precision"], type=PRECISIONS, help="Type of --model's weights.", shown="fp32", group="Computing"),
    ],
)
def study(
    run: Path | None,
    model: str | None,
    out: Path,
    image: Path | None,
    voice: Path | None,
    question: str | None,
    text: str | None,
    compare: Path | None,
    pointing: Path | None,
    faithfulness: Path | None,
    ablation: Path | None,
    heads: str,
    split: str,
    questions: int,
    device: str,
    precision: str | None,
) -> None:
    """Analyse one answer of the run in the folder RUN, or of a released model, or measure its attention over a split.

    \b
    Examples:
      python -m vqa_scratch study runs/vqa --image photo.jpg --question "what color is the dog?" --out study/
      python -m vqa_scratch study runs/clip --image photo.jpg --text "a brown dog" --out study/
      python -m vqa_scratch study --model whisper-tiny --voice question.wav --out study/
    """
    from vqa_scratch.commands.study_files import open_input, write_study
    from vqa_scratch.language_model import LanguageModel
    from vqa_scratch.storage import check_writable, write_json
    from vqa_scratch.study.opened import run_name
    from vqa_scratch.study.record import take_apart
    from vqa_scratch.study.splits import ablation_figures, faithfulness_figures, pointing_figures, pointing_table
    from vqa_scratch.systems.studied import score_of
    from vqa_scratch.training.precision import pick_device

    check_writable(out)
    check_no_run(out, "--out")
    over_split = {"--pointing": pointing, "--faithfulness": faithfulness, "--ablation": ablation}
    asked = [flag for flag, folder in over_split.items() if folder is not None]
    if asked and any(given is not None for given in (image, voice, question, text, compare)):
        raise UserError(f"{asked[0]} goes over a split: leave out --image, --voice, --question, --text and --compare")
    if precision is not None and model is None:
        raise UserError("--precision is that of the weights of --model; a run is studied in fp32")
    device = str(pick_device(device))
    if not asked:
        given = (image, question, text, device)
        studies = [take_apart(open_input(run, *given, model, precision or "fp32", voice))]
        studies += [take_apart(open_input(compare, *given, voice=voice))] if compare is not None else []
        write_study(out, studies)
        for done in studies:
            for note in done.opened.notes:
                print(f"note: {note}", file=sys.stderr)
            said = f"{done.answer or '(nothing)'}  ({done.opened.subject.measure} {done.probability:.3f})"
            print(f"{done.opened.run}: {said}")
            print(f"certificate: {done.certificate}")
        print(f"see {out / 'report.html'}")
        return
    if ablation is not None and model is not None:
        raise UserError("--ablation scores the answers of a run: it does not go with --model")
    system = open_asked(run, model, device, precision or "fp32")
    if isinstance(system, LanguageModel):
        raise UserError(f"{asked[0]} goes over questions about images, and {run or model} reads texts")
    if faithfulness is not None and system.asked != "question":
        raise UserError(f"--faithfulness goes over questions, and {run} is asked none")
    figures: dict[str, Any] = {"run": run_name(run or Path(str(model))), "split": split}

    def subject_of(image: Any, question: str) -> Any:
        return system.subject(image, question).subject

    if pointing is not None:
        found = pointing_figures(subject_of, system.processor, pointing, split, questions, system.asked)
        figures["pointing"] = {name: asdict(p) | {"ratio": p.ratio} for name, p in found.items()}
        print(pointing_table(found, system.asked))
    if faithfulness is not None:
        figures["faithfulness"] = faithfulness_figures(subject_of, faithfulness, split, questions, out)
        for name, c in figures["faithfulness"].items():
            print(f"{name:10s} area under deletion {c['deletion_area']:.3f}, insertion {c['insertion_area']:.3f}")
    if ablation is not None:
        figures["ablation"] = ablation_figures(system.model, score_of(system, ablation, split, questions), heads, out)
        for effect in figures["ablation"]["heads"][:5]:
            lost = f"{effect['score']:.4f} ({-effect['drop']:+.4f})"
            print(f"without {effect['name']} {effect['part']} {effect['head']}: {lost}")
    write_json(out / "figures.json", figures)
    print(f"see {out / 'figures.json'}")
