"""Builds the task of a preset: a policy, its frozen reference, a reward, and prompts for training and evaluation."""

import copy
import importlib
import random
import runpy
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vqa_scratch.data.news import news
from vqa_scratch.data.prompts import read_articles
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.errors import UserError, some
from vqa_scratch.generation_options import end_ids
from vqa_scratch.models.bert import BertConfig
from vqa_scratch.models.classifier import TextClassifier, check_label
from vqa_scratch.models.hf_config import Released
from vqa_scratch.models.t5 import T5, T5Config
from vqa_scratch.rl import mini_news
from vqa_scratch.rl.metrics import facts_kept, mean_overlap
from vqa_scratch.rl.mini_news import Models
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import Backbone, SamplingRules, T5Policy, freeze, sampling_rules
from vqa_scratch.rl.rewards import ClassifierReward, FaithfulReward, RewardPart, RewardSum
from vqa_scratch.rl.types import Prompt, Samples

JUDGED = {"grammar": "grammar", "tone": "neutral", mini_news.FACTS: "faithful"}  # what each judge rewards
MINI_NEWS_ARTICLES = 4_000  # for PPO; the summariser was trained on the first of them


@dataclass
class Task:
    policy: Backbone
    reference: Backbone
    reward: RewardSum
    train: list[Prompt]
    held_out: list[Prompt]
    rules: SamplingRules
    decode: Callable[[list[int]], str]
    save: Callable[[Path], None]  # writes the policy as a checkpoint folder
    notes: list[str] = field(default_factory=list)  # one-line remarks for the log
    figures: Callable[[Backbone, Samples], dict[str, float]] = lambda policy, samples: {}  # before and after, its own
    greedy: Callable[[Backbone], list[tuple[str, float]]] = lambda policy: []  # likeliest held-out responses, rewards
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = lambda saved: saved  # converts an older checkpoint

    def stored_in(self, dtype: torch.dtype) -> None:
        """Store what is frozen, the reference and the judges, in the number format of the run."""
        judges = [part.function.model for part in self.reward.parts if isinstance(part.function, ClassifierReward)]
        for model in (self.reference, *judges):
            freeze(model, dtype)


def check_same_vocabulary(policy: Released[Any], reference: Released[Any], names: Sequence[str]) -> None:
    """Raise UserError unless these fields of both configs are equal, without which a KL between them is not defined."""
    ours, theirs = policy.config, reference.config
    for name in names:
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"the reference has {name} {getattr(theirs, name)}, the policy {getattr(ours, name)}: "
                "a KL between them needs the same vocabulary"
            )


def articles_for(options: RLHFOptions) -> tuple[list[Prompt], list[str]]:
    """Articles with their reference summaries and facts where they are known, first those for evaluation, and notes.

    Raises UserError on too few.
    """
    notes: list[str] = []
    if options.preset == "mini-news":
        items = news(options.eval_prompts, mini_news.HELD_OUT_SEED)
        items += news(max(MINI_NEWS_ARTICLES, options.prompts), mini_news.TRAIN_SEED)
        return [Prompt(item.article, reference=item.summary, facts=item.facts) for item in items], notes
    if options.articles:
        articles, empty = read_articles(options.articles, options.column, options.summary_column)
        if empty:
            notes.append(f"{len(empty)} empty articles left out, the first at {empty[0]}")
    elif options.init == "random":
        items = news(8 * (options.eval_prompts + options.prompts), seed=options.seed)
        articles = [(" ".join(item.article for item in items[i : i + 8]), "") for i in range(0, len(items), 8)]
        notes.append("no --articles given: made-up ones serve to measure speed")
    else:
        raise UserError("--preset book needs --articles, a CSV, JSONL or text file")
    shuffled_if_enough(articles, "articles", options)
    return [Prompt(text, reference=summary) for text, summary in articles], notes


def shuffled_if_enough(items: MutableSequence[Any], kind: str, options: RLHFOptions) -> None:
    """Shuffle what a file holds. Raises UserError if it is too little for figures and a batch."""
    if len(items) < options.eval_prompts + options.prompts:
        raise UserError(
            f"{len(items)} {kind} are too few: {options.eval_prompts} are held out (--eval-prompts) and a batch "
            f"needs {options.prompts} (--prompts)"
        )
    random.Random(options.seed).shuffle(items)


def random_models(options: RLHFOptions) -> Models:
    """Models of the book's sizes with random weights, and tokenizers learned on made-up news."""
    torch.manual_seed(options.seed)
    tokenizer, reward_tokenizer = mini_news.tokenizers_for(news(500, seed=0))
    roberta = BertConfig(layout="roberta", vocab_size=50265, max_positions=514, token_types=1, norm_eps=1e-5, pad_id=1)
    policy = T5(T5Config())
    made = [TextClassifier(roberta, tuple(f"LABEL_{i}" for i in range(n))) for n in (2, 3)]
    judges = {n: (model, reward_tokenizer) for n, model in zip(("grammar", "tone"), made, strict=True)}
    return Models(policy, tokenizer, judges)


