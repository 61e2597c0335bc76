"""Every option of `rlhf.py`, one sentence each, and the presets."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vqa_scratch.errors import UserError
from vqa_scratch.options import option

ALGORITHMS = ("ppo", "rloo", "grpo", "best-of-n")


@dataclass(frozen=True)
class RLHFConfig:
    preset: str = option("mini-news", "Which task to run.", ("mini-news", "book", "vqa"))
    out: Path = option(Path("runs/rlhf-mini-news"), "Folder of the run.")
    seed: int = option(0, "Seed of data, initial weights and sampling.")
    device: str = option("auto", "Where to compute.", ("auto", "cpu", "cuda"))
    precision: str = option("auto", "Arithmetic; auto is bf16 where it is clearly faster.", ("auto", "fp32", "bf16"))
    parallel: str = option(
        "ddp",
        "Under torchrun: whole policy and reference on every rank, or a part of every tensor.",
        ("ddp", "fsdp"),
    )

    # ------------------------------------------------------------------------------------------ models and data
    policy: str = option("google/flan-t5-small", "Policy: folder or Hub id of a T5 (book), or a run of train.py (vqa).")
    reference: str = option(
        "", "Frozen reference: folder or Hub id of a T5, which is also what `before` measures; empty: the first policy."
    )
    grammar_model: str = option("textattack/roberta-base-CoLA", "Classifier that judges grammar (book).")
    grammar_label: str = option("LABEL_1", "Its class for good grammar.")
    grammar_weight: float = option(1.0, "Weight of that class's logit in the reward.")
    tone_model: str = option("cardiffnlp/twitter-roberta-base-sentiment", "Classifier that judges the tone (book).")
    tone_label: str = option("LABEL_1", "Its class for a neutral tone.")
    tone_weight: float = option(0.5, "Weight of that class's logit in the reward.")
    length_weight: float = option(0.0, "Reward lost for each token of a response.")
    articles: str = option("", "CSV, JSONL or text file with the articles (book).")
    column: str = option("text", "Column or key that holds the article (book).")
    summary_column: str = option("", "Column or key that holds a reference summary, for the word overlap (book).")
    prefix: str = option("summarize: ", "Put in front of every article.")
    init: str = option(
        "pretrained", "Random weights of the same sizes serve to measure speed (book).", ("pretrained", "random")
    )
    max_prompt_tokens: int = option(512, "Longer articles are cut to this many tokens, and counted.")
    data_dir: str = option("", "Folder with the VQA v2 files (vqa).")

    # ------------------------------------------------------------------------------------------------- rollouts
    iterations: int = option(100, "Batches of rollouts in the whole run.")
    prompts: int = option(32, "Prompts in a batch.")
    samples: int = option(4, "Responses to each prompt, which share its encoding.")
    max_new_tokens: int = option(32, "Longest response, in tokens.")
    min_new_tokens: int = option(0, "The end token is barred before this many tokens, for sampling and scoring alike.")
    temperature: float = option(1.0, "Temperature of the policy, for sampling and scoring alike.")
    no_repeat_ngram: int = option(0, "Bar the repetition of n-grams of this length, sampling and scoring; 0 allows it.")

    # ---------------------------------------------------------------------------------------- reward and advantage
    algorithm: str = option("ppo", "How advantages come about; all else is shared.", ALGORITHMS)
    kl_coef: float = option(0.05, "Price of one nat of KL, in units of the scaled reward.")
    kl_target: float = option(0.0, "Steer the price towards this KL a sequence; 0 keeps the price fixed.")
    kl_horizon: float = option(0.1, "Time constant of that steering, as a share of the run's responses.")
    scale_reward: bool = option(True, "Shift and scale rewards once, so that the reference scores 0 +- 1.")
    score_clip: float = option(10.0, "Largest scaled reward, either sign; 0 does not clip.")
    missing_eos_penalty: float = option(1.0, "Taken from the scaled reward of a response that the limit cut off.")
    whiten_rewards: bool = option(False, "Whiten per-token rewards (without moving their mean) before the advantages.")
    gamma: float = option(1.0, "Discount (ppo).")
    lam: float = option(0.95, "Lambda of generalised advantage estimation (ppo).")
    whiten_advantages: bool = option(True, "Whiten advantages over the whole batch of rollouts (ppo).")

    # --------------------------------------------------------------------------------------------------- update
    epochs: int = option(4, "Passes over each batch of rollouts.")
    minibatches: int = option(1, "Optimizer steps in a pass.")
    micro_prompts: int = option(8, "Prompts whose responses go through the model at once; changes memory, not results.")
    learning_rate: float = option(1e-5, "Peak learning rate; it falls linearly to 0 over the run.")
    value_lr_scale: float = option(1.0, "The value head's learning rate is this many times that of the rest.")
    warmup_steps: int = option(10, "Steps over which the learning rate rises; the policy counts its own.")
    adam_eps: float = option(1e-5, "Epsilon of Adam.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
    clip_low: float = option(0.2, "The ratio is clipped below 1 minus this.")
    clip_high: float = option(0.2, "The ratio is clipped above 1 plus this.")
    dual_clip: float = option(3.0, "Bound on the loss of bad tokens, in advantages; 0 sets none.")
    value_clip: float = option(
        0.2, "Values move at most this far from the old ones, in standard deviations of returns."
    )
    value_coef: float = option(0.1, "Weight of the value loss (ppo).")
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.")
    early_stop_kl: float = option(
        0.1, "Leave a batch before the step whose mean k3 a token exceeds 1.5 times this; 0: never."
    )
    freeze: str = option(
        "none", "What stays fixed; a frozen encoder runs once for policy, reference, all epochs.", ("none", "encoder")
    )
    critic: str = option(
        "shared", "Whether the value loss also moves the policy's layers (ppo).", ("shared", "detached")
    )
    critic_warmup: int = option(2, "Iterations at the start in which only the value head learns (ppo).")

    # -------------------------------------------------------------------------------------- measuring and keeping
    eval_prompts: int = option(128, "Prompts, never trained on, for the figures before and after.")
    eval_samples: int = option(4, "Responses to each of them.")
    frontier_prompts: int = option(48, "Prompts among them for the best possible reward at each KL.")
    frontier_samples: int = option(64, "Reference responses to each of those, which best-of-n reweights.")
    checkpoint_every: int = option(10, "Iterations between checkpoints.")
    resume: bool = option(False, "Go on from the last checkpoint in the run's folder.")
    cache: Path = option(Path("cache"), "Folder for the trained parts of mini-news, named by a hash of what made them.")
    sft_steps: int = option(500, "Steps of supervised training of the mini-news summariser.")
    reward_steps: int = option(600, "Steps of training of each mini-news reward model.")

    def __post_init__(self) -> None:
        for f in fields(self):
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            if choices and value not in choices:
                raise UserError(f"{_flag(f.name)} must be one of {', '.join(choices)}, not {value!r}")
            if isinstance(value, float) and not math.isfinite(value) and f.name != "max_grad_norm":
                raise UserError(f"{_flag(f.name)} must be a finite number, not {value}")
            known = PRESETS[self.preset].get(f.name, f.default)
            if f.name in ONLY and self.preset not in ONLY[f.name] and value != known:
                raise UserError(
                    f"{_flag(f.name)} means nothing with --preset {self.preset}: it is a flag of "
                    + " and ".join(ONLY[f.name])
                )
        positive = (
            "iterations prompts samples max_new_tokens epochs minibatches micro_prompts learning_rate temperature"
        )
        positive += " max_grad_norm adam_eps eval_prompts eval_samples frontier_prompts checkpoint_every value_lr_scale"
        positive += " value_clip kl_horizon sft_steps reward_steps"
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise UserError(f"{_flag(name)} must be positive, not {getattr(self, name)}")
        nonnegative = "kl_coef kl_target score_clip min_new_tokens no_repeat_ngram warmup_steps dual_clip value_coef"
        nonnegative += " early_stop_kl critic_warmup missing_eos_penalty clip_low clip_high entropy_coef"
        for name in nonnegative.split():
            if not getattr(self, name) >= 0:
                raise UserError(f"{_flag(name)} must not be negative, but is {getattr(self, name)}")
        if self.algorithm != "ppo" and self.samples < 2:
            raise UserError(
                f"--algorithm {self.algorithm} compares responses to one prompt: --samples must be 2 or more"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(f"--min-new-tokens {self.min_new_tokens} exceeds --max-new-tokens {self.max_new_tokens}")
        if self.prompts % self.minibatches:
            raise UserError(f"--prompts {self.prompts} do not divide into --minibatches {self.minibatches}")
        if not 0 <= self.gamma <= 1 or not 0 <= self.lam <= 1:
            raise UserError(f"--gamma and --lam lie between 0 and 1, not {self.gamma} and {self.lam}")
        if self.frontier_prompts > self.eval_prompts:
            raise UserError(f"--frontier-prompts {self.frontier_prompts} exceed --eval-prompts {self.eval_prompts}")
        if 0 < self.dual_clip <= 1:
            raise UserError(
                f"--dual-clip {self.dual_clip} leaves bad tokens no gradient: give more than 1, or 0 for none"
            )
        if self.max_prompt_tokens < 2:
            raise UserError(f"--max-prompt-tokens {self.max_prompt_tokens} leaves no room beside the end token")
        if self.freeze == "encoder" and self.reference:
            raise UserError("--freeze encoder shares the policy's encoder with the reference; leave out --reference")
        if self.frontier_samples < 2:
            raise UserError(f"--frontier-samples must be 2 or more, not {self.frontier_samples}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# Flags that some presets alone look at; elsewhere they would do nothing.
ONLY = {name: ("book",) for name in "articles column summary_column grammar_model tone_model init".split()}
ONLY |= {name: ("mini-news",) for name in "cache sft_steps reward_steps".split()}
ONLY |= {"policy": ("book", "vqa"), "data_dir": ("vqa",)}
SUMMARISING = "reference prefix max_prompt_tokens grammar_label grammar_weight tone_label tone_weight"
ONLY |= {name: ("mini-news", "book") for name in SUMMARISING.split()}

PRESETS: dict[str, dict[str, Any]] = {
    "mini-news": {
        "grammar_label": "acceptable",
        "tone_label": "neutral",
        "prefix": "",
        "learning_rate": 3e-4,
        "value_lr_scale": 3.0,
        "value_clip": 1.0,
        "kl_target": 4.0,
        "kl_horizon": 0.05,
        "max_new_tokens": 32,
        "iterations": 60,
    },
    "book": {
        "out": Path("runs/rlhf-book"),
        "prompts": 8,
        "samples": 1,
        "max_new_tokens": 64,
        "micro_prompts": 2,
        "iterations": 250,
    },
    "vqa": {
        "out": Path("runs/rlhf-vqa"),
        "policy": "runs/vqa",
        "max_new_tokens": 8,
        "length_weight": 0.01,
        "learning_rate": 1e-4,
        "value_lr_scale": 3.0,
        "eval_prompts": 512,
        "eval_samples": 1,
    },
}
