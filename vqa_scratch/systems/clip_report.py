"""How a contrastive run is shown: its figures in lines, and a page of images and captions that seek each other."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from vqa_scratch.data.image_files import load_image
from vqa_scratch.data.vqa_v2 import VQASample, spread
from vqa_scratch.report.gallery import card, write_page
from vqa_scratch.systems.finals import cut_short

SHOWN = 4  # of what is found, for each that is sought
WAYS = {"image_to_text": "captions for images", "text_to_image": "images for captions"}


def lines_of(summary: dict[str, Any]) -> list[str]:
    """The final figures, one a line."""
    lines = []
    for label, figures in (("", summary), ("hold-out, ", summary["holdout"])):
        for way, words in WAYS.items() if figures else ():
            found = figures[way]
            recalls = ", ".join(f"{k} {found[k]:.3f}" for k in found if k.startswith("R@"))
            lines.append(
                f"{label}{words}: {recalls}, median rank {found['median_rank']:g} among {figures['images']:,} "
                f"(chance {1 / figures['images']:.3f}, R@1 at most {found['ceiling']:.3f})"
            )
    if "contrasts" in summary:
        told = ", ".join(f"{name} swapped {share:.3f}" for name, share in summary["contrasts"].items())
        lines.append(f"descriptions told apart, chance 0.5: {told}")
        classes = summary["zero_shot"]
        lines.append(
            f"single objects classified, chance {classes['chance']:.3f}: {classes['seen']:.3f}, "
            f"never shown in training {classes['held_out']:.3f}"
        )
    return [*lines, *cut_short(summary)]


def verdict_of(rank: int) -> str:
    """The colour of a card by the rank of the right one."""
    return "right" if rank == 1 else "partly" if rank <= SHOWN else "wrong"


def show(
    folder: Path, figures: Mapping[str, Any], samples: Sequence[VQASample], images: Tensor, texts: Tensor, number: int
) -> None:
    """samples.html: half of `number` cards are images with the captions found for them; the others are images found for
    captions, a section for each caption."""
    similar = images @ texts.T
    places = {sample.question_id: place for place, sample in enumerate(samples)}

    def picture(sample: VQASample) -> Any:
        return load_image(sample.image_path, upright=sample.upright)

    described = []
    for sample in spread(samples, number // 2):
        row = similar[places[sample.question_id]]
        order = row.argsort(descending=True).tolist()
        rank = order.index(places[sample.question_id]) + 1
        said = "<br>".join(
            f"{'<b>' if samples[at] is sample else ''}{row[at]:.3f} {escape(samples[at].answer)}"
            f"{'</b>' if samples[at] is sample else ''}"
            for at in order[:SHOWN]
        )
        note = f"its own caption is number {rank} of {len(samples):,}"
        described.append(card(picture(sample), "", samples[order[0]].answer, verdict_of(rank), note, said))
    sections = [("captions found for images", described)]
    for sample in spread(samples, number // 2 // SHOWN):
        column = similar[:, places[sample.question_id]]
        order = column.argsort(descending=True).tolist()
        rank, cards = order.index(places[sample.question_id]) + 1, []
        for place, at in enumerate(order[:SHOWN], 1):
            own = samples[at] is sample
            said = f"number {place}" + (", the right one" if own else "")
            note = f"similarity {column[at]:.3f}" + ("" if rank <= SHOWN else f"; the right one is number {rank}")
            verdict = "right" if own else "wrong" if place == 1 else ""
            cards.append(card(picture(samples[at]), "", said, verdict, note, escape(samples[at].answer)))
        sections.append((sample.answer, cards))
    ways = ", ".join(f"{words} {figures[way]['R@1']:.3f}" for way, words in WAYS.items())
    lead = (
        "Images the model was not trained on, and the captions of all of them. First, images with the captions that "
        "are most similar to them, their own in bold. Then captions, and the images that are most similar to them. "
        "Green: the right one comes first; amber: among the first four; red: later."
    )
    write_page(folder / "samples.html", f"What finds what (first place: {ways})", lead, sections)
