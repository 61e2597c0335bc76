"""`study`: analyse one answer of a run, or measure its attention over a split of questions."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from vqa_scratch.command_line import Flag, GroupedCommand
from vqa_scratch.commands.line import DEVICE, FOLDER, check_no_run, open_run
from vqa_scratch.errors import UserError

ONE, SPLIT = "One answer", "Over a split"


@click.command(
    "study",
    cls=GroupedCommand,
    params=[
        click.Argument(["run"], type=FOLDER),
        Flag(["--out"], type=FOLDER, required=True, help="Folder for the report and all other files."),
        Flag(["--image"], type=FOLDER, help="Image file (a run of train.py).", group=ONE),
        Flag(["--question"], help="Question about the image.", group=ONE),
        Flag(["--text"], type=FOLDER, help="Text file to read (a run of rlhf.py, or any T5 checkpoint).", group=ONE),
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
    ],
)
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
    """Analyse one answer of the run in the folder RUN, or measure its attention over a split.

    \b
    Example:
      python -m vqa_scratch study runs/vqa --image photo.jpg --question "what color is the dog?" --out study/
    """
    from vqa_scratch.commands.study_files import open_input, run_folder, write_study
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
    system = open_run(run_folder(run), device)
    figures: dict[str, Any] = {"run": run_name(run), "split": split}

    def subject_of(image: Any, question: str) -> Any:
        return system.subject(image, question).subject

    if pointing is not None:
        found = pointing_figures(subject_of, system.processor, pointing, split, questions)
        figures["pointing"] = {name: asdict(p) | {"ratio": p.ratio} for name, p in found.items()}
        print(pointing_table(found))
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
