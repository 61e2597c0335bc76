"""Edges of command lines for `fuzz.py`: one option of a valid command line has another value."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from fuzz_mutations import LINES, LONG, NUL
from fuzz_places import Place, Places
from fuzz_valid import QUESTION
from run_helpers import command as run_command

import rlhf
import train
from vqa_scratch.__main__ import PROGRAM
from vqa_scratch.options import flag, rules_of
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.systems.options import CLASSES

NUMBERS = (
    "0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "0.5",
    "1e9",
    "nan",
    "inf",
    "-inf",
    str(2**31),
    str(2**63),
    str(2**64),
    "1e999",
)
BYTES = "caf\udce9"  # an argument that is not UTF-8, as Python holds it
TEXTS = ("", " ", "x", NUL, LINES, LONG, BYTES, "é日本語🙂", "-", "--", "*", "%s{}", "'\"", "\x1b[31m")
PATHS = (
    "",
    "missing",
    "a file",
    "a folder",
    NUL,
    LINES,
    LONG,
    BYTES,
    "é 日本語",
    "a file/below",
    "n" * 300,
    "~nobody/x",
)

# Options of a tiny run that may be small numbers: the run is then really made.
SMALL = {
    "vqa": "samples seed eval_questions max_answer_tokens max_question_tokens questions_per_image questions_per_step "
    "test_images log_every save_every eval_every width heads image_layers patch_size warmup_steps max_images "
    "max_questions start_at end_at accumulate min_agreement val_fraction decay_from max_grad_norm learning_rate "
    "flip rotate brightness contrast",
    "vilt": "samples seed eval_questions max_question_tokens questions_per_image image_size patch_size width heads "
    "min_answer_count test_images max_images max_questions accumulate",
    "caption": "samples seed eval_captions eval_questions max_caption_tokens captions_per_step captions_per_image "
    "question_share questions_per_step image_width image_blocks vocabulary test_images max_images width heads flip "
    "rotate brightness contrast",
    "rlhf": "prompts samples max_new_tokens min_new_tokens temperature no_repeat_ngram_size kl_coef kl_target "
    "score_clip max_prompt_tokens eval_prompts eval_samples frontier_prompts frontier_samples seed critic_warmup "
    "minibatches save_every length_weight gamma lam",
}
FEW = ("0", "1", "2", "3", "5", "0.5", "0.01", "33", "1e-9", "-1", "4294967295", str(2**63))


def with_value(flags: list[str], name: str, value: str) -> list[str]:
    """The command line with this option at the end, and not before."""
    spelled = flag(name)
    kept = list(flags)
    if spelled in kept:
        del kept[kept.index(spelled) : kept.index(spelled) + 2]
    return [*kept, spelled, value]


def said(argv: list[Any]) -> list[Any]:
    """The command line as it is, printed so that a fault can name it."""
    print("$", *(repr(str(part)) for part in argv))
    return argv


def command(*argv: Any) -> None:
    run_command(*said(list(argv)))


def edges(places: Places) -> list[Place]:
    """The places whose inputs are command lines."""
    tuning = places.book_flags(places.articles / "news.csv", Path("out"))

    def parse(_: Path, rng: random.Random) -> None:
        """Only read: any value may be given to any option."""
        kind = rng.choice((*CLASSES, RLHFOptions))
        name = rng.choice(list(rules_of(kind)))
        value = rng.choice((*NUMBERS, *TEXTS, *PATHS))
        if kind is RLHFOptions:
            rlhf.read_command_line(said(with_value(tuning, name, value)))
        else:
            system = kind.__name__.removesuffix("Options").lower()
            train.read_command_line(said(with_value(places.flags(system, Path("out")), name, value)))

    def run(folder: Path, rng: random.Random) -> None:
        """A tiny run with one number at an edge."""
        system = rng.choice(("vqa", "vilt", "caption", "rlhf"))
        name, value = rng.choice(SMALL[system].split()), rng.choice(FEW)
        if system == "rlhf":
            known = rules_of(RLHFOptions)
            if name in known:
                rlhf.run(said(with_value(places.book_flags(places.articles / "news.csv", folder / "out"), name, value)))
        else:
            train.main(train.read_command_line(said(with_value(places.flags(system, folder / "out"), name, value))))

    def paths(folder: Path, rng: random.Random) -> None:
        """A path of a tiny run that is something else."""
        system = rng.choice(("vqa", "vilt", "caption", "rlhf"))
        if system == "rlhf":
            names = ("out", "articles", "policy", "reference", "grammar_model", "tone_model", "column", "prefix")
            given = with_value(places.book_flags(places.articles / "news.csv", folder / "out"), rng.choice(names), "")
            rlhf.run(said([*given[:-1], path(folder, rng)]))
        else:
            names = ("out", "data", "cache", "train_split", "val_split", "test_split")
            given = with_value(places.flags(system, folder / "out"), rng.choice(names), path(folder, rng))
            train.main(train.read_command_line(said(given)))

    def commands(folder: Path, rng: random.Random) -> None:
        """One argument of a command that is something else."""
        argv = valid(places, folder)[rng.choice(("ask", "ask", "evaluate", "study", "export", "convert"))]()
        changed = rng.randrange(1, len(argv))
        if str(argv[changed]).startswith("--"):
            changed += 1
        argv[changed] = path(folder, rng) if rng.random() < 0.7 else rng.choice((*TEXTS, *NUMBERS))
        command(*argv)

    def flags_of_commands(folder: Path, rng: random.Random) -> None:
        """A command with one more option, of any value."""
        name = rng.choice(("ask", "ask", "evaluate", "study", "export", "convert"))
        more = [p for p in PROGRAM.get_command(None, name).params if isinstance(p, click.Option)]
        option = rng.choice(more) if more else None
        argv = valid(places, folder)[name]()
        if option is not None:
            argv.append(option.opts[0])
            if not option.is_flag:
                argv.append(rng.choice((*FEW[:7], *TEXTS)))
        command(*argv)

    def file_of_options(folder: Path, rng: random.Random) -> None:
        """`--config FILE` of either program."""
        read = rng.choice((train.read_command_line, rlhf.read_command_line))
        read(said(["--config", str(folder / "options.toml")]))

    nothing = places.root / "nothing"
    nothing.mkdir(exist_ok=True)
    filed = places.root / "filed"
    filed.mkdir(exist_ok=True)
    (filed / "options.toml").write_text('seed = 3\nout = "runs/a"\nweight_decay = 0.1\ndevice = "cpu"\n')
    uses: tuple[tuple[str, Callable[[Path, random.Random], Any], float], ...] = (
        ("options: read", parse, 3),
        ("options: run", run, 0.6),
        ("options: paths", paths, 1),
        ("commands: arguments", commands, 2),
        ("commands: options", flags_of_commands, 1.5),
    )
    written = Place("options: file", filed, ("*.toml",), file_of_options, 0.7)
    return [written, *(Place(name, nothing, (), use, weight) for name, use, weight in uses)]


def path(folder: Path, rng: random.Random) -> str:
    (folder / "a file").write_text("something")
    (folder / "a folder").mkdir(exist_ok=True)
    return rng.choice(PATHS)


def valid(places: Places, folder: Path) -> dict[str, Callable[[], list[Any]]]:
    """A valid command line of every command."""
    run, picture = places.plain["vqa"], places.picture

    def evaluate() -> list[Any]:
        return ["evaluate", own_copy(run, folder), "--data", places.data, "--limit", "4", "--split", "val"]

    return {
        "ask": lambda: ["ask", run, "--image", picture, "--question", QUESTION],
        "evaluate": evaluate,
        "study": lambda: ["study", run, "--image", picture, "--question", QUESTION, "--out", folder / "study"],
        "export": lambda: ["export", run, folder / "exported"],
        "convert": lambda: ["convert", places.checkpoints["resnet"] / "resnet.bin", folder / "out.safetensors"],
    }


def own_copy(run: Path, folder: Path) -> Path:
    """The run in the sandbox, for a command that writes into it."""
    return Path(shutil.copytree(run, folder / "run"))
