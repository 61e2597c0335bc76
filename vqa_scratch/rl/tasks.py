"""Builds the task of a preset: a policy, its frozen reference, a reward, and prompts for training and evaluation."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vqa_scratch.data.articles import read_articles
from vqa_scratch.data.news import news
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.errors import UserError
from vqa_scratch.models.bert import BertConfig
from vqa_scratch.models.classifier import TextClassifier
from vqa_scratch.models.t5 import T5, T5Config
from vqa_scratch.rl import mini_news
from vqa_scratch.rl.metrics import mean_overlap
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import Backbone, SamplingRules, T5Policy, freeze
from vqa_scratch.rl.rewards import ClassifierReward, RewardPart, RewardSum, length_penalty
from vqa_scratch.rl.types import Prompt, Samples

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
    figures: dict[str, Callable[[Samples], float]] = field(default_factory=dict)  # of its own, before and after
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = lambda saved: saved  # converts an older checkpoint


def encode_articles(
    texts: list[str], references: list[str], tokenizer: Tokenizer, prefix: str, longest: int
) -> tuple[list[Prompt], int]:
    """Prompts of at most `longest` tokens, and how many articles had to be cut. Raises UserError on an empty one."""
    prompts, before = [], tokenizer.truncated
    for i, (text, reference) in enumerate(zip(texts, references, strict=True)):
        if not text.strip():
            raise UserError(f"article {i} is empty: there is nothing to summarise")
        ids, _ = tokenizer.encode_batch([prefix + text], max_length=longest)
        prompts.append(Prompt(text, tuple(ids[0].tolist()), reference))
    return prompts, tokenizer.truncated - before


def cut_note(cut: int, count: int, options: RLHFOptions) -> list[str]:
    return [f"{cut} of {count} articles cut to {options.max_prompt_tokens} tokens"] if cut else []


def sampling_rules(options: RLHFOptions, policy: T5Policy, tokenizer: Tokenizer) -> SamplingRules:
    """Rules that bar padding and the rows of the embedding without a token."""
    size = policy.model.config.vocab_size
    if len(tokenizer) > size:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the model only {size}")
    barred = torch.arange(size) >= len(tokenizer)
    barred[policy.pad_id] = True
    barred = barred.to(next(policy.parameters()).device)
    return SamplingRules(
        policy.eos_id,
        options.max_new_tokens,
        options.min_new_tokens,
        options.temperature,
        barred,
        options.no_repeat_ngram_size,
    )


def check_same_vocabulary(policy: T5, reference: T5) -> None:
    """Raise UserError unless a KL between the two models is defined."""
    ours, theirs = policy.config, reference.config
    for name in ("vocab_size", "eos_id", "start_id"):
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"the reference has {name} {getattr(theirs, name)}, the policy {getattr(ours, name)}: "
                "a KL between them needs the same vocabulary"
            )


def classifier_reward(
    options: RLHFOptions,
    grammar: tuple[TextClassifier, Tokenizer],
    tone: tuple[TextClassifier, Tokenizer],
    precision: torch.dtype,
) -> RewardSum:
    """grammar_weight * grammar logit + tone_weight * neutral logit, and a price a token if one is set."""
    parts = [
        RewardPart("grammar", options.grammar_weight, ClassifierReward(*grammar, options.grammar_label)),
        RewardPart("neutral", options.tone_weight, ClassifierReward(*tone, options.tone_label)),
    ]
    for model, _ in (grammar, tone):
        freeze(model, precision)
    if options.length_weight:
        parts.append(RewardPart("shortness", options.length_weight, length_penalty))
    return RewardSum(parts)


def summarising_task(
    options: RLHFOptions,
    model: T5,
    reference: T5 | None,
    tokenizer: Tokenizer,
    reward: RewardSum,
    train: list[Prompt],
    held_out: list[Prompt],
    precision: torch.dtype,
    notes: list[str],
) -> Task:
    """Put the parts together, with a frozen copy of the policy as reference if none is given."""
    policy = T5Policy(model)
    if reference is not None:
        check_same_vocabulary(model, reference)
    frozen = freeze(copy.deepcopy(policy), precision) if reference is None else freeze(T5Policy(reference), precision)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save(folder)

    return Task(
        policy,
        frozen,
        reward,
        train,
        held_out,
        sampling_rules(options, policy, tokenizer),
        lambda ids: tokenizer.decode(ids),
        save,
        notes,
        {"overlap": mean_overlap} if any(prompt.reference for prompt in held_out) else {},
    )


def mini_news_task(options: RLHFOptions, device: torch.device, precision: torch.dtype) -> Task:
    """Made-up news, a T5 of half a million parameters, and two reward models, made here or taken from the cache."""
    reference = T5.from_pretrained(options.reference).to(device) if options.reference else None
    made, folder = mini_news.prepare(options.cache, options.seed, options.sft_steps, options.reward_steps, str(device))
    notes = [f"summariser and reward models: {folder}"]

    def prompts(count: int, seed: int) -> list[Prompt]:
        items = news(count, seed)
        texts, references = [item.article for item in items], [item.summary for item in items]
        encoded, cut = encode_articles(texts, references, made.tokenizer, options.prefix, options.max_prompt_tokens)
        notes.extend(cut_note(cut, count, options))
        return encoded

    grammar, tone = ((model.to(device), made.reward_tokenizer) for model in (made.grammar, made.tone))
    reward = classifier_reward(options, grammar, tone, precision)
    return summarising_task(
        options,
        made.summariser.to(device),
        reference,
        made.tokenizer,
        reward,
        prompts(max(MINI_NEWS_ARTICLES, options.prompts), mini_news.TRAIN_SEED),
        prompts(options.eval_prompts, mini_news.HELD_OUT_SEED),
        precision,
        notes,
    )


def book_articles(options: RLHFOptions) -> tuple[list[str], list[str], list[str]]:
    """Articles, their reference summaries ("" where there is none), and notes. Raises UserError on too few."""
    notes = []
    if options.articles:
        articles = read_articles(options.articles, options.column, options.summary_column)
        texts, summaries = articles.texts, articles.summaries
        if articles.empty:
            notes.append(f"{len(articles.empty)} empty articles left out, the first at line {articles.empty[0]}")
    elif options.init == "random":
        items = news(8 * (options.eval_prompts + options.prompts), seed=options.seed)
        texts = [" ".join(item.article for item in items[i : i + 8]) for i in range(0, len(items), 8)]
        summaries = [""] * len(texts)
        notes.append("no --articles given: made-up ones serve to measure speed")
    else:
        raise UserError("--preset book needs --articles, a CSV, JSONL or text file")
    if len(texts) < options.eval_prompts + options.prompts:
        raise UserError(
            f"{len(texts)} articles are too few: {options.eval_prompts} are held out (--eval-prompts) and a batch "
            f"needs {options.prompts} (--prompts)"
        )
    return texts, summaries, notes


def book_task(options: RLHFOptions, device: torch.device, precision: torch.dtype) -> Task:
    """flan-t5-small and two RoBERTa classifiers on articles from a file; or random weights of their sizes."""
    texts, summaries, notes = book_articles(options)  # before gigabytes are loaded
    if options.init == "random":
        policy, tokenizer, grammar, tone = _random_book(options)
    else:
        policy, tokenizer = T5.from_pretrained(options.policy), Tokenizer.from_pretrained(options.policy)
        grammar, tone = (
            (TextClassifier.from_pretrained(name), Tokenizer.from_pretrained(name))
            for name in (options.grammar_model, options.tone_model)
        )
    reference = T5.from_pretrained(options.reference).to(device) if options.reference else None
    reward = classifier_reward(options, (grammar[0].to(device), grammar[1]), (tone[0].to(device), tone[1]), precision)

    prompts, cut = encode_articles(texts, summaries, tokenizer, options.prefix, options.max_prompt_tokens)
    notes += cut_note(cut, len(prompts), options)
    random.Random(options.seed).shuffle(prompts)
    held_out, train = prompts[: options.eval_prompts], prompts[options.eval_prompts :]
    return summarising_task(options, policy.to(device), reference, tokenizer, reward, train, held_out, precision, notes)


def _random_book(
    options: RLHFOptions,
) -> tuple[T5, Tokenizer, tuple[TextClassifier, Tokenizer], tuple[TextClassifier, Tokenizer]]:
    """Models of the book's sizes with random weights, and a tokenizer learned on made-up news."""
    torch.manual_seed(options.seed)
    tokenizer, reward_tokenizer = mini_news.tokenizers_for(news(500, seed=0))
    roberta = BertConfig(layout="roberta", vocab_size=50265, max_positions=514, token_types=1, norm_eps=1e-5, pad_id=1)
    policy = T5(T5Config())
    made = [TextClassifier(roberta, tuple(f"LABEL_{i}" for i in range(n))) for n in (2, 3)]
    return policy, tokenizer, (made[0], reward_tokenizer), (made[1], reward_tokenizer)