def models_for(options: RLHFOptions, device: torch.device) -> tuple[Models, list[str]]:
    """The models of a preset, on the CPU: trained here or taken from the cache, read, or random; and notes."""
    if options.preset == "mini-news":
        for name, label in (("grammar", options.grammar_label), ("tone", options.tone_label)):
            check_label(mini_news.JUDGES[name][1], label)  # now, not after minutes of training
        steps, facts = (options.sft_steps, options.reward_steps), options.facts_weight > 0
        folder = mini_news.prepare(options.cache, options.seed, *steps, str(device), facts)
        names = [name for name in JUDGED if not options.reward and (facts or name != mini_news.FACTS)]
        trained = {name: folder / name for name in names}
        made = mini_news.load(folder / "summariser", trained)
        return made, [f"summariser and reward models: {folder}"]
    if options.init == "random":
        return random_models(options), []
    judges = {} if options.reward else {"grammar": options.grammar_model, "tone": options.tone_model}
    return mini_news.load(options.policy, judges), []


def own_reward(what: str, label: str | None, device: torch.device, precision: torch.dtype) -> list[RewardPart]:
    """The reward of `--reward`: a function FILE.py:NAME or MODULE:NAME, or the logit of a class of a text classifier.

    Raises UserError if there is no such function, or if the classifier has several classes and none is named.
    """
    path, _, name = what.rpartition(":")
    if path and not Path(what).is_dir():
        if path.endswith(".py") and not Path(path).is_file():
            raise UserError(f"--reward {what}: there is no file {path}")
        try:  # the user's own code
            names = runpy.run_path(path) if path.endswith(".py") else vars(importlib.import_module(path))
        except ModuleNotFoundError as error:
            raise UserError(f"--reward {what}: {error}; give FILE.py:NAME, MODULE:NAME or a classifier") from error
        function = names.get(name)
        if not callable(function):
            raise UserError(f"--reward {what}: {path} has no function {name!r}")
        return [RewardPart(name, 1.0, function)]
    model, tokenizer = TextClassifier.from_pretrained(what).to(device), Tokenizer.from_pretrained(what)
    if label is None and len(model.labels) > 1:
        raise UserError(f"--reward {what} has the classes {some(model.labels)}: name one with --reward-label")
    return [RewardPart("reward", 1.0, ClassifierReward(model, tokenizer, label or model.labels[0], precision))]


def summarising_task(options: RLHFOptions, device: torch.device, precision: torch.dtype) -> Task:
    """A T5 that summarises articles and two classifiers that judge its summaries; the reference is a frozen copy if
    none is given."""
    articles, notes = articles_for(options)  # before gigabytes are loaded, or models trained
    reference = T5.from_pretrained(options.reference) if options.reference else None
    models, more = models_for(options, device)
    model, tokenizer = models.summariser, models.tokenizer
    if reference is not None:
        check_same_vocabulary(model, reference, ("vocab_size", "eos_id", "start_id"))
    tokenizer.check_fits(model.config.vocab_size, "the T5")

    if tokenizer.eos_id not in (None, ends := end_ids(model.config.eos_id)[0]):
        more.append(f"the tokenizer ends a text with id {tokenizer.eos_id}, but responses end with the model's, {ends}")

    parts = own_reward(options.reward, options.reward_label, device, precision) if options.reward else []
    for name, judge in models.judges.items():
        judge[0].to(device)
        if name == mini_news.FACTS:
            reward: FaithfulReward | ClassifierReward = FaithfulReward(*judge, precision)
        else:
            reward = ClassifierReward(*judge, getattr(options, f"{name}_label"), precision)
        parts.append(RewardPart(JUDGED[name], getattr(options, f"{name}_weight"), reward))
    policy = T5Policy(model).to(device)
    fixed = copy.deepcopy(policy) if reference is None else T5Policy(reference).to(device)

    prompts = []
    for article in articles:
        ids, _ = tokenizer.encode_batch([options.prefix + article.text], max_length=options.max_prompt_tokens)
        prompts.append(replace(article, ids=tuple(ids[0].tolist())))
    if tokenizer.truncated:
        more.append(f"{tokenizer.truncated} of {len(prompts)} articles cut to {options.max_prompt_tokens} tokens")
    held_out, train = prompts[: options.eval_prompts], prompts[options.eval_prompts :]

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save(folder)

    def figures(_: Backbone, samples: Samples) -> dict[str, float]:
        overlap = {"overlap": mean_overlap(samples)} if any(p.reference for p in samples.prompts) else {}
        return overlap | facts_kept(samples)

    return Task(
        policy,
        freeze(fixed, precision),
        RewardSum(parts, options.length_weight),
        train,
        held_out,
        sampling_rules(options, policy.eos_id, model.embedding.weight, len(tokenizer), [policy.pad_id]),
        tokenizer.decode,
        save,
        notes + more,
        figures,
    )
