"""Tune a language model by PPO, RLOO, GRPO or DPO against a frozen reference, and report the result.

    python rlhf.py                                   # made-up news, all three steps, minutes on two cores
    python rlhf.py --preset book --articles news.csv # flan-t5-small with two RoBERTa reward models
    python rlhf.py --preset lm --policy ./gpt2 --data prompts.jsonl --reward mine.py:score   # a GPT-2, Llama, Qwen2 ...
    python rlhf.py --preset vqa --policy runs/vqa    # a run of train.py, rewarded by the official VQA accuracy
    python rlhf.py --resume                          # go on after a kill
    torchrun --nproc-per-node 8 rlhf.py ...          # one process a GPU; docs/scale.md

A run is written to runs/rlhf-PRESET, or to the folder --out.

One iteration is `iterate`, below; its parts are in vqa_scratch/rl/ppo.py and update.py.
"""

from vqa_scratch.command_line import count_seconds, read_first, run_program
from vqa_scratch.rl.options import RLHFOptions, read_command_line

# ruff: noqa: E402 -- the command line is read before torch is imported, so that --help and a wrong flag answer at once
if __name__ == "__main__":
    OPTIONS = read_first(read_command_line)
    count_seconds("rlhf.py")

import shlex
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.options import to_json
from vqa_scratch.report.curves import draw_panels
from vqa_scratch.rl import evaluate, report
from vqa_scratch.rl.language import language_task
from vqa_scratch.rl.metrics import rollout_metrics
from vqa_scratch.rl.policy import ActorCritic
from vqa_scratch.rl.ppo import PPO, check_ranks
from vqa_scratch.rl.ranks import Copies
from vqa_scratch.rl.resume import PROGRAM, begin_or_go_on, fingerprint, prompt_hashes, restore
from vqa_scratch.rl.tasks import Task, summarising_task
from vqa_scratch.rl.trial import trial
from vqa_scratch.rl.types import Prompt
from vqa_scratch.storage import write_json, write_text
from vqa_scratch.systems.finals import what_next
from vqa_scratch.systems.policy import vqa_task
from vqa_scratch.training.allocator import keep_freed_memory
from vqa_scratch.training.checkpoint import fitting, rng_state, save_checkpoint
from vqa_scratch.training.launch import start
from vqa_scratch.training.precision import Precision, formats, pick_device
from vqa_scratch.training.profile import profiling
from vqa_scratch.training.progress import Display, MetricsLog, Redrawn
from vqa_scratch.training.ranks import World
from vqa_scratch.training.resume import held
from vqa_scratch.training.sharing import check_sharing, share_model
from vqa_scratch.training.threads import Threads, choose_way, thread_counts
from vqa_scratch.training.watch import GracefulStop

TASKS = {"mini-news": summarising_task, "book": summarising_task, "lm": language_task, "vqa": vqa_task}


def iterate(ppo: PPO) -> dict[str, float]:
    """One iteration, top to bottom; returns its log under the usual names. docs/ppo.md numbers the details."""
    update, start = ppo.update, time.perf_counter()

    # Rollout: responses to each prompt, a reward for each, log-probabilities under the policy and the frozen reference.
    prompts = ppo.stream.next()
    rollout = ppo.ranks.with_whole_model(lambda: ppo.rollout(prompts))
    rolled = time.perf_counter()

    # Advantages: each token pays for its KL, the last one earns the score. DPO: the chances to be preferred.
    trajectory = ppo.advantages(rollout)
    judged = time.perf_counter()
    log = rollout_metrics(trajectory, rollout.samples, rollout.raw, rollout.parts) | rollout.seconds
    measured = time.perf_counter()

    # Epochs of minibatches: clipped steps on the same responses, until the policy has moved too far.
    update.begin(ppo.iteration, ppo.kl.coef)
    for minibatch in update.minibatches():
        moved = update.add_gradients(minibatch, prompts, trajectory, rollout.context)
        if update.too_far(moved):
            break
        update.step()

    # Adapt the price of KL towards the target.
    log |= update.log() | {"objective/kl_coef": ppo.kl.coef}
    ppo.kl.update(log["objective/kl_exact"], len(trajectory.ids))
    ppo.iteration += 1

    end = time.perf_counter()
    log |= {
        "time/ppo/compute_advantages": judged - rolled,
        "time/ppo/calc_stats": measured - judged,
        "time/ppo/optimize_step": end - measured,
        "time/ppo/total": end - start,
        "rollouts_per_second": len(trajectory.ids) / (end - start),
        "tokens_per_second": float(trajectory.mask.sum()) / (end - start),
    }
    return log


