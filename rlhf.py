"""Tune a language model by PPO with a KL penalty against a frozen reference, and show what it did.

    python rlhf.py                                   # made-up news, all three steps, minutes on two cores
    python rlhf.py --preset book --articles news.csv # flan-t5-small with two RoBERTa reward models
    python rlhf.py --preset vqa --policy runs/vqa    # a run of train.py, rewarded by the official VQA accuracy
    python rlhf.py --resume                          # go on after a kill, with the flags it was begun with
    torchrun --nproc-per-node 8 rlhf.py ...          # one process a GPU; docs/scale.md

A run lies in runs/rlhf-PRESET unless --out says otherwise.

The loop itself is `PPO.step` in vqa_scratch/rl/ppo.py; this file wires it to a task, a bar, checkpoints and a report.
"""

import sys

from vqa_scratch.command_line import errors_in_one_line, run_program
from vqa_scratch.rl.options import RLHFOptions, read_command_line

# ruff: noqa: E402 -- the command line is read before torch is imported, so that --help and a wrong flag answer at once
if __name__ == "__main__":
    with errors_in_one_line():
        OPTIONS = read_command_line(sys.argv[1:])

import copy
import dataclasses
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from vqa_scratch.run import load_run, save_parts, save_weights
from vqa_scratch.training.evaluation import check_room

from vqa_scratch.options import to_json
from vqa_scratch.rl import evaluate, report
from vqa_scratch.rl.policy import ActorCritic, SamplingRules, freeze
from vqa_scratch.rl.ppo import PPO
from vqa_scratch.rl.ranks import Copies
from vqa_scratch.rl.resume import fingerprint, last_checkpoint, restore
from vqa_scratch.rl.rewards import RewardPart, RewardSum, length_penalty
from vqa_scratch.rl.tasks import Task, book_task, mini_news_task
from vqa_scratch.rl.vqa_policy import VQAPolicy, check_answers, official_accuracy, prompts_from
from vqa_scratch.storage import remove_unfinished, write_json, write_text, write_whole
from vqa_scratch.systems.questions import read_splits
from vqa_scratch.training.allocator import keep_freed_memory
from vqa_scratch.training.checkpoint import rng_state, save_checkpoint
from vqa_scratch.training.launch import start
from vqa_scratch.training.precision import Precision, pick_device, pick_precision
from vqa_scratch.training.progress import MetricsLog
from vqa_scratch.training.ranks import World
from vqa_scratch.training.sharing import check_sharing, share_model
from vqa_scratch.training.watch import GracefulStop


def vqa_task(config: RLHFOptions, device: torch.device, precision: torch.dtype) -> Task:
    """A run of train.py as policy; its training questions as prompts, those of its test split held out."""
    run = load_run(Path(config.policy), device)
    if config.data:
        run.config = dataclasses.replace(run.config, data=config.data)
    splits = read_splits(run.config).samples
    draw = random.Random(config.seed)
    held_out = draw.sample(splits["test"], min(config.eval_prompts, len(splits["test"])))
    for what, samples in (("train", splits["train"]), ("test", held_out)):
        check_answers(samples, f"the {what} split")
    questions = {sample.question for sample in (*splits["train"], *held_out)}
    longest = max(len(run.encoder.prompt(question)) for question in questions) + 1  # with the start token
    check_room(run.model.decoder, longest, config.max_new_tokens)
    policy = VQAPolicy(run.model, run.encoder, run.processor)
    parts = [RewardPart("accuracy", 1.0, official_accuracy)]
    if config.length_weight:
        parts.append(RewardPart("shortness", config.length_weight, length_penalty))
    tokenizer, size = run.encoder.decoder, run.model.decoder.config.vocab_size
    barred = torch.arange(size, device=device) >= len(tokenizer)
    barred[[i for i in (tokenizer.pad_id, tokenizer.bos_id) if i is not None and i != policy.eos_id]] = True

    def save(folder: Path) -> None:
        save_parts(folder, run.config, run.model, run.encoder, run.processor)
        save_weights(folder / "model.safetensors", run.model)

    return Task(
        policy,
        freeze(copy.deepcopy(policy), precision),
        RewardSum(parts),
        prompts_from(splits["train"], run.encoder),
        prompts_from(held_out, run.encoder),
        SamplingRules(
            policy.eos_id,
            config.max_new_tokens,
            config.min_new_tokens,
            config.temperature,
            barred,
            config.no_repeat_ngram_size,
        ),
        lambda ids: tokenizer.decode(ids).strip(),
        save,
    )


