"""The clipped update of PPO (Schulman et al. 2017, eq. 7): a few optimizer steps on one batch of rollouts.

Each rank differentiates its share of the prompts, and all take the same steps.

Shapes: P prompts, K samples a prompt, B = P * K responses, R response tokens, N real tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from vqa_scratch.errors import UserError
from vqa_scratch.kernels import chosen_logprobs
from vqa_scratch.rl import functional as F
from vqa_scratch.rl.large_tables import look_up_sparsely, speed_up_linears
from vqa_scratch.rl.metrics import UpdateStats
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import ActorCritic, Context, SamplingRules
from vqa_scratch.rl.types import Prompt, Trajectory
from vqa_scratch.training.checkpoint import load_whole_state
from vqa_scratch.training.ranks import Alone, for_main, whole


def micro_batches(chosen: Iterable[int], prompts: list[Prompt], size: int) -> list[list[int]]:
    """The chosen prompts, `size` at a time; prompts of similar length together, to save padding."""
    by_length = sorted(chosen, key=lambda i: (len(prompts[i].ids), i))
    return [by_length[i : i + size] for i in range(0, len(by_length), size)]


class Update:
    """The optimizer of a run and its steps. `mine` are this rank's prompts of a batch."""

    def __init__(
        self,
        options: RLHFOptions,
        actor: ActorCritic,
        rules: SamplingRules,
        mine: range,
        autocast: Callable[[], AbstractContextManager],
        ranks: Alone,
    ) -> None:
        self.options, self.actor, self.rules, self.mine = options, actor, rules, mine
        self.autocast, self.ranks = autocast, ranks
        if options.freeze == "encoder":
            for parameter in actor.backbone.encoder_parameters():
                parameter.requires_grad_(False)
        self.tables = look_up_sparsely(actor)
        speed_up_linears(actor)
        head = list(actor.value_head.parameters())
        body = [p for p in actor.backbone.parameters() if p.requires_grad]
        self.parameters = head + body
        groups = [{"params": head}, {"params": body}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, eps=options.adam_eps, weight_decay=0.0, fused=True)
        self.shuffling = torch.Generator().manual_seed(options.seed + 2)
        self.iteration = 0
        self.optimizer_steps = self.policy_steps = 0  # the first iterations may be of the value head alone
        # Whether the first pass goes back through what the rollout encoded: before it no weight has changed.
        at_once = options.minibatches == 1 and options.micro_prompts >= options.prompts and ranks.world.size == 1
        self.keeps_encoding = at_once and options.freeze != "encoder"

    def begin(self, iteration: int, kl_coef: float) -> None:
        """A new batch of rollouts; `iteration` counts from 0. The price of KL is the beta of DPO."""
        self.iteration, self.kl_coef, self.stats, self.stopped = iteration, kl_coef, UpdateStats(), False
        self.encoded = self.keeps_encoding

    def minibatches(self) -> Iterator[list[int]]:
        """The prompts of each minibatch, by number: `epochs` passes, each in an order of its own."""
        options = self.options
        size = options.prompts // options.minibatches
        for _ in range(options.epochs):
            order = torch.randperm(options.prompts, generator=self.shuffling).tolist()
            for start in range(0, options.prompts, size):
                yield order[start : start + size]

    def too_far(self, moved: float) -> bool:
        """Whether the policy has moved so far on this batch that the step is not taken; drops its gradients then."""
        self.check_finite("policy's log-probabilities", moved)
        limit = self.options.early_stop_kl
        self.stopped = bool(limit) and moved > 1.5 * limit
        if self.stopped:
            self.optimizer.zero_grad()
        return self.stopped

    def step(self) -> None:
        """Collect the gradients of all ranks, clip them, and step."""
        self.ranks.collect(self.parameters)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm))
        self.check_finite("gradient", float(norm))
        self.stats.norms.append(norm)
        self.set_learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer_steps += 1
        self.policy_steps += not self.warming

    def log(self) -> dict[str, float]:
        """The figures of all steps on this batch."""
        return self.stats.summary(self.stopped) | {"ppo/learning_rate": self.learning_rate}

    def check_finite(self, what: str, value: float) -> None:
        """Raise UserError before a step that would spoil the weights, and with them the next checkpoint."""
        if not math.isfinite(value):
            raise UserError(
                f"the {what} became {value} in iteration {self.iteration + 1}: "
                "lower --learning-rate and go on from the last checkpoint with --resume"
            )

    def add_gradients(
        self, minibatch: list[int], prompts: list[Prompt], trajectory: Trajectory, context: Context
    ) -> float:
        """Add up the gradients of this rank's prompts of a minibatch, a few at a time; returns the mean k3 a token.

        Every part is divided by the tokens of the whole minibatch, on all ranks, so the split into parts has no effect;
        the k3 is of all ranks too.
        """
        options, k = self.options, self.options.samples
        tokens = trajectory.mask.view(options.prompts, -1)[minibatch].sum()
        _, spread = F.mean_and_var(F.masked_moments(trajectory.returns, trajectory.mask))
        value_clip = options.value_clip * float(spread.sqrt())
        warming = self.warming
        self.actor.detach_value = warming or options.critic != "shared"
        parts = micro_batches((i for i in minibatch if i in self.mine), prompts, options.micro_prompts)
        for part, counts in self.ranks.passes(parts, idle=[self.mine.start]):
            rows = torch.tensor([i * k + j for i in part for j in range(k)], device=trajectory.ids.device)
            t = trajectory.rows(rows)
            with self.autocast():
                logits, values = self.ranks.shared(self._look)(part, prompts, context, t)

            m = t.mask  # from here on (N,): the real tokens of all responses in one row
            real = torch.ones_like(t.ids[m], dtype=torch.bool)
            logprobs, entropies = chosen_logprobs(logits, t.ids[m])
            if options.algorithm == "dpo":
                ratios = logprobs.new_zeros(m.shape).masked_scatter(m, logprobs) - t.ref_logprobs
                policy_loss, right = F.dpo_loss(ratios.sum(1), t.advantages[:, 0], self.kl_coef, len(minibatch) * k / 2)
                own = {"dpo/accuracy": right, "ppo/policy/clipfrac": torch.zeros_like(right)}
            else:
                clips = (options.clip_low, options.clip_high, options.dual_clip or None)
                policy_loss, policy_clipped = F.ppo_policy_loss(
                    logprobs, t.logprobs[m], t.advantages[m], real, *clips, tokens
                )
                own = {"ppo/policy/clipfrac": policy_clipped}
            value_loss, value_clipped = F.ppo_value_loss(values, t.values[m], t.returns[m], real, value_clip, tokens)
            entropy = (entropies if options.entropy_coef else entropies.detach()).sum() / tokens
            loss = policy_loss.new_zeros(()) if warming else policy_loss - options.entropy_coef * entropy
            if options.algorithm == "ppo":
                loss = loss + (1.0 if warming else options.value_coef) * value_loss
            self.ranks.backward(loss, counts)
            figures = own | {
                "ppo/loss/policy": policy_loss,
                "ppo/loss/value": value_loss,
                "ppo/loss/total": loss,
                "ppo/policy/entropy": entropy,
                "ppo/val/clipfrac": value_clipped,
            }
            if counts:
                self.stats.add(logprobs, values, t.logprobs[m], t.returns[m], tokens, **figures)
        self.encoded = False
        for table in self.tables:
            if table.grad is not None:
                table.grad = table.grad.to_dense()
        return self.stats.end_minibatch(self.ranks.world)

    def _look(self, part: list[int], prompts: list[Prompt], context: Context, t: Trajectory) -> tuple[Tensor, Tensor]:
        """Logits and values for some prompts' responses; encoded again with gradients, unless the encoder is frozen or
        the rollout's encoding still has them."""
        if self.encoded or self.options.freeze == "encoder":
            read = context.of([i - self.mine.start for i in part])
        else:
            read = self.actor.backbone.encode([prompts[i] for i in part]).shared_by(context.samples)
        return self.actor(read, t.ids, t.mask, self.rules)

    @property
    def warming(self) -> bool:
        """Whether only the value head learns in this iteration."""
        return self.iteration < self.options.critic_warmup and self.options.algorithm == "ppo"

    def rate_after(self, steps: int) -> float:
        """The learning rate of what has taken so many steps: it rises over the first of them, and falls linearly to 0
        over the iterations."""
        rise = min(1.0, (steps + 1) / max(1, self.options.warmup_steps))
        return self.options.learning_rate * rise * (1 - self.iteration / self.options.iterations)

    @property
    def learning_rate(self) -> float:
        """Of the policy's next step."""
        return self.rate_after(self.policy_steps)

    def set_learning_rate(self) -> None:
        """The value head counts all steps, the policy its own: else the head's would use its warm-up up."""
        head, body = self.optimizer.param_groups
        head["lr"] = self.options.value_lr_scale * self.rate_after(self.optimizer_steps)
        body["lr"] = self.learning_rate

    # ----------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict:
        """What the next update depends on beside the weights, whole on the main rank; all ranks must call it."""
        return {
            "optimizer": for_main(self.optimizer.state_dict(), self.ranks.world),
            "optimizer_steps": self.optimizer_steps,
            "policy_steps": self.policy_steps,
            "shuffling": self.shuffling.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`; looks at no other entries of `state`."""
        load_whole_state(self.optimizer, state["optimizer"])
        self.optimizer_steps = state["optimizer_steps"]
        self.policy_steps = state.get("policy_steps", self.optimizer_steps)  # as older checkpoints counted
        self.shuffling.set_state(state["shuffling"].cpu())
