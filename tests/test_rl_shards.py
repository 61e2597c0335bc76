"""A PPO whose tensors are cut over two ranks against one process: policies, precisions and batches of every kind."""

import functools
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from rl_tiny import ragged_prompts, rules, tiny
from test_rl_vqa import policy_of, rules_for
from vqa_helpers import small_options

from rlhf import iterate
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import ActorCritic, freeze
from vqa_scratch.rl.ppo import PPO
from vqa_scratch.rl.ranks import Copies
from vqa_scratch.rl.rewards import RewardPart, RewardSum
from vqa_scratch.rl.vqa_policy import prompts_from
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.training.launch import start
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.ranks import Alone, World
from vqa_scratch.training.sharing import share_model

STEPS = 2
PLAIN = {"prompts": 7, "samples": 2, "max_new_tokens": 9, "iterations": 10, "critic_warmup": 0, "scale_reward": False}
PLAIN |= {"learning_rate": 1e-3, "warmup_steps": 0, "epochs": 2, "entropy_coef": 0.01}
# Name -> options; of seven prompts the ranks have three and four.
CASES = {
    "three passes and four": {"micro_prompts": 1},
    "one rank idle": {"minibatches": 7, "epochs": 1},
    "the value head alone": {"critic_warmup": 1, "micro_prompts": 1},
    "frozen encoder": {"freeze": "encoder", "micro_prompts": 3},
    "detached critic": {"critic": "detached", "micro_prompts": 3},
    "no critic": {"algorithm": "rloo", "micro_prompts": 3},
    "early stop": {"early_stop_kl": 1e-5, "micro_prompts": 3},
    "answers about images": {"preset": "vqa", "micro_prompts": 3},
    "bf16": {"precision": "bf16", "micro_prompts": 3},
}
RESUMED = "three passes and four"
RECORDED = {"fsdp": tuple(CASES), "ddp": (RESUMED, "bf16")}  # test_rl_distributed.py has more of DDP


def sevens(samples) -> torch.Tensor:
    return torch.tensor([float(ids.count(7)) + 0.1 * len(ids) for ids in samples.ids])


def ppo_of(case: str, data: Path, world: World, kind: str = "ddp") -> PPO:
    options = RLHFOptions(**PLAIN | CASES[case])
    precision = Precision("bf16" if case == "bf16" else "fp32", torch.device("cpu"))
    if options.preset == "vqa":
        made = []
        for seed in (0, 1):
            asked = small_options(data, data / "run", question_prompt=True, seed=seed)
            questions = VQASystem.read(asked)
            made.append(policy_of(VQASystem.build(asked, questions, precision)))
        prompts = prompts_from(questions.samples["train"][: options.prompts + 3], made[0].tokenizers)
        sampling = rules_for(made[0], max_new_tokens=9)
    else:
        # Another seed than the policy's, as with --reference; not where the encoder is the reference's too.
        made = [tiny(), tiny(0 if options.freeze == "encoder" else 1)]
        prompts, sampling = ragged_prompts(), rules()
    actor, reference = ActorCritic(made[0]), freeze(made[1], precision.dtype)
    ranks = share_model(kind, actor, world, precision, Copies, [reference]) if world.size > 1 else Alone(world)
    reward = RewardSum([RewardPart("sevens", 1.0, sevens)])
    return PPO(options, actor, reference, reward, prompts, sampling, str, precision.autocast, ranks)


def run(ppo: PPO, steps: int) -> list[dict[str, float]]:
    logs = [iterate(ppo) for _ in range(steps)]
    return [{k: v for k, v in log.items() if "time/" not in k and "per_second" not in k} for log in logs]


def record(folder: Path, kind: str, data: Path, begun: Path) -> None:
    """As one of two ranks: what each case gives, in files; and where the run begun by one process ends."""
    with start("cpu") as world:
        for case in RECORDED[kind]:
            ppo = ppo_of(case, data, world, kind)
            logs, early = run(ppo, 1), ppo.state_dict()
            if world.main:
                torch.save(early, folder / f"{case} begun")
            logs, state = logs + run(ppo, STEPS - 1), ppo.state_dict()
            if world.main:
                torch.save((logs, state), folder / case)
        ppo = ppo_of(RESUMED, data, world, kind)
        ppo.load_state_dict(torch.load(begun))
        logs, state = run(ppo, STEPS - 1), ppo.state_dict()
        if world.main:
            torch.save((logs, state), folder / "resumed")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Runs of one process: name of a case -> (logs, state)."""

    @functools.cache
    def made(case: str) -> tuple:
        ppo = ppo_of(case, data, World())
        return run(ppo, STEPS), ppo.state_dict()

    return made


@pytest.fixture(scope="module")
def recorded(data, tmp_path_factory):
    """Runs of two ranks: "ddp" or "fsdp" -> the folder with what `record` wrote."""
    ppo, begun = ppo_of(RESUMED, data, World()), tmp_path_factory.mktemp("alone") / "begun"
    run(ppo, 1)
    torch.save(ppo.state_dict(), begun)

    @functools.cache
    def made(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        for ended in run_ranks(2, record, folder, kind, data, begun):
            assert ended.code == 0 and "Warning" not in ended.err, ended.err
        return folder

    return made


def assert_same(ours: tuple, theirs: tuple) -> None:
    (logs, state), (their_logs, their_state) = ours, theirs
    assert state["actor"].keys() == their_state["actor"].keys()
    for name, tensor in their_state["actor"].items():
        # Sums in another order: fp32 roundings, which Adam's steps of 0.001 pass on where a gradient is small.
        torch.testing.assert_close(state["actor"][name], tensor, rtol=0, atol=5e-5, msg=name)
    moments, their_moments = state["optimizer"]["state"], their_state["optimizer"]["state"]
    assert moments.keys() == their_moments.keys(), "the same parameters were stepped"
    for i, moment in their_moments.items():
        assert float(moments[i]["step"]) == float(moment["step"])
    for log, other in zip(logs, their_logs, strict=True):
        for key in other:
            assert log[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize(("kind", "case"), [(k, c) for k, cases in RECORDED.items() for c in cases if c != "bf16"])
def test_two_ranks_are_one_process(recorded, alone, kind, case):
    assert_same(torch.load(recorded(kind) / case), alone(case))


def test_bf16_in_parts_is_bf16_on_whole_models(recorded):
    """With as many ranks; a batch of another size rounds another way, and then other tokens are sampled."""
    assert_same(torch.load(recorded("fsdp") / "bf16"), torch.load(recorded("ddp") / "bf16"))


def test_the_early_stop_and_the_warm_up_come_into_it(alone):
    stops = [log["ppo/stopped_early"] for log in alone("early stop")[0]]
    assert sum(stops) > 0
    assert len(alone("the value head alone")[1]["optimizer"]["state"]) > 2


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_checkpoint_is_of_no_number_of_ranks(recorded, alone, data, kind):
    """One process goes on from what two ranks saved, and two ranks from what one process saved."""
    logs, state = alone(RESUMED)
    ppo = ppo_of(RESUMED, data, World())
    ppo.load_state_dict(torch.load(recorded(kind) / f"{RESUMED} begun"))
    assert_same((run(ppo, STEPS - 1), ppo.state_dict()), (logs[1:], state))
    assert_same(torch.load(recorded(kind) / "resumed"), (logs[1:], state))