def train(
    ppo: PPO,
    task: Task,
    options: RLHFOptions,
    threads: Threads,
    about: dict[str, Any],
    saved: dict[str, Any] | None,
    started: float,
) -> tuple[MetricsLog, float, int | None]:
    """All iterations, with bar, metrics and checkpoints.

    Returns the log, the seconds before this call's start, and the number of the signal that stopped it early, if any.
    `about` describes the run in every checkpoint.
    """
    last, world = options.out / "checkpoints" / "last.pt", ppo.world
    earlier = restore(ppo, saved, about) if saved else 0.0
    if world.main:
        write_json(options.out / "config.json", {"program": PROGRAM} | to_json(options))
    if not saved:
        ppo.ranks.with_whole_model(lambda: ppo.fit_reward_scale(task.train))
    world.check_same(ppo.iteration, f"the last iteration in {options.out}")
    resume_after = ppo.iteration if saved else None
    log = MetricsLog(options.out / "metrics.jsonl", resume_after, on_disk=world.main, also=options.log_to)
    with fitting(log.path):  # what is wrong with the rows of a resumed run shows now, not when curves are drawn
        report.panels(log.rows, [part.name for part in ppo.reward.parts])

    def save() -> None:
        seconds = earlier + time.perf_counter() - started
        state = {"ppo": ppo.state_dict(), "rng": rng_state(), "seconds": seconds}
        if world.main:
            save_checkpoint(last, state | about)

    title = "3 of 3: PPO" if options.preset == "mini-news" else options.algorithm
    shown = {"desc": title, "unit": "it", "dynamic_ncols": True, "file": Display()}
    bar = tqdm(total=options.iterations, initial=ppo.iteration, **shown)
    profiled = profiling(iterate, options.profile, options.out / "trace.json", world.main)
    with bar, Redrawn(bar.refresh), GracefulStop() as stop, profiled as step:  # an iteration may take many seconds
        while ppo.iteration < options.iterations:
            figures = step(ppo)
            ended = time.perf_counter()
            threads.look(options.prompts * options.samples, ended - figures["time/ppo/total"], ended)
            log.write(ppo.iteration, threads=torch.get_num_threads(), **figures)
            bar.update()
            bar.set_postfix_str(
                f"reward {figures['env/reward_mean']:+.2f}, KL {figures['objective/kl_exact']:.2f}, "
                f"finished {figures['finish']:.0%}, {figures['rollouts_per_second']:.0f} rollouts/s"
            )
            stopped = stop.elected(world.totals(stop.votes()))
            if stopped is not None or ppo.iteration % options.save_every == 0:
                save()
            if stopped is not None:
                return log, earlier, stopped
    save()
    return log, earlier, None


