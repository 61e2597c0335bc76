"""Benchmarks against the usual alternatives:  python -m bench train-step [--all --write]  or  python -m bench all"""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import torch

from bench import (
    attention,
    binding,
    binding_report,
    cached_features,
    connector_runs,
    connectors,
    connectors_frozen,
    decode,
    decode_sides,
    espeak,
    experts,
    frontier,
    grpo,
    image_loading,
    logprob,
    loss_head,
    nanovlm,
    play,
    ppo,
    prefix,
    quantize,
    resolution,
    scale,
    speak,
    spoken,
    suite,
    t5_bias,
    taps,
    time_to_accuracy,
    train_step,
    voice,
    whisper,
)
from bench.results import command_given, present
from bench.sides import SIDES, Case
from vqa_scratch.command_line import NearChoice, run_program
from vqa_scratch.commands.line import NearGroup, call
from vqa_scratch.connectors import CONNECTORS
from vqa_scratch.errors import UserError
from vqa_scratch.training.precision import pick_device


@click.command("train-step")
@click.option("--precision", type=NearChoice(("fp32", "bf16")), default="fp32", show_default=True, help="Arithmetic.")
@click.option("--questions", type=click.IntRange(1), default=8, show_default=True, help="Questions of a step.")
@click.option("--images", type=click.IntRange(1), default=8, show_default=True, help="Images of a step.")
@click.option("--device", type=NearChoice(("cpu", "cuda")), default="cpu", show_default=True, help="Where to run.")
@click.option("--rounds", type=click.IntRange(1), help="Turns of each side. [5; 3 with 40 questions]")
@click.option("--all", "every", is_flag=True, help="The four cases of the table: fp32 and bf16, 8 and 40 questions.")
@click.option("--side", type=NearChoice(tuple(SIDES)), help="Run this side alone: its time and peak memory.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def train_step_command(
    precision: str,
    questions: int,
    images: int,
    device: str,
    rounds: int | None,
    every: bool,
    side: str | None,
    write: bool,
) -> None:
    """One training step at the book's sizes against the same model assembled from transformers."""
    if questions % images:
        raise UserError(f"--questions {questions} do not divide among --images {images}")
    pick_device(device)
    case = Case(precision, questions, images, device=device)
    if side is not None:
        if every or write:
            raise UserError("--side runs one side alone; it goes with neither --all nor --write")
        print(train_step.run_alone(side, case, rounds or train_step.ROUNDS.get(questions, 3)))
        return
    cases = [replace(c, device=device) for c in train_step.CASES] if every else [case]
    name = "train-step" if device == "cpu" else "train-step-gpu"
    present(name, train_step.run(cases, rounds, command_given()), write, part=not every)


