"""`data`: what a data set holds, before anything is trained on it."""

from pathlib import Path

import click

from vqa_scratch.command_line import Flag, GroupedCommand, NearChoice
from vqa_scratch.commands.line import FOLDER, check_page


@click.command(
    "data",
    cls=GroupedCommand,
    params=[
        click.Argument(["source"], type=FOLDER),
        Flag(["--fetch"], type=NearChoice(["easy-vqa"]), help="Download a public data set into SOURCE first."),
        Flag(
            ["--split"], multiple=True, help="Split to look at; may be given several times; by default all there are."
        ),
        Flag(["--out"], type=FOLDER, help="Also write a page of samples to this file."),
        Flag(["--cache"], type=FOLDER, default=Path("cache"), help="Folder for pictures that come inside a table."),
    ],
)
def data(source: Path, fetch: str | None, split: tuple[str, ...], out: Path | None, cache: Path) -> None:
    """Say what SOURCE holds, a table of your own or a folder: questions, answers, images, likely mistakes.

    \b
    Example:
      python -m vqa_scratch data photos/questions.csv --out look.html
      python -m vqa_scratch data easy-vqa --fetch easy-vqa
    """
    from vqa_scratch.commands import data_report
    from vqa_scratch.data.fetch import fetch as download

    if out is not None:
        check_page(out)
    if fetch is not None:
        download(fetch, source)
    read = data_report.read_splits(source, split, cache)
    for line in data_report.lines(source, read):
        print(line)
    if out is not None:
        data_report.write_samples(out, source, read)
        print(f"samples: {out}")
