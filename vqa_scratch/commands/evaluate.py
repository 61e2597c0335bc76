"""`evaluate`: scores of a run on a data set with blind baselines, and a submission file."""

from pathlib import Path

import click

from vqa_scratch.command_line import Flag, GroupedCommand
from vqa_scratch.commands.line import DEVICE, FOLDER, PRECISION, open_run
from vqa_scratch.errors import UserError, note


@click.command(
    "evaluate",
    cls=GroupedCommand,
    params=[
        click.Argument(["run"], type=FOLDER),
        Flag(
            ["--data"],
            type=FOLDER,
            help="Table or folder: docs/own-data.md. Only a run that hears can do without: on what it draws.",
        ),
        Flag(["--split"], default="val", help="Split to answer."),
        Flag(["--submission"], type=FOLDER, help="Also write the answers to this file, for the evaluation server."),
        Flag(["--limit"], type=click.IntRange(min=1), help="Answer about this many questions, in whole images."),
        Flag(["--captions"], is_flag=True, help="Score captions instead of answers."),
        DEVICE,
        PRECISION,
    ],
)
def evaluate(
    run: Path,
    data: Path | None,
    split: str,
    submission: Path | None,
    limit: int | None,
    captions: bool,
    device: str,
    precision: str,
) -> None:
    """Score the trained system in the folder RUN; the figures go to evaluation.json in it.

    \b
    Example:
      python -m vqa_scratch evaluate runs/vqa --data vqa2/ --split val --limit 5000
    """
    from vqa_scratch.commands import scores
    from vqa_scratch.data.vqa_v2 import read_vqa
    from vqa_scratch.data.vqa_write import write_submission
    from vqa_scratch.storage import check_writable, write_json
    from vqa_scratch.training.allocator import keep_freed_memory

    if submission is not None and limit is not None:
        raise UserError("a submission answers every question of its split: leave out --limit or --submission")
    check_writable(run)  # before the work, not after
    if submission is not None:
        check_writable(submission.parent)
        if submission.is_dir():
            raise UserError(f"--submission {submission} is a folder; give a file")
        if submission.exists() and not scores.is_submission(submission):
            raise UserError(f"--submission {submission} is another file, which would be lost; give a new one")
    if captions and submission is not None:
        raise UserError("a submission holds answers: leave out --captions or --submission")
    keep_freed_memory()
    opened = open_run(run, device, precision)
    if opened.hears:
        if captions or submission is not None:
            raise UserError(f"{run} hears: leave out {'--captions' if captions else '--submission'}")
        figures = opened.recognise(data, split, limit)
        write_json(run / "evaluation.json", figures)
        print(*opened.lines(figures), sep="\n")
        return
    if data is None:
        raise UserError("give --data, a table or folder: docs/own-data.md")
    if captions:
        figures = opened.describe(data, split, limit)
        write_json(run / "evaluation.json", figures)
        print(scores.caption_table(figures))
        return
    read = read_vqa(data, split)
    print(read.report)
    for line in opened.tokenizers.notes_on_all(sample.question for sample in read.samples):
        note(line)
    expected = scores.check_complete(read) if submission is not None else set()
    if not read.annotated:
        if submission is None:
            raise UserError(f"split {split} of {data} has no answers to score by; give --submission FILE")
        answers = opened.answer(read.samples, None, progress="answering")
        print(f"split {split} has no answers: nothing is scored")
    else:
        figures, answers = scores.evaluation(opened, data, split, read.samples, limit)
        write_json(run / "evaluation.json", figures)
        print(scores.table(figures))
    if submission is not None:
        write_submission(submission, {i: a.text for i, a in answers.items()}, expected)
        print(f"submission of {len(answers):,} answers written to {submission}")
