"""What `rlhf.py` times number formats on: responses to a few prompts are sampled and differentiated, as in a run."""

from collections.abc import Callable

import torch

from vqa_scratch.kernels import chosen_logprobs
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import ActorCritic
from vqa_scratch.rl.rollout import chances, sample
from vqa_scratch.rl.tasks import Task
from vqa_scratch.training.precision import Precision


def trial(task: Task, actor: ActorCritic, options: RLHFOptions) -> Callable[[Precision], None]:
    """A function that does so in a format, with as many prompts as an update takes at once.

    Weights, gradients and the run's random numbers stay as they are.
    """
    prompts, k, policy = task.train[: min(options.prompts, options.micro_prompts)], options.samples, actor.backbone
    actor.eval()  # as `PPO` has it

    def respond_and_differentiate(precision: Precision) -> None:
        generator = torch.Generator(precision.device).manual_seed(0)
        chance = chances(len(prompts) * k, task.rules, generator, precision.device)
        with precision.autocast():
            with torch.no_grad():
                ids, mask, _ = sample(policy, policy.encode(prompts).shared_by(k), task.rules, chance)
            logits, values = actor(policy.encode(prompts).shared_by(k), ids, mask, task.rules)
        (chosen_logprobs(logits, ids[mask])[0].sum() + values.sum()).backward()
        actor.zero_grad(set_to_none=True)

    return respond_and_differentiate
