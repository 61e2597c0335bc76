"""PPO on two ranks against one process: the same rollouts, decisions, weights and log; and what ends one ends all."""

import functools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from vqa_helpers import Ended, Started

from vqa_scratch.errors import UserError
from vqa_scratch.training.checkpoint import load_checkpoint
from vqa_scratch.training.ranks import Alone, World

# Five prompts are two and three; minibatches of one prompt leave one of two ranks without any. The critic's warm-up
# leaves most gradients undefined on all ranks, the early stop is a decision, and whitening looks at all rows.
TINY = "--sft-steps 4 --reward-steps 4 --prompts 5 --minibatches 5 --samples 2 --max-new-tokens 8 --eval-prompts 3"
TINY += " --eval-samples 1 --frontier-prompts 2 --frontier-samples 2 --precision fp32 --device cpu --iterations 6"
TINY += " --save-every 2 --epochs 2 --kl-target 0.5 --whiten-rewards --entropy-coef 0.01 --early-stop-kl 0.002"
TINY += " --learning-rate 0.003 --critic-warmup 1"


def program(argv: list[str], prepare=None) -> None:
    import rlhf
    from vqa_scratch.command_line import run_program

    if prepare is not None:
        prepare()
    run_program(lambda: rlhf.run(argv))


def at_iteration(rank: int, number: int, then) -> None:
    """On that rank, call `then` in the middle of the iteration: after its rollout, before its update."""
    from vqa_scratch.rl.update import Update

    begin = Update.begin

    def watched(self, iteration, kl_coef):
        if iteration + 1 == number and self.ranks.world.rank == rank:
            then()
        begin(self, iteration, kl_coef)

    Update.begin = watched


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def one(argv: list[str], prepare=None) -> Ended:
    return Started(program, argv, prepare).end()


def two(argv: list[str], prepare=None) -> list[Ended]:
    return run_ranks(2, program, argv, prepare)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def flags(cache: Path, out: Path, *more: str) -> list[str]:
    return [*TINY.split(), "--cache", str(cache), "--out", str(out), *more]


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    ended = one(flags(cache, out))
    assert ended.code == 0, ended.err
    return out


def rows(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if "time/" not in k and "per_second" not in k} for x in lines]


def assert_same_run(out: Path, other: Path) -> None:
    """Weights, Adam's state, the price of KL, generators and every logged figure."""
    ours, theirs = (load_checkpoint(folder / "checkpoints" / "last.pt")["ppo"] for folder in (out, other))
    for name, tensor in theirs["actor"].items():
        # fp32 sums in another order, 60 steps of at most 0.003 or, for the value head, ten times that.
        torch.testing.assert_close(ours["actor"][name], tensor, rtol=0, atol=1e-4, msg=name)
    steps = [{i: float(s["step"]) for i, s in state["optimizer"]["state"].items()} for state in (ours, theirs)]
    assert steps[0] == steps[1] and len(set(steps[0].values())) == 2, "the warm-up stepped the value head alone"
    for name in ("sampling", "shuffling"):
        assert torch.equal(ours[name], theirs[name])
    for name in ("iteration", "optimizer_steps", "policy_steps", "prompts_drawn"):
        assert ours[name] == theirs[name]
    for a, b in zip(rows(out), rows(other), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-4), (a["step"], key)
    stops = [row["ppo/stopped_early"] for row in rows(other)]
    assert 0 < sum(stops) < len(stops), "the early stop should come into it"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_are_one_process(cache, alone, tmp_path, parallel):
    out = tmp_path / "run"
    main, other = two(flags(cache, out, "--parallel", parallel))
    assert (main.code, other.code) == (0, 0), main.err + other.err
    assert f"2 ranks, {parallel}" in main.out and "Warning" not in main.err
    assert_same_run(out, alone)
    ours, theirs = (load_file(folder / "policy" / "model.safetensors") for folder in (out, alone))
    assert ours.keys() == theirs.keys() and all((ours[k] - theirs[k]).abs().max() < 1e-4 for k in theirs)
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (out, alone))
    assert ours["reward_after"] == pytest.approx(theirs["reward_after"], abs=1e-3)
    assert (other.out, other.err) == ("", ""), "one rank speaks"


def two_in_parts(argv: list[str], prepare=None) -> list[Ended]:
    return two([*argv, "--parallel", "fsdp"], prepare)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("first", "then"),
    [(two, one), slow(two_in_parts, one), slow(one, two), slow(one, two_in_parts), slow(two_in_parts, two)],
)
def test_another_number_of_ranks_goes_on(cache, alone, tmp_path, first, then):
    """SIGTERM reaches the last process in iteration 3: all save and stop after it, and the others go on from there."""
    out, rank = tmp_path / "run", 0 if first is one else 1
    stop = functools.partial(at_iteration, rank, 3, functools.partial(send, int(signal.SIGTERM)))
    ended = first(flags(cache, out), stop)
    for process in [ended] if first is one else ended:
        assert process.code == 128 + signal.SIGTERM, process.err
    assert "stopped by signal 15 after iteration 3" in (ended if first is one else ended[0]).out
    ended = then(flags(cache, out, "--resume"))
    for process in [ended] if then is one else ended:
        assert process.code == 0, process.err
    assert_same_run(out, alone)


def test_a_rank_that_dies_ends_the_run(cache, tmp_path):
    out = tmp_path / "run"
    die = functools.partial(at_iteration, 1, 4, functools.partial(send, int(signal.SIGKILL)))
    main, other = two(flags(cache, out), die)
    assert other.code == -signal.SIGKILL and main.code == 2
    assert len(main.errors) == 1 and "a rank is gone without a word" in main.errors[0]
    assert load_checkpoint(out / "checkpoints" / "last.pt")["ppo"]["iteration"] == 2


def test_parts_need_torchrun(cache, tmp_path):
    """One line, before anything is trained."""
    ended = one([*flags(tmp_path / "none", tmp_path / "run"), "--parallel", "fsdp"])
    assert ended.code == 2 and ended.errors == [
        "error: --parallel fsdp cuts the model over processes: start the run with torchrun"
    ]
    assert not (tmp_path / "none").exists()


def test_ranks_with_other_weights_are_refused(cache, tmp_path):
    """As when two machines hold different files under one name."""
    main, other = two(flags(cache, tmp_path / "run"), another_reference_on_rank_1)
    assert (main.code, other.code) == (2, 2)
    assert len(main.errors) == 1 and "the hash of the reference model on rank 0 is" in main.errors[0]


def another_reference_on_rank_1() -> None:
    import rlhf

    fingerprint = rlhf.fingerprint
    if os.environ["RANK"] == "1":
        rlhf.fingerprint = lambda model: fingerprint(model)[::-1]


def test_more_ranks_than_prompts_are_refused():
    from rl_toy import toy_ppo

    from vqa_scratch.rl.ppo import PPO

    ppo = toy_ppo(prompts=2, minibatches=1)
    with pytest.raises(UserError, match="--prompts 2 leave some of 3 ranks without one"):
        PPO(ppo.options, ppo.actor, ppo.reference, ppo.reward, [], ppo.rules, ppo.decode, ranks=Alone(World(0, 3)))
