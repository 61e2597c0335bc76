"""Builds the task of preset lm: a GPT-2, OPT, Llama or one of its kind answers prompts, and is paid by any reward."""

import copy
from dataclasses import replace
from pathlib import Path

import torch

from vqa_scratch.data.chat_template import OF_TEXT, read_template
from vqa_scratch.data.prompts import Asked, read_prompts
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.errors import UserError
from vqa_scratch.generation_options import end_ids
from vqa_scratch.models import released
from vqa_scratch.rl.decoder_policy import LanguagePolicy
from vqa_scratch.rl.evaluate import AT_ONCE
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import Backbone, freeze, sampling_rules
from vqa_scratch.rl.rewards import RewardSum
from vqa_scratch.rl.rollout import sample
from vqa_scratch.rl.tasks import Task, check_same_vocabulary, own_reward, shuffled_if_enough
from vqa_scratch.rl.types import Prompt, Samples
from vqa_scratch.storage import read_object, write_json, write_text
from vqa_scratch.weights.files import CONFIG, GENERATION, resolve_folder

GREEDY = 1e-6  # the temperature at which sampling takes the likeliest token


def prompt_of(asked: Asked, tokenizer: Tokenizer, templated: bool, end: int, longest: int, room: int | None) -> Prompt:
    """A prompt in ids, and its responses, each with the end token and cut to `longest` tokens.

    A chat template has written the special tokens itself (`templated`). Raises UserError, with the place, for a prompt
    of more than `room` tokens.
    """
    ids = tokenizer.encode(asked.text, add_special_tokens=not templated)
    if room is not None and len(ids) > room:
        raise UserError(
            f"{asked.where}: the prompt has {len(ids)} tokens, and with --max-new-tokens {longest} only {room} have "
            "room in the policy's positions"
        )

    def response(text: str) -> tuple[int, ...]:
        whole = tokenizer.encode(asked.text + text, add_special_tokens=not templated)
        rest = tokenizer.encode(text, add_special_tokens=False)  # where prompt and response would share a token
        return tuple([*(whole[len(ids) :] if whole[: len(ids)] == ids else rest), end][:longest])

    pair = (response(asked.pair[0]), response(asked.pair[1])) if asked.pair else None
    return Prompt(asked.text, tuple(ids), asked.pair[0] if asked.pair else "", asked.row, pair)


@torch.no_grad()
def greedy(policy: Backbone, task: Task) -> list[tuple[str, float]]:
    """The likeliest tokens as a response to each held-out prompt, with its reward."""
    rules, found = replace(task.rules, temperature=GREEDY), list[tuple[str, float]]()
    for start in range(0, len(task.held_out), AT_ONCE):
        prompts = task.held_out[start : start + AT_ONCE]
        chance = torch.zeros(len(prompts), rules.max_new_tokens, device=next(policy.parameters()).device)
        made = sample(policy, policy.encode(prompts), rules, chance)
        ids = made.lists()
        texts = [task.decode(row) for row in ids]
        rewards, _ = task.reward(Samples(prompts, ids, texts, made.finished.tolist()))
        found += zip(texts, rewards.tolist(), strict=True)
    return found


def language_task(options: RLHFOptions, device: torch.device, precision: torch.dtype) -> Task:
    """A decoder that answers the prompts of a file, or those of its preferences; the reference is a frozen copy if none
    is given. Raises UserError on what does not fit together, before the weights are read where it can."""
    source, name, longest = options.preferences or options.data, options.policy, options.max_new_tokens
    if source is None:
        raise UserError("--preset lm needs --data, a file of prompts, or --algorithm dpo and a file of --preferences")
    if options.reward is None:
        raise UserError("--preset lm needs --reward, which also measures the policy: a function or a text classifier")
    tokenizer = Tokenizer.from_pretrained(name)
    template = None if options.chat is False else read_template(name, OF_TEXT)
    if options.chat and template is None:
        raise UserError(f"--chat needs a chat template, and {name} has none")
    asked = read_prompts(source, options.column, template, tokenizer.special, options.preferences is not None)
    shuffled_if_enough(asked, "prompts", options)

    model, generation = released.decoder(name, cross_attention=False), resolve_folder(name) / GENERATION
    tokenizer.check_fits(len(model.head), "the policy")
    ends = tuple(sorted(end_ids(model.config.eos_id), key=lambda index: index != tokenizer.eos_id))  # a turn's first
    if not ends or max(ends) >= len(model.head):
        beyond = f": {max(ends)} is none of its {len(model.head)} ids" if ends else ""
        raise UserError(f"{name} names no end token in {GENERATION} or {CONFIG}{beyond}; add eos_token_id")
    room = None if model.max_positions is None else max(0, model.max_positions - longest + 1)
    prompts = [prompt_of(one, tokenizer, template is not None, ends[0], longest, room) for one in asked]
    notes = []
    if not generation.is_file():
        words = ", ".join(repr(tokenizer.backend.id_to_token(index)) for index in ends)
        notes.append(f"{name} has no {GENERATION}: responses end with {words}, as {CONFIG} says")
    if template is not None:
        notes.append(f"prompts are written by the chat template of {name}; --no-chat takes texts as they are")
    if options.preferences is not None:
        cut = sum(ids[-1] not in ends for prompt in prompts for ids in prompt.pair or ())
        notes.append(f"{cut:,} of {2 * len(prompts):,} responses cut to {longest} tokens")
        notes.append("rewards and KL in the log are those of the file's responses; summary.json has the policy's own")

    pad = ends[0] if tokenizer.pad_id is None else tokenizer.pad_id
    policy = LanguagePolicy(model, pad, ends).to(device)
    fixed = copy.deepcopy(policy)
    if options.reference is not None:
        reference = released.decoder(options.reference, cross_attention=False)
        check_same_vocabulary(model, reference, ("vocab_size",))
        if Tokenizer.from_pretrained(options.reference).backend.get_vocab() != tokenizer.backend.get_vocab():
            raise UserError(f"{options.reference} has other tokens than the policy: a KL needs the same vocabulary")
        fixed = LanguagePolicy(reference, pad, ends).to(device)
    held_out, train = prompts[: options.eval_prompts], prompts[options.eval_prompts :]
    known = {prompt.text for prompt in held_out}

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save(folder)
        if template is not None:
            write_text(folder / OF_TEXT[0], template)
        if generation.is_file():
            write_json(folder / GENERATION, read_object(generation))

    task = Task(
        policy,
        freeze(fixed, precision),
        RewardSum(own_reward(options.reward, options.reward_label, device, precision), options.length_weight),
        [prompt for prompt in train if prompt.text not in known],
        held_out,
        sampling_rules(options, ends, model.head, len(tokenizer), []),
        tokenizer.decode,
        save,
        notes,
        greedy=lambda tuned: greedy(tuned, task),
    )
    return task
