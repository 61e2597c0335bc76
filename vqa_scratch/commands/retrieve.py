"""`retrieve`: the images that fit a text best, or the texts that fit an image, of a contrastive run."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vqa_scratch.command_line import Flag, GroupedCommand
from vqa_scratch.commands.line import DEVICE, FOLDER, PRECISION, check_page, open_run
from vqa_scratch.errors import UserError, in_a_line, note, some

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vqa_scratch.systems.base import System

SOUGHT, AMONG = "What is sought", "Among what"
AT_ONCE = 256  # images that are in memory at once


@click.command(
    "retrieve",
    cls=GroupedCommand,
    params=[
        click.Argument(["run"], type=FOLDER),
        Flag(["--text"], help="Find the images that fit this text.", group=SOUGHT),
        Flag(["--image"], type=FOLDER, help="Find the texts that fit this image file.", group=SOUGHT),
        Flag(["--images"], type=FOLDER, help="Folder of images; by default those of RUN's test split.", group=AMONG),
        Flag(["--labels"], help="Texts to choose from, with commas; by default RUN's test captions.", group=AMONG),
        Flag(["--template"], multiple=True, help='What {} in "a photo of a {}" is for --labels; several.', group=AMONG),
        Flag(["--top"], type=click.IntRange(min=1), default=8, help="Give this many."),
        Flag(["--out"], type=FOLDER, help="Page of pictures.", shown="retrieved.html in RUN"),
        DEVICE,
        PRECISION,
    ],
)
def retrieve(
    run: Path,
    text: str | None,
    image: Path | None,
    images: Path | None,
    labels: str | None,
    template: Sequence[str],
    top: int,
    out: Path | None,
    device: str,
    precision: str,
) -> None:
    """Find images by a text, or texts by an image, with the contrastive system in the folder RUN.

    \b
    Examples:
      python -m vqa_scratch retrieve runs/clip --text "a small red circle at the top left" --images photos/
      python -m vqa_scratch retrieve runs/clip --image photo.png --labels "red circle,blue square"
    """
    if (text is None) == (image is None):
        raise UserError("give --text, to find images, or --image, to find texts: one of the two")
    for flag, given, needed, missing in (
        ("--images", images, "--text", text),
        ("--labels", labels, "--image", image),
        ("--template", template, "--labels", labels),
    ):
        if given and missing is None:
            raise UserError(f"{flag} goes with {needed}: leave it out, or give {needed}")
    system, page = open_run(run, device, precision), out or run / "retrieved.html"
    check_page(page)
    if text is not None:
        find_images(system, text, images, top, page)
    if image is not None:
        find_texts(system, image, labels, template, top, page)
    print(f"written to {page}")


def find_images(system: "System", text: str, folder: Path | None, top: int, page: Path) -> None:
    """Print and draw the images of a folder, or of the run's test split, that are most similar to a text."""
    from vqa_scratch.data.image_files import load_image
    from vqa_scratch.report.gallery import card, write_page

    asked = system.embed_texts([text])
    for line in system.tokenizers.notes_on(text, "text"):
        note(line)
    samples = [] if folder else system.texts_and_images()
    paths = images_in(folder) if folder else [sample.image_path for sample in samples]
    load = partial(load_image, upright=all(sample.upright for sample in samples))  # as the run reads its split
    kept, vectors = readable(system, paths, load)
    best = (vectors @ asked[0]).topk(min(top, len(kept)))
    cards = []
    for similar, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"{similar:.3f}  {in_a_line(kept[place])}")
        cards.append(card(load(kept[place]), "", kept[place].name, "", f"similarity {similar:.3f}", ""))
    lead = f"The {len(cards)} of {len(kept):,} images that fit the text best, the best one first."
    write_page(page, text, lead, [("images", cards)])


def find_texts(
    system: "System", image: Path, labels: str | None, templates: Sequence[str], top: int, page: Path
) -> None:
    """Print and draw the labels, or captions of the run's test split, that fit an image best."""
    from html import escape

    from vqa_scratch.data.image_files import load_image
    from vqa_scratch.report.gallery import card, write_page

    shown = load_image(image)
    if labels is not None:
        texts = [label.strip() for label in labels.split(",")]
        scores, kind = system.classify(shown, texts, templates or ("{}",)), "probability"
    else:
        vector = system.embed_images([shown])[0]
        texts = list(dict.fromkeys(sample.answer for sample in system.texts_and_images()))
        scores, kind = (system.embed_texts(texts) @ vector).tolist(), "similarity"
    best = sorted(zip(scores, texts, strict=True), key=lambda pair: -pair[0])[:top]
    for score, text in best:
        print(f"{score:.3f}  {in_a_line(text)}")
    lines = "<br>".join(f"{score:.3f} {escape(text)}" for score, text in best[1:])
    lead = f"The {len(best)} of {len(texts):,} texts that fit the image best, the best one first."
    score, text = best[0]
    write_page(page, image.name, lead, [("texts", [card(shown, "", text, "", f"{kind} {score:.3f}", lines)])])


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, by name. Raises UserError if there are none."""
    from PIL import Image

    if not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder" + ("" if folder.exists() else ": there is no such folder"))
    files, known = sorted(path for path in folder.iterdir() if path.is_file()), Image.registered_extensions()
    found = [path for path in files if path.suffix.lower() in known]
    if not found:
        raise UserError(
            f"--images {folder} holds no images: none of its {len(files):,} files ends in .png, .jpg or such"
        )
    return found


def readable(system: "System", paths: Sequence[Path], load: "Callable[[Path], Image]") -> "tuple[list[Path], Tensor]":
    """(the images that can be read, their vectors (I, P)); a note names the others. UserError if none can be read."""
    import torch
    from tqdm import tqdm

    kept: list[Path] = []
    unread: dict[str, UserError] = {}
    parts = []
    for start in tqdm(range(0, len(paths), AT_ONCE), "images", disable=len(paths) <= AT_ONCE, leave=False):
        images = []
        for path in paths[start : start + AT_ONCE]:
            try:
                images.append(load(path))
                kept.append(path)
            except UserError as error:
                unread[path.name] = error
        if images:
            parts.append(system.embed_images(images))
    if not kept:
        raise UserError(f"none of the {len(paths):,} images can be read; the first: {next(iter(unread.values()))}")
    if unread:
        note(f"{len(unread):,} of {len(paths):,} images cannot be read: {some(unread)}")
    return kept, torch.cat(parts)
