"""The options of each system of `train.py`, and its command line.

`run_options.py` holds those of every system, `QuestionOptions` those of systems that answer questions; the class of a
system adds its own. So a flag that a system does not use is an error. Nothing here imports torch.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vqa_scratch.command_line import first_rank_speaks, parse
from vqa_scratch.connectors import CONNECTORS
from vqa_scratch.errors import UserError
from vqa_scratch.options import choices_of, option
from vqa_scratch.systems.clip_options import CLIPOptions
from vqa_scratch.systems.presets import PRESETS
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
    RunOptions,
)
from vqa_scratch.systems.voice_options import VoiceOptions


@dataclass(frozen=True)
class QuestionOptions(ImageOptions):
    """The options of systems that answer questions about images."""

    start_at: int = option(0, "First question of the file to use.", DATA, minimum=0)
    end_at: int | None = option(None, "Question of the file to stop before; without it, use all.", DATA, minimum=0)
    max_images: int | None = option(None, "At most this many images.", DATA, minimum=1)
    max_questions: int | None = option(None, "At most this many questions.", DATA, minimum=1)
    min_agreement: float = option(
        0.0, "Leave out questions on which fewer of the annotators agree; a share.", DATA, minimum=0, maximum=1
    )
    verify_images: bool = option(
        False, "Decode every image first; leave out and count those that cannot be read.", DATA
    )
    max_question_tokens: int = option(
        32, "Longer questions are cut to this many tokens, and counted.", LIMITS, minimum=3
    )
    questions_per_step: int = option(512, "Questions in one optimizer step.", LIMITS, minimum=1)
    questions_per_image: int = option(8, "At most this many questions of an image in a batch.", LIMITS, minimum=1)
    eval_questions: int = option(
        2_000, "Questions of the val split scored at each evaluation while training.", LOGGING, minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.questions_per_step % self.accumulate:
            raise UserError(
                f"--questions-per-step {self.questions_per_step} does not divide into --accumulate {self.accumulate}"
            )


NEW, WITHOUT_ENCODER = {"start_from": None}, {"connector": "patches"}
SHAPES, RELEASED = NEW | {"preset": "shapes"}, NEW | {"preset": "book", "init": "pretrained"}

# What several systems have; each says when it has a meaning there.
ANSWER_TOKENS = partial(option, 8, "Longer answers are cut to this many tokens, end token included.", LIMITS, minimum=1)
FREEZE = partial(
    option, "nothing", "Part whose weights do not train; a decoder's cross-attention always trains.", MODEL
)

# Of the small decoders that are trained here, whatever joins them to the image.
DECODER_HIDDEN = partial(
    option,
    None,
    "Inner width of the decoder's MLP, or of each expert; without it 4 * width, shared among the experts of a token.",
    MODEL,
    minimum=1,
)
EXPERTS = partial(
    option,
    None,
    "So many experts, small MLPs, in place of each MLP of the decoder.",
    MODEL,
    minimum=2,
    maximum=1_000,
    never={"freeze": ("decoder", "all"), "compile": True},
)
PER_TOKEN = partial(option, 2, "Experts that a token goes to.", MODEL, minimum=1, never={"experts": None})
BALANCE = partial(
    option,
    "loss",
    "What spreads tokens over experts: a loss, biases of the routers, or nothing.",
    TRAINING,
    ("loss", "bias", "none"),
    never={"experts": None},
)


@dataclass(frozen=True)
class VQAOptions(QuestionOptions):
    """Two encoders, a connector, and a decoder that writes the answer."""

    preset: str = option("shapes", PRESET_HELP, RUN, ("shapes", "book"))
    out: Path = option(Path("runs/vqa"), "Folder of the run.", RUN, may_change=True)

    start_from: Path | None = option(
        None, "Finished run whose weights, sizes, connector and tokenizers to start from.", MODEL
    )
    init: str = option("random", "Random weights, or those of checkpoints.", MODEL, ("random", "pretrained"), only=NEW)
    image_model: str | None = option(
        None, "ViT checkpoint: folder or Hub id.", MODEL, only=RELEASED, never=WITHOUT_ENCODER
    )
    text_model: str | None = option(
        None, "BERT, DistilBERT or RoBERTa checkpoint.", MODEL, only=RELEASED | {"text_encoder": True}
    )
    decoder_model: str | None = option(
        None,
        "GPT-2 checkpoint; or an OPT or Llama, with any connector but tokens and mean.",
        MODEL,
        only=RELEASED,
    )
    connector: str = option(
        "tokens",
        "How the decoder gets image and question: cross-attention to every token (tokens) or to their mean (mean), or "
        "a prefix of projected tokens (prefix), of projected pixels without an image encoder (patches) or of learned "
        "queries that read the tokens (qformer), or gated cross-attention to such queries (resampler).",
        MODEL,
        CONNECTORS,
        only=NEW,
        was="fusion",
    )
    queries: int = option(
        16, "Learned queries of the connector.", MODEL, minimum=1, only={"connector": ("qformer", "resampler")}
    )
    query_tiles: bool = option(
        True,
        "Let each learned query read its own tile of the image; without, each reads all of it, as in BLIP-2 and "
        "Flamingo.",
        MODEL,
        only={"connector": ("qformer", "resampler")},
    )
    question_prompt: bool = option(False, "Give the question to the decoder too, as a prompt.", MODEL)
    question_loss: bool = option(
        False,
        "Learn to tell the question's words from the image too, not the answer's alone.",
        TRAINING,
        only={"question_prompt": True} | NEW,
    )
    question_loss_steps: int = option(
        200,
        "Steps in which the question's words are learned too; then it is the answer's alone.",
        TRAINING,
        minimum=1,
        only={"question_loss": True},
    )
    text_encoder: bool = option(
        True, "Read the question with a text encoder too, if the connector takes its states.", MODEL, only=NEW
    )
    freeze: str = FREEZE(("nothing", "encoders", "text_encoder", "image_encoder", "decoder", "all"))
    feature_cache: bool = option(
        False,
        "Compute the states of frozen encoders once, and keep them in --cache.",
        MODEL,
        only={"freeze": ("encoders", "text_encoder", "image_encoder", "all")},
        never=WITHOUT_ENCODER,
        may_change=True,
    )
    width: int = option(128, "Width of both encoders and the decoder.", MODEL, minimum=1, only=SHAPES)
    heads: int = option(4, "Attention heads.", MODEL, minimum=1, only=SHAPES)
    image_layers: int = option(
        3, "Layers of the image encoder.", MODEL, minimum=1, maximum=1_000, only=SHAPES, never=WITHOUT_ENCODER
    )
    text_layers: int = option(
        1, "Layers of the text encoder.", MODEL, minimum=1, maximum=1_000, only=SHAPES | {"text_encoder": True}
    )
    decoder_layers: int = option(4, "Layers of the decoder.", MODEL, minimum=1, maximum=1_000, only=SHAPES)
    decoder_hidden: int | None = DECODER_HIDDEN(only=SHAPES)
    experts: int | None = EXPERTS(only=SHAPES)
    experts_per_token: int = PER_TOKEN(only=SHAPES)
    balance: str = BALANCE(only=SHAPES)
    patch_size: int = option(8, "Side of a patch, in pixels.", MODEL, minimum=1, only=SHAPES)
    stem: str = STEM(only=SHAPES, never=WITHOUT_ENCODER)
    max_answer_tokens: int = ANSWER_TOKENS()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset == "shapes" and self.init == "pretrained":
            raise UserError("--init pretrained means nothing with --preset shapes: it goes with --preset book")
        if self.feature_cache and self.parallel == "fsdp":
            raise UserError("--parallel fsdp does not go with --feature-cache; leave one out")


@dataclass(frozen=True)
class SpokenOptions(QuestionOptions):
    """Questions that are heard: a finished run that answers typed ones, with the encoder of one that hears."""

    preset: str = option("spoken", PRESET_HELP, RUN, ("spoken",))
    out: Path = option(Path("runs/spoken"), "Folder of the run.", RUN, may_change=True)
    start_from: Path | None = option(None, "Finished run of --preset shapes.", MODEL)
    voice_model: Path | None = option(None, "Finished run of --preset voice, whose encoder hears the questions.", MODEL)
    spoken_texts: int = option(
        2_000, "At most this many different questions to train on, a quarter of it in other splits.", DATA, minimum=4
    )
    max_answer_tokens: int = ANSWER_TOKENS()


OWN_SIZES = {"model": None}


@dataclass(frozen=True)
class ViLTOptions(QuestionOptions):
    """A single stream that chooses its answer from a list: a small one, or a released ViLT."""

    preset: str = option("vilt", PRESET_HELP, RUN, ("vilt", "vilt-b32"))
    out: Path = option(Path("runs/vilt"), "Folder of the run.", RUN, may_change=True)
    min_answer_count: int = option(
        9, "The list has the answers that are the majority answer to at least this many questions.", DATA, minimum=1
    )

    model: str | None = option(
        None, "ViLT checkpoint to start from: folder or Hub id; without it, random weights.", MODEL
    )
    image_size: int = option(64, "Side of the resized images, in pixels.", MODEL, minimum=1, only=OWN_SIZES)
    patch_size: int = option(16, "Side of a patch, in pixels.", MODEL, minimum=1, only=OWN_SIZES)
    width: int = option(128, "Width.", MODEL, minimum=1, only=OWN_SIZES)
    heads: int = option(4, "Attention heads.", MODEL, minimum=1, only=OWN_SIZES)
    layers: int = option(4, "Layers.", MODEL, minimum=1, maximum=1_000, only=OWN_SIZES)
    stem: str = STEM(only=OWN_SIZES)


SMALL, PRETRAINED = {"preset": "caption", "init": "random"}, {"init": "pretrained"}


@dataclass(frozen=True)
class CaptionOptions(ImageOptions):
    """The captioner, which can also answer questions: a ResNet and a GPT-2 that reads its feature map."""

    question_prompt = True  # a question is always the decoder's prompt, for there is no text encoder

    preset: str = option("caption", PRESET_HELP, RUN, ("caption", "coco"))
    out: Path = option(Path("runs/caption"), "Folder of the run.", RUN, may_change=True)
    max_images: int | None = option(None, "At most this many images to train on.", DATA, minimum=1)

    init: str = option("random", "Random weights, or those of checkpoints.", MODEL, ("random", "pretrained"))
    image_model: Path | None = option(
        None, "File with torchvision's ResNet weights, .safetensors or .pth.", MODEL, only=PRETRAINED
    )
    decoder_model: str | None = option(None, "GPT-2 checkpoint: folder or Hub id.", MODEL, only=PRETRAINED)
    freeze: str = FREEZE(("nothing", "image_encoder", "decoder", "all"))
    width: int = option(128, "Width of the decoder.", MODEL, minimum=1, only=SMALL)
    heads: int = option(4, "Attention heads.", MODEL, minimum=1, only=SMALL)
    decoder_layers: int = option(4, "Layers of the decoder.", MODEL, minimum=1, maximum=1_000, only=SMALL)
    decoder_hidden: int | None = DECODER_HIDDEN(only=SMALL)
    experts: int | None = EXPERTS(only=SMALL)
    experts_per_token: int = PER_TOKEN(only=SMALL)
    balance: str = BALANCE(only=SMALL)
    image_width: int = option(64, "Channels of the first of the two stages.", MODEL, minimum=1, only=SMALL)
    image_blocks: int = option(1, "Residual blocks of each stage.", MODEL, minimum=1, maximum=1_000, only=SMALL)
    vocabulary: int = option(
        512, "Largest vocabulary to learn for the decoder, in tokens.", MODEL, minimum=1, only={"init": "random"}
    )

    max_caption_tokens: int = option(
        64, "Longer captions are cut to this many tokens, end token included.", LIMITS, minimum=1
    )
    max_question_tokens: int = option(32, "Longer questions are cut to this many tokens.", LIMITS, minimum=1)
    captions_per_step: int = option(256, "Captions in one optimizer step.", LIMITS, minimum=1)
    captions_per_image: int = option(
        5, "At most this many captions of an image in a batch; the image is encoded once.", LIMITS, minimum=1
    )
    question_share: float = option(
        0.0, "Share of the steps that train on questions, from the same data folder.", TRAINING, minimum=0, below=1
    )
    questions_per_step: int = option(512, "Questions in a step that trains on them.", LIMITS, minimum=1)
    questions_per_image: int = option(8, "At most this many questions of an image in a batch.", LIMITS, minimum=1)
    eval_captions: int = option(
        250, "Images of the val split described at each evaluation while training.", LOGGING, minimum=1
    )
    eval_questions: int = option(
        1_000, "Questions of the val split answered at each evaluation while training.", LOGGING, minimum=1
    )

    @property
    def max_answer_tokens(self) -> int:
        """The limit on captions, under the name that tokenizers use."""
        return self.max_caption_tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == "pretrained" and not (self.image_model and self.decoder_model) and not self.resume:
            raise UserError("--init pretrained needs --image-model, a file of ResNet weights, and --decoder-model")


CLASSES = (VQAOptions, ViLTOptions, CaptionOptions, CLIPOptions, VoiceOptions, SpokenOptions)
BY_PRESET = {preset: options for options in CLASSES for preset in choices_of(options, "preset")}


def read_command_line(argv: Sequence[str]) -> RunOptions:
    """The options of the system that --preset names, set by its flags.

    `--help` prints the flags and exits. Raises UserError, one line, on an unknown flag or a value that is not allowed.
    """
    with first_rank_speaks():
        options = parse(
            CLASSES,
            PRESETS,
            argv,
            program="train.py",
            about="Train a model that looks at images, to answer, describe or find; or one that hears.",
            example="python train.py --preset book --data vqa2/ --out runs/book",
        )
        if options.seeds is not None and "RANK" in os.environ:
            raise UserError("--seeds runs one process after another: leave out torchrun")
        return options