def conclude(ppo: PPO, task: Task, options: RLHFOptions, log: MetricsLog) -> dict[str, Any]:
    """Measure before and after on held-out prompts and write every report. Returns the summary."""
    prompts, k, seed = task.held_out[: options.eval_prompts], options.eval_samples, options.seed + 10
    before, after = (
        evaluate.measure(ppo, policy, prompts, k, seed, task.figures, task.greedy)
        for policy in (task.reference, ppo.actor.backbone)
    )
    few = prompts[: options.frontier_prompts]
    curve = evaluate.reference_frontier(ppo, few, options.frontier_samples, seed + 1)
    # On the prompts of the curve; with four samples each the share would be off by up to 0.04.
    mine = evaluate.measure(ppo, ppo.actor.backbone, few, max(k, 16), seed)
    gain = float(mine.rewards.mean())
    rates = [row["rollouts_per_second"] for row in log.rows if "rollouts_per_second" in row]
    summary = {
        **before.summary("before"),
        **after.summary("after"),
        "kl": after.kl,
        "rollouts_per_second": sorted(rates)[len(rates) // 2] if rates else None,
        "frontier_share": curve.share(mine.kl, curve.reward[0], gain),
        "frontier_kl_limit": curve.limit,
        "frontier": {"kl": curve.kl, "reward": curve.reward, "reached": [mine.kl, gain]},
        "best_of_n": [{"n": n, "kl_bound": kl, "reward": reward} for n, kl, reward in curve.best_of_n],
        "prompts_held_out": len(prompts),
        "iterations": ppo.iteration,
        "algorithm": options.algorithm,
    }
    parts = [part.name for part in ppo.reward.parts]
    draw_panels(options.out / "curves.png", report.panels(log.rows, parts), columns=3)
    report.frontier(curve, log.rows, before, after, options.out / "frontier.png")
    report.write_samples(options.out / "samples.html", summary, before, after, k)
    task.save(options.out / "policy")
    return summary


def main(options: RLHFOptions) -> dict[str, Any] | int:
    """Run it all; returns what summary.json holds (nothing on ranks other than the main one), or the number of the
    signal that stopped it early."""
    with start(options.device) as world, held(options.out, options.resume, PROGRAM, world):
        return work(options, world)


def work(options: RLHFOptions, world: World) -> dict[str, Any] | int:
    """`main` on one rank."""
    started = time.perf_counter()
    keep_freed_memory()
    options, saved = begin_or_go_on(options)
    if options.algorithm == "ppo" and options.iterations <= options.critic_warmup:
        print(f"the policy does not learn: --critic-warmup {options.critic_warmup} leaves it no iteration")
    check_ranks(options, world)
    torch.manual_seed(options.seed)
    device = pick_device(options.device)
    if device.type == "mps":  # chosen by auto; it lacks float64, in which statistics are summed
        device = torch.device("cpu")
    kinds = formats(saved["precision"] if saved else options.precision, device)
    precision = Precision(kinds[0], device)
    check_sharing(options.parallel, precision)
    with world.first_one_then_all():  # the first trains what mini-news needs
        task = TASKS[options.preset](options, device, precision.dtype)
    for note in task.notes:
        print(note)
    actor = ActorCritic(task.policy).to(device)
    threads = Threads(thread_counts(options.threads, device, fixed=world.size > 1), "rollouts")
    precision, why = choose_way(kinds, threads, device, partial(trial, task, actor, options), world)
    task.stored_in(precision.dtype)
    print(why + (f", {world.size} ranks, {options.parallel}" if world.size > 1 else ""))
    saved = task.upgrade(saved) if saved else None
    about = {"precision": precision.kind, "reference": fingerprint(task.reference), "prompts": prompt_hashes(task)}
    world.check_same(about["reference"], "the hash of the reference model")
    ranks = share_model(options.parallel, actor, world, precision, Copies, frozen=[task.reference])
    ppo = PPO(
        options, actor, task.reference, task.reward, task.train, task.rules, task.decode, precision.autocast, ranks
    )
    log, earlier, stopped = train(ppo, task, options, threads, about, saved, started)
    if stopped is not None:
        again = f"python rlhf.py --preset {options.preset} --out {shlex.quote(str(options.out))} --resume"
        print(f"stopped by signal {stopped} after iteration {ppo.iteration}; resume with: {again}")
        return stopped
    summary = ranks.with_whole_model(lambda: conclude(ppo, task, options, log) if world.main else {})
    if not world.main:
        return {}
    summary["seconds"] = earlier + time.perf_counter() - started
    write_json(options.out / "summary.json", summary)
    show(summary, options)
    print(*what_next_for(task.held_out[0], options), sep="\n")
    return summary


def what_next_for(prompt: Prompt, options: RLHFOptions) -> list[str]:
    """What to do with a finished run, for a held-out prompt: a question, or an article, which goes into a file."""
    folder = options.out
    if isinstance(prompt.payload, VQASample):
        return what_next(folder / "policy", prompt.payload)
    if options.preset == "lm":  # a prompt may be a conversation, or written by a template already
        command = ["ask", str(folder)]
    else:
        write_text(folder / "article.txt", prompt.text + "\n")
        command = ["study", str(folder), "--text", str(folder / "article.txt"), "--out", str(folder / "study")]
    return ["next:", "  " + shlex.join(["python", "-m", "vqa_scratch", *command])]


def show(s: dict[str, float], options: RLHFOptions) -> None:
    """The few lines that matter."""
    rise = (s["reward_after"] - s["reward_before"]) / max(s["reward_std_before"], 1e-9)
    print(f"reward {s['reward_before']:+.3f} -> {s['reward_after']:+.3f} ({rise:+.2f} of its starting deviation)")
    print(f"exact KL {s['kl']:.2f} nats a response; {s['frontier_share']:.0%} of the best possible gain at that KL")
    print(f"finished {s['finish_before']:.0%} -> {s['finish_after']:.0%}", end="")
    if "overlap_before" in s:
        print(f"; overlap with the reference summaries {s['overlap_before']:.3f} -> {s['overlap_after']:.3f}", end="")
    if "facts_kept_before" in s:
        print(
            f"\nall facts kept by {s['facts_kept_before']:.1%} -> {s['facts_kept_after']:.1%} of the responses", end=""
        )
    if "greedy_accuracy_before" in s:
        print(f"\nofficial accuracy of greedy answers to {s['prompts_held_out']:,} new questions ", end="")
        print(f"{s['greedy_accuracy_before']:.3f} -> {s['greedy_accuracy_after']:.3f}", end="")
    if "holdout_accuracy_before" in s:
        print(f"; hold-out {s['holdout_accuracy_before']:.3f} -> {s['holdout_accuracy_after']:.3f}", end="")
    if "greedy_reward_before" in s:
        print(f"; greedy reward {s['greedy_reward_before']:+.3f} -> {s['greedy_reward_after']:+.3f}", end="")
    rate = s["rollouts_per_second"]  # None if the log of a resumed run is lost
    print(f"\n{s['seconds']:.0f} s{'' if rate is None else f', {rate:.0f} rollouts/s'}; see {options.out}/samples.html")
    if s.get("facts_kept_after", 1) < s.get("facts_kept_before", 0) - 0.01 and options.reward is None:
        print("the rewards do not pay enough for the facts: raise --facts-weight")
    if rise <= 0:
        print(
            "the reward did not rise: more --iterations, or a lower price of KL (--kl-coef), give the policy more room"
        )


def run(argv: Sequence[str]) -> dict[str, Any] | int:
    """`main` for a command line."""
    return main(read_command_line(argv))


if __name__ == "__main__":
    run_program(main, OPTIONS)
