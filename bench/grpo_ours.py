"""Our side of `bench/grpo.py`: one step of GRPO or RLOO, repeated for every line on stdin; and what both sides load.

python -m bench.grpo_ours FOLDER grpo
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from bench.ppo_ours import take_turns
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.rl.decoder_policy import LanguagePolicy
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import ActorCritic, SamplingRules, freeze
from vqa_scratch.rl.ppo import PPO, Rollout
from vqa_scratch.rl.rewards import RewardPart, RewardSum
from vqa_scratch.rl.rollout import Responses, score
from vqa_scratch.rl.types import Prompt, Samples
from vqa_scratch.training.allocator import keep_freed_memory

BETA = 0.05  # the price of KL on both sides


def prepare(folder: Path, *, prompts: int, samples: int, tokens: int, new: int, tiny: bool) -> None:
    """Weights, prompts, and a tokenizer whose words are `t0`, `t1`, ..., so that a text is its ids on both sides."""
    torch.manual_seed(0)
    size = GPT2Config(vocab_size=4097, dim=32, layers=2, heads=2, eos_id=4096, bos_id=4096) if tiny else GPT2Config()
    GPT2(size).save_pretrained(folder / "policy")
    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(size.vocab_size)}, "t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    ids = torch.randint(size.eos_id, (prompts, tokens))
    task = {"prompts": ids, "samples": samples, "new": new, "eos": size.eos_id, "beta": BETA}
    torch.save(task, folder / "task.pt")


def compare(ppo: PPO, prompts: list[Prompt], probe: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ours makes of the other side's first responses, before any step."""
    ids, mask, rewards = probe["ids"], probe["mask"].bool(), probe["rewards"]
    context = ppo.actor.backbone.encode(prompts).shared_by(ppo.options.samples)
    responses = Responses(ids, mask, torch.zeros(len(ids), dtype=torch.bool))
    scored = score(ppo.actor, ppo.reference, [(list(range(len(prompts))), context, context)], ids, mask, ppo.rules)
    rollout = Rollout(responses, scored, rewards, rewards, {}, Samples([], [], [], []), context, {})
    trajectory, update = ppo.advantages(rollout), ppo.update
    update.begin(0, ppo.kl.coef)
    update.add_gradients(list(range(len(prompts))), prompts, trajectory, context)
    norm = torch.nn.utils.get_total_norm([p.grad for p in update.parameters if p.grad is not None])
    update.optimizer.zero_grad()
    loss = torch.as_tensor(float(update.stats.minibatches[0]["ppo/loss/policy"]))
    return {"logprobs": scored.logprobs, "advantages": trajectory.advantages[:, 0], "loss": loss, "gradient": norm}


def ours(folder: Path, algorithm: str) -> None:
    """The waiting process on our side."""
    keep_freed_memory()
    task = torch.load(folder / "task.pt", weights_only=True)
    options = RLHFOptions(
        algorithm=algorithm,
        prompts=len(task["prompts"]),
        samples=task["samples"],
        max_new_tokens=task["new"],
        kl_coef=task["beta"],
        micro_prompts=1,
        epochs=1,
        iterations=1000,
        early_stop_kl=0.0,
        scale_reward=False,
        missing_eos_penalty=0.0,
        max_grad_norm=float("inf"),
    )
    policies = [LanguagePolicy(GPT2.from_pretrained(folder / "policy"), task["eos"], task["eos"]) for _ in range(2)]

    def even(samples):  # as on the other side, of all tokens of a response
        ends = [[task["eos"]] if done else [] for done in samples.finished]
        whole = [[*ids, *end] for ids, end in zip(samples.ids, ends, strict=True)]
        return torch.tensor([sum(index % 2 == 0 for index in ids) / len(ids) for ids in whole])

    reward, rules = RewardSum([RewardPart("even", 1.0, even)]), SamplingRules(task["eos"], task["new"])
    prompts = [Prompt("", tuple(row)) for row in task["prompts"].tolist()]
    ppo = PPO(options, ActorCritic(policies[0]), freeze(policies[1]), reward, prompts, rules, str)

    def probe() -> None:
        theirs = folder / f"probe-{algorithm}-trl.pt"
        if theirs.exists():
            torch.save(compare(ppo, prompts, torch.load(theirs, weights_only=True)), folder / f"probe-{algorithm}.pt")

    take_turns(ppo, probe)


if __name__ == "__main__":
    ours(Path(sys.argv[1]), sys.argv[2])