TASKS = {"mini-news": mini_news_task, "book": book_task, "vqa": vqa_task}


def train(
    ppo: PPO, task: Task, config: RLHFOptions, about: dict[str, Any], saved: dict[str, Any] | None, started: float
) -> tuple[MetricsLog, float, int | None]:
    """All iterations, with bar, metrics and checkpoints.

    Returns the log, the seconds before this call's start, and the number of the signal that stopped it early, if any.
    `about` is what every checkpoint says of its run.
    """
    last, world = config.out / "checkpoints" / "last.pt", ppo.world
    earlier = restore(ppo, saved, about["reference"]) if saved else 0.0
    if world.main:
        remove_unfinished(config.out)  # what a kill left
    if not saved:
        if world.main:
            write_json(config.out / "config.json", {"program": "rlhf.py"} | to_json(config))
        ppo.ranks.with_whole_model(lambda: ppo.fit_reward_scale(task.train))
    world.check_same(ppo.iteration, f"the last iteration in {config.out}")
    resume_after = ppo.iteration if saved else None
    log = MetricsLog(config.out / "metrics.jsonl", resume_after, on_disk=world.main)

    def save() -> None:
        seconds = earlier + time.perf_counter() - started
        state = {"ppo": ppo.state_dict(), "rng": rng_state(), "seconds": seconds}
        if world.main:
            save_checkpoint(last, state | about)

    title = "3 of 3: PPO" if config.preset == "mini-news" else config.algorithm
    bar = tqdm(total=config.iterations, initial=ppo.iteration, desc=title, unit="it", dynamic_ncols=True)
    with bar, GracefulStop() as stop:
        while ppo.iteration < config.iterations:
            figures = ppo.step()
            log.write(ppo.iteration, **figures)
            bar.update()
            bar.set_postfix_str(
                f"reward {figures['env/reward_mean']:+.2f}, KL {figures['objective/kl_exact']:.2f}, "
                f"finished {figures['finish']:.0%}, {figures['rollouts_per_second']:.0f} rollouts/s"
            )
            stopped = stop.elected(world.totals(stop.votes()))
            if stopped is not None or ppo.iteration % config.save_every == 0:
                save()
            if stopped is not None:
                return log, earlier, stopped
    save()
    return log, earlier, None