@click.command("prefix")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="Turns of each side.")
@click.option("--questions", type=click.IntRange(8), default=256, show_default=True, help="Questions of a step.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def prefix_command(rounds: int, questions: int, write: bool) -> None:
    """Training steps and answers with an image's prefix shared by its questions, and repeated for each."""
    present("prefix", prefix.run(rounds, questions, command_given()), write)


@click.command("loss-head")
@click.option("--tokens", type=click.IntRange(1), default=2048, show_default=True, help="Labelled tokens.")
@click.option("--width", type=click.IntRange(1), default=768, show_default=True, help="Width of the states.")
@click.option("--vocabulary", type=click.IntRange(2), default=50257, show_default=True, help="Size of the vocabulary.")
@click.option("--precision", type=NearChoice(("fp32", "bf16")), default="fp32", show_default=True, help="Arithmetic.")
@click.option("--device", type=NearChoice(("cpu", "cuda")), default="cpu", show_default=True, help="Where to run.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each side.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def loss_head_command(rounds: int, write: bool, **sizes: int | str) -> None:
    """Linear map and cross-entropy over a large vocabulary: time and peak memory against other ways."""
    case = loss_head.Case(**sizes)
    present(f"loss-head-{case.device}-{case.precision}", loss_head.run(case, rounds, command_given()), write)


@click.command("attention")
@click.option("--seconds", type=click.FloatRange(0), help="After so many, FlexAttention is left out. [no limit]")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def attention_command(seconds: float | None, write: bool) -> None:
    """Attention on a GPU against the best backend of SDPA and FlexAttention."""
    text = attention.run(command_given(), seconds=math.inf if seconds is None else seconds)
    present("attention", text, write)


@click.command("t5-bias")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def t5_bias_command(write: bool) -> None:
    """A T5 encoder on a GPU with its bias looked up by the kernel, against the bias written out."""
    present("t5-bias", t5_bias.run(command_given()), write)


@click.command("logprob")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def logprob_command(write: bool) -> None:
    """Log-probability and entropy of chosen tokens on a GPU against the memory's bandwidth."""
    present("logprob", logprob.run(command_given()), write)


@click.command("decode")
@click.option("--size", type=NearChoice(tuple(decode_sides.SIZES)), default="shapes", show_default=True, help="Model.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Prompts at once.")
@click.option("--beams", type=click.IntRange(1), default=1, show_default=True, help="Beams; 1 is greedy decoding.")
@click.option("--precision", type=NearChoice(("fp32", "bf16")), default="fp32", show_default=True, help="Arithmetic.")
@click.option("--lengths", default="20", show_default=True, help="Tokens of every answer, or 'real' for those of VQA.")
@click.option("--device", type=NearChoice(("cpu", "cuda")), default="cpu", show_default=True, help="Where to run.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Turns of each side.")
@click.option("--all", "every", is_flag=True, help="All cases of the table.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def decode_command(rounds: int, every: bool, write: bool, lengths: str, **sizes: int | str) -> None:
    """Greedy decoding and beam search against transformers' generate."""
    if lengths != "real" and (not lengths.isdecimal() or not 0 < int(lengths) < decode_sides.LONGEST):
        raise UserError(f"--lengths is 'real' or a number from 1 to {decode_sides.LONGEST - 1}, not {lengths!r}")
    cases = [replace(case, device=sizes["device"]) for case in decode.CASES]
    text = decode.run(cases if every else [decode_sides.Case(lengths=lengths, **sizes)], rounds, command_given())
    present(f"decode-{sizes['device']}", text, write, part=not every)


@click.command("cached-features")
@click.option("--precision", type=NearChoice(("fp32", "bf16")), default="fp32", show_default=True, help="Arithmetic.")
@click.option("--connector", type=NearChoice(tuple(CONNECTORS)), default="mean", show_default=True, help="Its kind.")
@click.option("--questions", type=click.IntRange(1), default=8, show_default=True, help="Questions of a step.")
@click.option("--images", type=click.IntRange(1), default=8, show_default=True, help="Images of a step.")
@click.option("--device", type=NearChoice(("cpu", "cuda")), default="cpu", show_default=True, help="Where to run.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each side.")
@click.option("--all", "every", is_flag=True, help="Both precisions, two connectors, and a part of `book`.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def cached_features_command(rounds: int, every: bool, write: bool, **sizes: int | str) -> None:
    """A training step with frozen encoders: cached features against recomputing them."""
    case = cached_features.Case(**sizes)
    if case.questions % case.images:
        raise UserError(f"--questions {case.questions} do not divide among --images {case.images}")
    cases = cached_features.cases(case) if every else [case]
    present("cached-features", cached_features.run(cases, rounds, command_given()), write, part=not every)


@click.command("connectors")
@connector_runs.run_options("runs/connectors")
@click.option("--only", help="These connectors alone, with commas between them.")
@click.option("--frozen", is_flag=True, help="Between towers trained before: frozen, and trained on.")
@click.option("--tower-steps", type=click.IntRange(1), help="With --frozen: steps of each tower. [as --steps]")
@click.option("--pointed", type=click.IntRange(1), default=200, show_default=True, help="Maps held to their object.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md, it and the picture into docs/.")
def connectors_command(
    frozen: bool,
    tower_steps: int | None,
    seeds: str,
    write: bool,
    **values: int | str | Path | None,
) -> None:
    """Every connector trained on the same questions: what it learns and what it costs. Finished runs are kept."""
    if tower_steps is not None and not frozen:
        raise UserError("--tower-steps goes with --frozen, which starts from towers")
    if write and values["only"] is not None:
        raise UserError("--write is for the whole table: leave out --only; runs that are finished are kept")
    plan = connector_runs.Plan(seeds=connector_runs.read_seeds(seeds), **values)
    if frozen:
        made = connectors_frozen.run(plan, tower_steps or plan.steps, command_given())
        connectors.present("connectors-frozen", made, plan.out, write)
    else:
        connectors.present("connectors", connectors.run(plan, command_given()), plan.out, write)


@click.command("experts")
@connector_runs.run_options("runs/experts")
@click.option("--write", is_flag=True, help="Put the tables into bench/RESULTS.md.")
def experts_command(seeds: str, write: bool, **values: int | str | Path | None) -> None:
    """Experts in place of MLPs, trained on the same questions: what they learn and cost. Finished runs are kept."""
    plan = connector_runs.Plan(seeds=connector_runs.read_seeds(seeds), **values)
    present("experts", experts.run(plan, command_given()), write)


@click.command("image-loading")
@click.option("--images", type=click.IntRange(1), default=512, show_default=True, help="JPEGs of 640 x 480 to load.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each side.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def image_loading_command(images: int, rounds: int, write: bool) -> None:
    """Images of a batch, second epoch on, against torchvision's decode and resize."""
    present("image-loading", image_loading.run(images, rounds, command_given()), write)


@click.command("resolution")
@click.option("--steps", type=click.IntRange(1), default=2000, show_default=True, help="Steps of 192 questions.")
@click.option("--width", type=click.IntRange(4), default=128, show_default=True, help="Width of the decoder.")
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True, help="Layers of the decoder.")
@click.option("--scenes", type=click.IntRange(400), default=6_000, show_default=True, help="Scenes to train on.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def resolution_command(write: bool, **sizes: int) -> None:
    """The connector `patches` at sizes it was never trained on, with newline tokens and without."""
    present("resolution", resolution.run(resolution.Experiment(**sizes), command_given()), write)


@click.command("scale")
@click.option("--write", is_flag=True, help="Put the tables into docs/scale.md.")
def scale_command(write: bool) -> None:
    """Bytes of memory and bytes sent a step, counted from the models; nothing is timed."""
    present("scale", scale.text(command_given()), write, scale.PAGE)


@click.command("ppo")
@click.option("--trl", help="Python of an environment with trl==0.11.4 and transformers==4.45.2.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Articles of an iteration.")
@click.option("--tokens", type=click.IntRange(1), default=400, show_default=True, help="Tokens of an article.")
@click.option("--new", type=click.IntRange(1), default=24, show_default=True, help="Tokens of a response.")
@click.option("--epochs", type=click.IntRange(1), default=4, show_default=True, help="Passes over a rollout.")
@click.option("--micro", type=click.IntRange(1), help="Our articles at once in the update, for all of ours.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Iterations of each side.")
@click.option("--only", default="", help="Run only sides whose name contains this.")
@click.option("--tiny", is_flag=True, help="Tiny models, to try the benchmark itself.")
@click.option("--out", type=click.Path(path_type=Path), help="Every figure, as JSON.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def ppo_command(out: Path | None, write: bool, **plan: int | str | bool | None) -> None:
    """One iteration of PPO at the book's sizes against TRL 0.11.4."""
    if write and (plan["tiny"] or plan["only"]):
        raise UserError("--write goes with neither --tiny nor --only: the table is of all sides at the book's sizes")
    present("ppo", ppo.run(ppo.Plan(**plan), command_given(), out), write)


@click.command("quantize")
@click.option("--run", "folder", type=click.Path(path_type=Path), default="runs/vqa", show_default=True, help="Scored.")
@click.option("--questions", type=click.IntRange(1), default=5000, show_default=True, help="Validation questions.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Turns of each side.")
@click.option("--write", is_flag=True, help="Put the tables into bench/RESULTS.md.")
def quantize_command(folder: Path, questions: int, rounds: int, write: bool) -> None:
    """Quantised weights: bytes, tokens a second, and what they cost a trained run in answers."""
    present("quantize", quantize.run(folder, questions, rounds, command_given()), write)


@click.command("binding")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs that differ in their seed.")
@click.option("--variant", type=NearChoice(binding.VARIANTS), multiple=True, help="May be given several times. [all]")
@click.option("--words", type=click.IntRange(2, 3), default=2, show_default=True, help="Invented words of an episode.")
@click.option("--steps", type=click.IntRange(1), help="Of the last stage. [that of the table]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/binding"), show_default=True, help="Folder.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md, and the pictures into docs/images.")
def binding_command(seeds: int, variant: tuple[str, ...], out: Path, write: bool, **sizes: int | None) -> None:
    """What shots are worth to a small Flamingo that binds invented words to pictures in context."""
    if write and variant:
        raise UserError("--write is for the whole table: leave out --variant; stages that are finished are kept")
    plan = binding.Plan(**{name: value for name, value in sizes.items() if value is not None})
    pictures = binding_report.IMAGES if write else out
    names = [name for name in binding.VARIANTS if not variant or name in variant]
    present("binding", binding_report.run(plan, range(seeds), names, out, pictures, command_given()), write)


@click.command("all")
@click.option("--only", multiple=True, help="Run this benchmark alone; may be given several times.")
@click.option("--skip", multiple=True, help="Leave this benchmark out; may be given several times.")
@click.option("--trl", help="Python of an environment with TRL 0.11.4, for ppo.")
@click.option("--trl-current", help="Python of an environment with the current TRL, for grpo.")
@click.option("--write", is_flag=True, help="Put every table where it belongs.")
def all_command(
    only: tuple[str, ...], skip: tuple[str, ...], trl: str | None, trl_current: str | None, write: bool
) -> None:
    """Every benchmark of a CPU, or of a GPU where there is one, and a table of what was reached."""
    plan = dict(suite.GPU if torch.cuda.is_available() else suite.CPU)
    for name in (*only, *skip):
        if name not in plan:
            raise UserError(f"{name} is no benchmark of this machine; there are {', '.join(plan)}")
    plan = {name: options for name, options in plan.items() if (not only or name in only) and name not in skip}
    if not plan:
        raise UserError("--only and --skip leave no benchmark to run")
    for flag, name, python in (("--trl", "ppo", trl), ("--trl-current", "grpo", trl_current)):
        if python is not None and name not in plan:
            raise UserError(f"{flag} is for {name}, which does not run here")
        if python is not None:
            plan[name] = [*plan[name], "--trl", python]
    reached, failed = suite.run_all(plan, write)
    print(f"\n{reached}")
    if failed:
        raise UserError(f"{len(failed)} of {len(plan)} benchmarks failed: {', '.join(failed)}")


# A further benchmark is imported above and added here.
COMMANDS = [
    train_step_command,
    decode_command,
    loss_head_command,
    attention_command,
    t5_bias_command,
    logprob_command,
    taps.command,
    prefix_command,
    nanovlm.command,
    cached_features_command,
    connectors_command,
    experts_command,
    image_loading_command,
    ppo_command,
    frontier.command,
    grpo.command,
    resolution_command,
    scale_command,
    spoken.command,
    espeak.command,
    binding_command,
    quantize_command,
    speak.command,
    voice.command,
    play.command,
    time_to_accuracy.command,
    whisper.command,
    all_command,
]
PROGRAM = NearGroup("bench", {command.name: command for command in COMMANDS}, help="Measure, side by side.")


def main(argv: Sequence[str]) -> None:
    """Run what the command line asks for, and end the process."""
    run_program(lambda: call(PROGRAM, argv, "python -m bench"))


if __name__ == "__main__":
    main(sys.argv[1:])
