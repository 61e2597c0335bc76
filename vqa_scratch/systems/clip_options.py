"""The options of the contrastive system."""

from dataclasses import dataclass
from pathlib import Path

from vqa_scratch.errors import UserError
from vqa_scratch.options import option
from vqa_scratch.systems.run_options import (
    DATA,
    LIMITS,
    LOGGING,
    MODEL,
    PRESET_HELP,
    RUN,
    STEM,
    TRAINING,
    ImageOptions,
)


@dataclass(frozen=True)
class CLIPOptions(ImageOptions):
    """Two towers that give an image and its caption nearly the same vector."""

    preset: str = option("clip", PRESET_HELP, RUN, ("clip",))
    out: Path = option(Path("runs/clip"), "Folder of the run.", RUN, may_change=True)
    max_images: int | None = option(None, "At most this many images to train on.", DATA, minimum=1)

    width: int = option(192, "Width of both towers.", MODEL, minimum=1)
    heads: int = option(4, "Attention heads.", MODEL, minimum=1)
    image_layers: int = option(4, "Layers of the image tower.", MODEL, minimum=1, maximum=1_000)
    text_layers: int = option(4, "Layers of the text tower.", MODEL, minimum=1, maximum=1_000)
    patch_size: int = option(16, "Side of a patch, in pixels.", MODEL, minimum=1)
    stem: str = STEM()
    projection: int = option(
        128, "Width of the space that images and texts share.", MODEL, minimum=1, only={"loss": "softmax"}
    )
    vocabulary: int = option(512, "Largest vocabulary to learn from the captions, in tokens.", MODEL, minimum=1)
    loss: str = option(
        "softmax",
        "Choose the right one among the batch (softmax: a CLIP), or judge each pair alone (sigmoid: a SigLIP).",
        TRAINING,
        ("softmax", "sigmoid"),
    )
    max_caption_tokens: int = option(
        77, "Longer captions are cut to this many tokens, start and end token included.", LIMITS, minimum=3
    )
    pairs_per_step: int = option(
        384, "Pairs of image and caption in one optimizer step; each is told from all others.", LIMITS, minimum=2
    )
    eval_images: int = option(
        1_000, "At most this many images of the val split, each sought by its caption.", LOGGING, minimum=2
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate > 1:
            raise UserError(
                "--accumulate would show each pair only those of its part: the loss of --preset clip does not add up "
                "over parts; set how many pairs a step has with --pairs-per-step"
            )