def conclude(ppo: PPO, task: Task, config: RLHFOptions, log: MetricsLog) -> dict[str, float]:
    """Measure before and after on held-out prompts and write every report. Returns the summary."""
    prompts, k, seed = task.held_out[: config.eval_prompts], config.eval_samples, config.seed + 10
    before = evaluate.measure(ppo, task.reference, prompts, k, seed, task.figures)
    after = evaluate.measure(ppo, ppo.actor.backbone, prompts, k, seed, task.figures)
    few = prompts[: config.frontier_prompts]
    curve = evaluate.reference_frontier(ppo, few, config.frontier_samples, seed + 1)
    # On the prompts of the curve, so that both gains are of the same prompts.
    mine = after if len(few) == len(prompts) else evaluate.measure(ppo, ppo.actor.backbone, few, k, seed)
    gain = float(mine.rewards.mean())
    rates = [row["rollouts_per_second"] for row in log.rows]
    summary = {
        "reward_before": float(before.rewards.mean()),
        "reward_after": float(after.rewards.mean()),
        "kl": after.kl,
        **before.summary("before"),
        **after.summary("after"),
        "rollouts_per_second": sorted(rates)[len(rates) // 2],
        "frontier_share": curve.share(mine.kl, curve.reward[0], gain),
        "frontier_kl_limit": curve.limit,
        "best_of_n": [{"n": n, "kl_bound": kl, "reward": reward} for n, kl, reward in curve.best_of_n],
        "prompts_held_out": len(prompts),
        "algorithm": config.algorithm,
    }
    parts = [part.name for part in ppo.reward.parts]
    write_whole(config.out / "curves.png", lambda path: report.curves(log.rows, parts, path))
    write_whole(config.out / "frontier.png", lambda path: report.frontier(curve, log.rows, before, after, path))
    write_text(config.out / "samples.html", report.samples_page(before, after, k))
    task.save(config.out / "policy")
    return summary


def main(config: RLHFOptions) -> dict[str, float] | int:
    """Run it all; returns what summary.json holds (nothing on ranks other than the main one), or the number of the
    signal that stopped it early."""
    with start(config.device) as world:
        return work(config, world)


def work(config: RLHFOptions, world: World) -> dict[str, float] | int:
    """`main`, as one of the ranks that torchrun started, or as the only one."""
    started = time.perf_counter()
    keep_freed_memory()
    saved = last_checkpoint(config)
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    if device.type == "mps":  # of auto; statistics are summed in float64, which it lacks
        device = torch.device("cpu")
    wanted = saved["precision"] if saved else config.precision
    kind, why = world.of_main(pick_precision(wanted, device))  # it may be measured, and must stay the same
    precision = Precision(kind, device)
    check_sharing(config.parallel, precision)
    print(why + (f", {world.size} ranks, {config.parallel}" if world.size > 1 else ""))
    with world.first_one_then_all():  # the first trains what mini-news needs
        task = TASKS[config.preset](config, device, precision.dtype)
    for note in task.notes:
        print(note)
    if config.algorithm == "ppo" and config.iterations <= config.critic_warmup:
        print(f"the policy does not learn: --critic-warmup {config.critic_warmup} leaves it no iteration")
    about = {"config": to_json(config), "precision": kind, "reference": fingerprint(task.reference)}
    world.check_same(about["reference"], "the hash of the reference model")
    actor = ActorCritic(task.policy).to(device)
    ranks = share_model(config.parallel, actor, world, precision, Copies, frozen=[task.reference])
    ppo = PPO(
        config, actor, task.reference, task.reward, task.train, task.rules, task.decode, precision.autocast, ranks
    )
    log, earlier, stopped = train(ppo, task, config, about, saved, started)
    if stopped is not None:
        print(f"stopped by signal {stopped} after iteration {ppo.iteration}; go on with the same flags and --resume")
        return stopped
    summary = ranks.with_whole_model(lambda: conclude(ppo, task, config, log) if world.main else {})
    if not world.main:
        return {}
    summary["seconds"] = earlier + time.perf_counter() - started
    write_json(config.out / "summary.json", summary)
    show(summary, config)
    return summary


def show(s: dict[str, float], config: RLHFOptions) -> None:
    """The few lines that matter."""
    rise = (s["reward_after"] - s["reward_before"]) / max(s["reward_std_before"], 1e-9)
    print(f"reward {s['reward_before']:+.3f} -> {s['reward_after']:+.3f} ({rise:+.2f} of its starting deviation)")
    print(f"exact KL {s['kl']:.2f} nats a response; {s['frontier_share']:.0%} of the best possible gain at that KL")
    print(f"finished {s['finish_before']:.0%} -> {s['finish_after']:.0%}", end="")
    if "overlap_before" in s:
        print(f"; overlap with the reference summaries {s['overlap_before']:.3f} -> {s['overlap_after']:.3f}", end="")
    print(f"\n{s['seconds']:.0f} s, {s['rollouts_per_second']:.0f} rollouts/s; see {config.out}/samples.html")


def run(argv: Sequence[str]) -> dict[str, float] | int:
    """`main` for a command line."""
    return main(read_command_line(argv))


if __name__ == "__main__":
    run_program(lambda: main(OPTIONS))
