"""A T5 of 23 tokens as the policy of PPO: small enough that every test makes its own."""

from contextlib import nullcontext

import torch

from vqa_scratch.models.t5 import T5, T5Config
from vqa_scratch.rl import report
from vqa_scratch.rl.evaluate import Figures
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import ActorCritic, SamplingRules, T5Policy, freeze
from vqa_scratch.rl.ppo import PPO
from vqa_scratch.rl.rewards import RewardPart, RewardSum
from vqa_scratch.rl.types import Prompt, Samples

VOCAB, EOS = 23, 1


def tiny(seed=0):
    torch.manual_seed(seed)
    size = T5Config(
        vocab_size=VOCAB, dim=16, head_dim=8, hidden=24, encoder_layers=2, decoder_layers=2, heads=2, dropout=0.3
    )
    return T5Policy(T5(size))


def ragged_prompts(count=8):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [Prompt("", tuple(torch.randint(2, VOCAB, (n,), generator=generator).tolist())) for n in lengths]


def rules(**options):
    barred = torch.zeros(VOCAB, dtype=torch.bool)
    barred[0] = True
    return SamplingRules(**{"eos_id": EOS, "max_new_tokens": 9, "barred": barred} | options)


def tiny_ppo(policy=None, sampling=None, autocast=nullcontext, **options):
    options = RLHFOptions(
        **{"prompts": 8, "samples": 2, "micro_prompts": 8, "max_new_tokens": 9, "iterations": 10, "critic_warmup": 0}
        | {"scale_reward": False, "learning_rate": 1e-2, "warmup_steps": 0}
        | options
    )
    reward = RewardSum([RewardPart("sevens", 1.0, lambda s: torch.tensor([float(x.count(7)) for x in s.ids]))])
    actor = ActorCritic(policy or tiny())
    return PPO(options, actor, freeze(tiny()), reward, ragged_prompts(), sampling or rules(), str, autocast)


def rolled_out(ppo):
    """One rollout as the update gets it: (its prompts, trajectory, context)."""
    prompts = ppo.stream.next()
    rollout = ppo.rollout(prompts)
    return prompts, ppo.advantages(rollout), rollout.context


def add_gradients(ppo, prompts, trajectory, context):
    """The gradients of all eight prompts as one minibatch, without a step; returns the figures of it."""
    ppo.update.begin(ppo.iteration, ppo.kl.coef)
    ppo.update.add_gradients(list(range(8)), prompts, trajectory, context)
    return ppo.update.stats.minibatches[0]


def before_the_update(ppo, then):
    """Call `then` in every iteration, between its rollout and its update."""
    begin = ppo.update.begin

    def watched(*given):
        then()
        begin(*given)

    ppo.update.begin = watched


ALL_RULES = [
    {},
    {"temperature": 0.7},
    {"min_new_tokens": 4},
    {"no_repeat_ngram": 2},
    {"temperature": 1.3, "min_new_tokens": 3, "no_repeat_ngram": 3},
]


def judged(prompts, texts, rewards):
    """Figures of one response to each prompt."""
    values = torch.tensor(rewards, dtype=torch.float32)
    ids = [[1, 2]] * len(texts)
    return Figures(values, {"<b>tone": values}, Samples(prompts, ids, texts, [False] * len(texts)), 0.5, {})


def write_page(path, prompts, before, after):
    """samples.html of two lists of (text, reward), one of each for a prompt."""
    sides = [judged(prompts, [text for text, _ in side], [reward for _, reward in side]) for side in (before, after)]
    kept = {f"facts_kept_{when}": 0.5 for when in ("before", "after") if any(p.facts for p in prompts)}
    run = {"iterations": 7, "algorithm": "rloo", "prompts_held_out": len(prompts), "kl": 3.6, "frontier_share": 0.91}
    summary = run | sides[0].summary("before") | sides[1].summary("after") | kept
    report.write_samples(path, summary, *sides, 1)
    return path.read_text(encoding="utf-8")
