"""A run that writes answers, as the policy of `rlhf.py`.

The prompts are its training questions, those of its test split are for evaluation, and the reward is the official VQA
accuracy.
"""

import copy
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from vqa_scratch import systems
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import freeze, sampling_rules
from vqa_scratch.rl.resume import fingerprint
from vqa_scratch.rl.rewards import RewardPart, RewardSum
from vqa_scratch.rl.tasks import Task
from vqa_scratch.rl.vqa_policy import VQAPolicy, official_accuracy, prompts_from
from vqa_scratch.systems.older import renumbered, todays_names
from vqa_scratch.systems.run_folder import WEIGHTS, check_trainable, save_weights
from vqa_scratch.systems.scoring import score
from vqa_scratch.systems.splits import SplitSystem
from vqa_scratch.systems.writing import check_room


def vqa_task(options: RLHFOptions, device: torch.device, dtype: torch.dtype) -> Task:
    """The task of the run of `train.py` in the folder `--policy`, whatever its system."""
    check_trainable(Path(options.policy))
    return systems.load(Path(options.policy), device).policy(options, dtype)


NEW = {"greedy_accuracy": "test", "holdout_accuracy": "holdout"}  # figures before and after, and the split they are of


def greedy_accuracy(
    system: SplitSystem[Any, VQAModel, Any], policy: VQAPolicy, new: dict[str, list[VQASample]]
) -> dict[str, float]:
    """Official accuracy of the answers that the system gives with the policy's weights, by name of the questions."""
    tuned = copy.copy(system)
    tuned.model = policy.model
    return {name: score(samples, tuned.answer(samples)).accuracy for name, samples in new.items()}


def answering_task(system: SplitSystem[Any, VQAModel, Any], options: RLHFOptions, dtype: torch.dtype) -> Task:
    """The system as policy, with a frozen copy as reference, whose linear layers are stored in `dtype`.

    The questions are those of `--data`, by default of the run's own data.
    """
    data = system.read(replace(system.options, data=options.data or system.options.data))
    asked = {name: [sample for sample in samples if sample.question] for name, samples in data.samples.items()}
    train, tokenizers = asked["train"], system.tokenizers
    if not asked["test"]:
        raise UserError("the test split has no questions: --preset vqa measures what it gained on them")
    new = {name: asked[split] for name, split in NEW.items() if asked.get(split)}
    new = {name: random.Random(options.seed).sample(x, min(options.eval_prompts, len(x))) for name, x in new.items()}
    held_out = new["greedy_accuracy"]
    for name, samples in (("train", train), ("test", held_out)):
        bare = next((sample.question_id for sample in samples if not sample.answers), None)
        if bare is not None:
            raise UserError(f"question {bare} of the {name} split has no answers: the reward is the VQA accuracy")
    questions = {sample.question for sample in (*train, *held_out)}
    longest = max(len(tokenizers.prompt(question)) for question in questions) + 1  # with the start token
    check_room(system, longest, options.max_new_tokens)
    policy = VQAPolicy(system.model, tokenizers, system.processor)
    words = tokenizers.decoder
    never = [i for i in (words.pad_id, words.bos_id) if i not in (None, policy.eos_id)]

    def save(folder: Path) -> None:
        system.save(folder)
        save_weights(folder / WEIGHTS, system.model)

    reference = freeze(copy.deepcopy(policy), dtype)
    return Task(
        policy,
        reference,
        RewardSum([RewardPart("accuracy", 1.0, official_accuracy)], options.length_weight),
        prompts_from(train, tokenizers),
        prompts_from(held_out, tokenizers),
        sampling_rules(options, policy.eos_id, system.model.decoder.head, len(words), never),
        lambda ids: words.decode(ids).strip(),
        save,
        tokenizers.notes_on_all(sample.question for sample in (*train, *held_out)),
        lambda tuned, _: greedy_accuracy(system, cast(VQAPolicy, tuned), new),
        upgrade=partial(todays_checkpoint, reference=reference, freeze=options.freeze),
    )


OF_ACTOR = "backbone.model."  # before the names of the model's weights in a checkpoint of rlhf.py


def todays_checkpoint(saved: dict[str, Any], reference: VQAPolicy, freeze: str) -> dict[str, Any]:
    """A checkpoint of rlhf.py in today's terms, also one from before there were connectors.

    The weights had other names then, and another order: it numbers the moments, and the reference is hashed in it.
    """
    ppo = saved["ppo"]
    weights = {name.removeprefix(OF_ACTOR): x for name, x in ppo["actor"].items() if name.startswith(OF_ACTOR)}
    renamed, today = todays_names(weights), reference.model.state_dict()
    if renamed.keys() == weights.keys() or renamed.keys() != today.keys():
        return saved
    if saved["reference"] == fingerprint(reference, [f"model.{name}" for name in renamed]):
        saved = saved | {"reference": fingerprint(reference)}

    trained = [name for name, _ in reference.model.named_parameters()]
    if freeze == "encoder":
        trained = [name for name in trained if name.startswith("decoder.")]
    head = ["value head's weight", "value head's bias"]
    before = [*head, *(name for name in renamed if name in trained)]
    moments = renumbered(ppo["optimizer"]["state"], before, [*head, *trained])

    actor = {name: x for name, x in ppo["actor"].items() if not name.startswith(OF_ACTOR)}
    actor |= {OF_ACTOR + name: x for name, x in renamed.items()}
    return saved | {"ppo": ppo | {"actor": actor, "optimizer": ppo["optimizer"] | {"state": moments}}}
