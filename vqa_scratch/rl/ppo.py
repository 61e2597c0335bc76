"""The parts of PPO with a KL penalty against a frozen reference (Schulman et al. 2017; Ziegler et al. 2019).

An iteration is in `rlhf.py`: draw prompts, sample responses, score them, turn scores into advantages, and take a few
clipped gradient steps (`update.py`). RLOO, GRPO and best-of-n replace the advantages and share everything else.
`docs/ppo.md` numbers the details.

Each rank samples, scores and differentiates its share of the prompts. Rewards, advantages and their whitening, the
price of KL and the log are computed on every rank from the whole batch, a few numbers a token; so they equal those of a
single rank.

Shapes: P prompts, K samples a prompt, B = P * K responses, R response tokens.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from vqa_scratch.errors import UserError
from vqa_scratch.rl import functional as F
from vqa_scratch.rl.large_tables import speed_up_linears
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import ActorCritic, Backbone, Context, SamplingRules
from vqa_scratch.rl.ranks import gather_rows, gather_samples
from vqa_scratch.rl.rewards import RewardScale, RewardSum
from vqa_scratch.rl.rollout import PromptStream, Responses, Scored, chances, given, sample, score
from vqa_scratch.rl.types import Prompt, Samples, Trajectory
from vqa_scratch.rl.update import Update, micro_batches
from vqa_scratch.training.checkpoint import load_model_state
from vqa_scratch.training.ranks import ONE_PROCESS, Alone, World, for_main

GROUP_ADVANTAGES = {"rloo": F.rloo_advantages, "grpo": F.grpo_advantages, "best-of-n": F.best_of_n_advantages}


class Rollout(NamedTuple):
    """One batch of responses, of all ranks except for the context."""

    responses: Responses
    scored: Scored
    scores: Tensor  # (B,) rewards on the scale that PPO sees, penalties taken
    raw: Tensor  # (B,) rewards as they came
    parts: dict[str, Tensor]  # (B,) each: what the rewards are made of
    samples: Samples
    context: Context  # what the policy's encoder made of this rank's prompts
    seconds: dict[str, float]  # time of each stage, by its name in the log


def check_ranks(options: RLHFOptions, world: World) -> None:
    """Raise UserError unless every rank has a prompt of each batch."""
    if options.prompts < world.size:
        raise UserError(f"--prompts {options.prompts} leave some of {world.size} ranks without one")


class PPO:
    """The parts of a run; `rlhf.iterate` goes through them once an iteration."""

    def __init__(
        self,
        options: RLHFOptions,
        actor: ActorCritic,
        reference: Backbone,
        reward: RewardSum,
        prompts: list[Prompt],
        rules: SamplingRules,
        decode: Callable[[list[int]], str],
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        ranks: Alone = ONE_PROCESS,
    ) -> None:
        self.ranks, world = ranks, ranks.world
        check_ranks(options, world)
        mine = world.share(range(options.prompts))  # this rank's prompts of a batch
        assert isinstance(mine, range)  # a slice of one
        self.world, self.mine = world, mine
        self.options, self.actor, self.reference, self.reward = options, actor.eval(), reference, reward
        speed_up_linears(reference)
        self.rules, self.decode, self.autocast = rules, decode, autocast
        self.stream = PromptStream(prompts, options.prompts, options.seed)
        self.scale = RewardScale(clip=options.score_clip or None)
        responses = options.iterations * options.prompts * options.samples
        self.kl = F.AdaptiveKL(options.kl_coef, options.kl_target or None, max(1.0, options.kl_horizon * responses))
        self.update = Update(options, actor, rules, self.mine, autocast, ranks)
        self.device = actor.value_head.weight.device
        self.sampling = torch.Generator(self.device).manual_seed(options.seed + 1)
        self.iteration = 0

    # --------------------------------------------------------------------------------------------------- rollouts

    @torch.no_grad()
    def respond(
        self,
        prompts: list[Prompt],
        samples: int,
        policy: Backbone,
        generator: torch.Generator,
        only: range | None = None,
        told: bool = False,
        differentiable: bool = False,
    ) -> tuple[Responses, Samples, Context]:
        """Encode the prompts once and sample `samples` responses to each; to `only` some of them, as among all. `told`:
        take those that the prompts bring. `differentiable`: gradients go back through the context."""
        chance = chances(len(prompts) * samples, self.rules, generator, self.device)
        if only is not None:
            prompts, chance = prompts[only.start : only.stop], chance[only.start * samples : only.stop * samples]
        with self.autocast():
            with torch.set_grad_enabled(differentiable):
                context = policy.encode(prompts).shared_by(samples)
            responses = given(prompts, policy, self.rules) if told else sample(policy, context, self.rules, chance)
        ids = responses.lists()
        repeated = [p for p in prompts for _ in range(samples)]
        return responses, Samples(repeated, ids, [self.decode(x) for x in ids], responses.finished.tolist()), context

    @torch.no_grad()
    def rollout(self, prompts: list[Prompt]) -> Rollout:
        """Sample responses to one batch, reward them, and score them under policy and reference."""
        options, clock = self.options, [time.perf_counter()]
        policy, k = self.actor.backbone, options.samples
        told = options.preferences is not None
        (ids, mask, finished), samples, context = self.respond(
            prompts, k, policy, self.sampling, self.mine, told, self.update.keeps_encoding
        )
        clock.append(time.perf_counter())

        with self.autocast():
            raw, parts = self.reward(samples)
        scores = self.scale(raw).to(ids.device) - options.missing_eos_penalty * (~finished).float()
        clock.append(time.perf_counter())

        with self.autocast():
            s = score(self.actor, self.reference, self.readings(prompts, context), ids, mask, self.rules)
        ids, mask, finished, scores, raw, *scored = gather_rows(self.world, ids, mask, finished, scores, raw, *s)
        samples = gather_samples(self.world, samples, prompts, k)
        parts = dict(zip(parts, gather_rows(self.world, *parts.values()), strict=True))
        clock.append(time.perf_counter())
        names = ("generate", "compute_rewards", "forward_pass")
        seconds = {f"time/ppo/{name}": b - a for name, a, b in zip(names, clock[:-1], clock[1:], strict=True)}
        return Rollout(Responses(ids, mask, finished), Scored(*scored), scores, raw, parts, samples, context, seconds)

    def readings(self, prompts: list[Prompt], context: Context) -> Iterator[tuple[list[int], Context, Context]]:
        """The parts of this rank's prompts, with what policy and reference read of each: the old log-probabilities.

        In fp32 the context of the rollout serves. In bf16 a sum over a wider padding rounds otherwise: there the
        prompts are encoded as the update will, or its first ratio would be up to 4 % from 1.
        """
        parts, k = micro_batches(self.mine, prompts, self.options.micro_prompts), context.samples
        frozen = self.options.freeze == "encoder"
        ragged = len({len(prompts[i].ids) for i in self.mine}) > 1 and len(parts) > 1
        again = ragged and torch.is_autocast_enabled(self.device.type) and not frozen
        for part in parts:
            here, some = [i - self.mine.start for i in part], [prompts[i] for i in part]
            own = self.actor.backbone.encode(some).shared_by(k) if again else context.of(here)
            # A frozen encoder is the reference's encoder too.
            yield here, own, own if frozen else self.reference.encode(some).shared_by(k)

    def advantages(self, rollout: Rollout) -> Trajectory:
        """Rewards a token, advantages and returns. Each token pays for its KL, the last one also earns the score; how
        advantages come about is the only place where the algorithms differ."""
        options, (ids, mask, finished), s = self.options, rollout.responses, rollout.scored
        rewards = F.get_rewards(rollout.scores, s.logprobs, s.ref_logprobs, mask, self.kl.coef)
        spread = F.masked_whiten(rewards, mask, shift_mean=False) if options.whiten_rewards else rewards
        _, to_go = F.gae(spread, torch.zeros_like(spread), mask, options.gamma, 1.0)  # from each token to the end
        whole = to_go[:, 0]  # of a response: its score less the price of its KL
        others = [F.others_mean(whole, options.samples)[:, None] * mask] if options.samples > 1 else []
        if options.algorithm == "ppo":
            fitted = options.critic == "fitted"
            known = F.fitted_baseline([s.values, *others], to_go, mask, options.prompts) if fitted else s.values
            advantages, returns = F.gae(spread, known, mask, options.gamma, options.lam)
            if options.whiten_advantages:
                advantages = F.masked_whiten(advantages, mask)
        else:
            (known,), returns = others, whole[:, None] * mask
            if options.algorithm != "dpo":
                each = GROUP_ADVANTAGES[options.algorithm](whole, options.samples)
            elif options.preferences is None:
                each = F.preferences(rollout.scores)
            else:
                each = whole.new_tensor([1.0, 0.0]).repeat(options.prompts)
            advantages = each[:, None] * mask
        return Trajectory(ids, mask, finished, *s, rollout.scores, rewards, known, advantages, returns)

    # ---------------------------------------------------------------------------------------- reward scale, resume

    def fit_reward_scale(self, prompts: list[Prompt], responses: int = 256) -> None:
        """Fix the reward's scale from at least `responses` responses of the reference, if the run needs one."""
        if not self.options.scale_reward or self.options.preferences is not None:
            return
        generator = torch.Generator(self.device).manual_seed(self.options.seed + 3)
        rewards: list[Tensor] = []
        while sum(map(len, rewards)) < responses:
            start = len(rewards) * self.options.prompts
            batch = [prompts[i % len(prompts)] for i in range(start, start + self.options.prompts)]
            _, samples, _ = self.respond(batch, self.options.samples, self.reference, generator, self.mine)
            with torch.no_grad(), self.autocast():
                rewards += gather_rows(self.world, self.reward(samples)[0])
        self.scale.fit(torch.cat(rewards))

    def state_dict(self) -> dict:
        """Everything that the next iteration depends on, whole on the main rank; all ranks must call it."""
        return {
            "actor": for_main(self.actor.state_dict(), self.world),
            "iteration": self.iteration,
            "kl_coef": self.kl.coef,
            "reward_mean": self.scale.mean,
            "reward_std": self.scale.std,
            "prompts_drawn": self.stream.drawn,
            "sampling": self.sampling.get_state(),
        } | self.update.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`: the run goes on as if it had never stopped."""
        # T5's head was called `head` in runs before its name was that of the checkpoints' layout.
        actor = {name.replace(".model.head.", ".model.lm_head."): x for name, x in state["actor"].items()}
        load_model_state(self.actor, actor, "the checkpoint")
        self.update.load_state_dict(state)
        self.iteration, self.kl.coef = state["iteration"], state["kl_coef"]
        self.scale.mean, self.scale.std = state["reward_mean"], state["reward_std"]
        self.stream.drawn = state["prompts_drawn"]
        self.sampling.set_state(state["sampling"].cpu())
