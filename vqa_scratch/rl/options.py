"""The options of `rlhf.py` and its presets. A field is a flag: `kl_coef` is `--kl-coef`. Does not import torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqa_scratch.command_line import first_rank_speaks, parse
from vqa_scratch.errors import UserError
from vqa_scratch.options import Options, option, threads_option

RUN, MODELS, ROLLOUTS = "Run", "Models and data", "Rollouts"
REWARD, UPDATE, LOGGING = "Reward and advantages", "Update", "Evaluation and checkpoints"
BOOK, MINI_NEWS, LM, PPO = {"preset": "book"}, {"preset": "mini-news"}, {"preset": "lm"}, {"algorithm": "ppo"}
DPO = {"algorithm": "dpo"}
SUMMARISING, READ = {"preset": ("mini-news", "book")}, {"preset": ("mini-news", "book", "lm")}
JUDGED = {"reward": None}


@dataclass(frozen=True)
class RLHFOptions(Options):
    """PPO, its relatives, and the tasks they are run on."""

    preset: str = option("mini-news", "The task to run, and its defaults.", RUN, ("mini-news", "book", "lm", "vqa"))
    out: Path = option(Path("runs/rlhf-mini-news"), "Folder of the run.", RUN, may_change=True)
    resume: bool = option(False, "Go on from the last checkpoint of --out.", RUN, may_change=True)
    seed: int = option(0, "Seed of data, initial weights and sampling.", RUN, minimum=0, below=2**32)
    device: str = option("auto", "Where to compute.", RUN, ("auto", "cpu", "cuda"), may_change=True)
    precision: str = option(
        "auto", "Arithmetic; auto is bf16 where it is clearly faster.", RUN, ("auto", "fp32", "bf16")
    )
    threads: int | None = threads_option(RUN)
    parallel: str = option(
        "ddp",
        "Under torchrun: whole policy and reference on every rank, or a part of every tensor.",
        RUN,
        ("ddp", "fsdp"),
        may_change=True,
    )
    cache: Path = option(
        Path("cache"), "Folder of the trained parts, by a hash of what made them.", RUN, only=MINI_NEWS, may_change=True
    )

    policy: str = option(
        "google/flan-t5-small",
        "Policy: folder or Hub id of a T5 for book, of a GPT-2, OPT, Llama or Qwen2 for lm; a run of train.py for vqa.",
        MODELS,
        only={"preset": ("book", "lm", "vqa")},
    )
    reference: str | None = option(
        None,
        "Frozen reference, also the policy before training: as --policy, and by default the same.",
        MODELS,
        only=READ,
    )
    reward: str | None = option(
        None,
        "Own reward, for lm or in place of the two classifiers': FILE.py:FUNCTION or MODULE:FUNCTION, which takes "
        "`Samples` and returns a number a response (docs/library.md), or a text classifier, a folder or Hub id.",
        MODELS,
        only=READ,
    )
    reward_label: str | None = option(
        None, "Class of the classifier --reward whose logit counts; not needed if it has one output.", MODELS
    )
    grammar_model: str = option("textattack/roberta-base-CoLA", "Judge of grammar.", MODELS, only=BOOK | JUDGED)
    grammar_label: str = option("LABEL_1", "Its class for good grammar.", MODELS, only=SUMMARISING | JUDGED)
    grammar_weight: float = option(1.0, "Weight of its logit in the reward.", MODELS, only=SUMMARISING | JUDGED)
    tone_model: str = option(
        "cardiffnlp/twitter-roberta-base-sentiment", "Judge of the tone.", MODELS, only=BOOK | JUDGED
    )
    tone_label: str = option("LABEL_1", "Its class for a neutral tone.", MODELS, only=SUMMARISING | JUDGED)
    tone_weight: float = option(0.5, "Weight of its logit in the reward.", MODELS, only=SUMMARISING | JUDGED)
    facts_weight: float = option(
        0.0, "Weight of a judge of the facts that are kept; 0: none.", MODELS, minimum=0, only=MINI_NEWS | JUDGED
    )
    length_weight: float = option(0.0, "Reward lost for each token of a response.", MODELS)
    articles: Path | None = option(None, "CSV, JSONL or text file with the articles.", MODELS, only=BOOK)
    column: str = option("text", "Column or key of the article or prompt.", MODELS, only={"preset": ("book", "lm")})
    summary_column: str | None = option(
        None, "Column or key that holds a reference summary, for the word overlap.", MODELS, only=BOOK
    )
    prefix: str = option("summarize: ", "Put in front of every article.", MODELS, only=SUMMARISING)
    init: str = option(
        "pretrained",
        "Random weights of the same sizes serve to measure speed.",
        MODELS,
        ("pretrained", "random"),
        only=BOOK,
    )
    max_prompt_tokens: int = option(
        512,
        "Longer articles are cut to this many tokens, end token included, and counted.",
        MODELS,
        minimum=2,
        only=SUMMARISING,
    )
    data: Path | None = option(
        None,
        "For lm the file of prompts: CSV, JSONL, or text with one a line. For vqa the folder with the VQA v2 files; "
        "without it, the data of the policy's run.",
        MODELS,
        only={"preset": ("lm", "vqa")},
        was="data_dir",
    )
    preferences: Path | None = option(
        None,
        "Prompts with two responses each, in place of --data and of what the reward prefers: JSONL or another table "
        "with the columns prompt, chosen and rejected.",
        MODELS,
        only=LM | DPO,
        excludes="data",
    )
    chat: bool | None = option(
        None,
        "Whether texts become what a user says in the chat template of the policy; by default if it has one.",
        MODELS,
        only=LM,
    )
    sft_steps: int = option(500, "Steps of supervised training of the summariser.", MODELS, minimum=1, only=MINI_NEWS)
    reward_steps: int = option(600, "Steps of training of each reward model.", MODELS, minimum=1, only=MINI_NEWS)

    iterations: int = option(
        100,
        "Batches of rollouts in the whole run. With --resume, +N: N more for a finished run.",
        ROLLOUTS,
        minimum=1,
        more=True,
    )
    prompts: int = option(32, "Prompts in a batch.", ROLLOUTS, minimum=1)
    samples: int = option(4, "Responses to each prompt, which share its encoding.", ROLLOUTS, minimum=1)
    max_new_tokens: int = option(32, "Longest response, in tokens.", ROLLOUTS, minimum=1)
    min_new_tokens: int = option(
        0, "The end token is barred before this many tokens, for sampling and scoring alike.", ROLLOUTS, minimum=0
    )
    temperature: float = option(1.0, "Temperature of the policy, for sampling and scoring alike.", ROLLOUTS, above=0)
    no_repeat_ngram_size: int = option(
        0,
        "Bar the repetition of n-grams of this length, sampling and scoring; 0 allows it.",
        ROLLOUTS,
        minimum=0,
        was="no_repeat_ngram",
    )

    algorithm: str = option(
        "ppo",
        "How advantages are computed; with dpo a loss of pairs, of which --kl-coef is the beta. All else is shared.",
        REWARD,
        ("ppo", "rloo", "grpo", "best-of-n", "dpo"),
    )
    kl_coef: float = option(0.05, "Price of one nat of KL, in units of the scaled reward.", REWARD, minimum=0)
    kl_target: float = option(0.0, "Adapt the price towards this KL a sequence; 0 keeps it fixed.", REWARD, minimum=0)
    kl_horizon: float = option(0.1, "Time constant of that, as a share of the run's responses.", REWARD, above=0)
    scale_reward: bool = option(
        True, "Shift and scale rewards once, so that the reference scores 0 +- 1.", REWARD, only={"preferences": None}
    )
    score_clip: float = option(10.0, "Largest scaled reward, either sign; 0 does not clip.", REWARD, minimum=0)
    missing_eos_penalty: float = option(
        1.0, "Taken from the scaled reward of a response that the limit cut off.", REWARD, minimum=0
    )
    whiten_rewards: bool = option(
        False, "Whiten per-token rewards (without moving their mean) before the advantages.", REWARD, never=DPO
    )
    gamma: float = option(1.0, "Discount.", REWARD, minimum=0, maximum=1, only=PPO)
    lam: float = option(
        1.0,
        "Lambda of generalised advantage estimation; below 1 what the critic gets wrong bends the gradient.",
        REWARD,
        minimum=0,
        maximum=1,
        only=PPO,
    )
    whiten_advantages: bool = option(True, "Whiten advantages over the whole batch of rollouts.", REWARD, only=PPO)

    epochs: int = option(4, "Passes over each batch of rollouts.", UPDATE, minimum=1)
    minibatches: int = option(1, "Optimizer steps in a pass.", UPDATE, minimum=1)
    micro_prompts: int = option(
        8, "Prompts whose responses go through the model at once; changes memory, not results.", UPDATE, minimum=1
    )
    learning_rate: float = option(
        1e-5, "Peak learning rate; it falls linearly to 0 over the run.", UPDATE, above=0, may_change=True
    )
    value_lr_scale: float = option(
        1.0, "The value head's learning rate is this many times that of the rest.", UPDATE, above=0, only=PPO
    )
    warmup_steps: int = option(
        10, "Steps over which the learning rate rises; the policy counts its own.", UPDATE, minimum=0
    )
    adam_eps: float = option(1e-5, "Epsilon of Adam.", UPDATE, above=0)
    max_grad_norm: float = option(
        1.0, "Gradients are scaled down to this norm; inf: never.", UPDATE, above=0, maximum=math.inf, may_change=True
    )
    clip_low: float = option(0.2, "The ratio is clipped below 1 minus this.", UPDATE, minimum=0, never=DPO)
    clip_high: float = option(0.2, "The ratio is clipped above 1 plus this.", UPDATE, minimum=0, never=DPO)
    dual_clip: float = option(3.0, "Bound on a bad token's loss, in advantages; 0: none.", UPDATE, minimum=0, never=DPO)
    value_clip: float = option(
        0.2,
        "Values move at most this far from the old ones, in standard deviations of returns.",
        UPDATE,
        above=0,
        only=PPO,
    )
    value_coef: float = option(0.1, "Weight of the value loss.", UPDATE, minimum=0, only=PPO)
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.", UPDATE, minimum=0)
    early_stop_kl: float = option(
        0.1, "Leave a batch before the step whose mean k3 a token exceeds 1.5 times this; 0: never.", UPDATE, minimum=0
    )
    freeze: str = option(
        "nothing",
        "What stays fixed; a frozen encoder runs once for policy, reference and all epochs.",
        UPDATE,
        ("nothing", "encoder"),
        never=LM,
        renamed={"none": "nothing"},
    )
    critic: str = option(
        "fitted",
        "What PPO subtracts: the best fit of the critic and the prompt's other responses; or the critic alone, whose "
        "loss also moves the policy's layers (shared), or does not (detached).",
        UPDATE,
        ("fitted", "shared", "detached"),
        only=PPO,
    )
    critic_warmup: int = option(
        0, "Iterations at the start in which only the value head learns.", UPDATE, minimum=0, only=PPO
    )

    log_to: str | None = option(
        None, "Log to this too, besides metrics.jsonl.", LOGGING, ("tensorboard", "wandb"), may_change=True
    )
    profile: int | None = option(
        None,
        "Profile this many iterations after the first three, into trace.json.",
        LOGGING,
        minimum=1,
        maximum=50,
        may_change=True,
    )
    eval_prompts: int = option(128, "Prompts, never trained on, for the figures before and after.", LOGGING, minimum=1)
    eval_samples: int = option(4, "Responses to each of them.", LOGGING, minimum=1)
    frontier_prompts: int = option(
        48, "Prompts among them for the best possible reward at each KL.", LOGGING, minimum=1
    )
    frontier_samples: int = option(
        64, "Reference responses to each of those, which best-of-n reweights.", LOGGING, minimum=2
    )
    save_every: int = option(
        10, "Iterations between two checkpoints.", LOGGING, minimum=1, was="checkpoint_every", may_change=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_label is not None and self.reward is None:
            raise UserError("--reward-label names a class of the classifier --reward, which is not given")
        if self.algorithm != "ppo" and self.samples < 2:
            raise UserError(f"--algorithm {self.algorithm} compares responses: --samples must be at least 2")
        if self.algorithm == "dpo" and self.samples % 2:
            raise UserError(f"--algorithm dpo compares pairs: --samples must be even, not {self.samples}")
        if self.preferences is not None and self.samples != 2:
            raise UserError(f"--preferences has two responses to a prompt: --samples must be 2, not {self.samples}")
        if self.preferences is not None and (self.min_new_tokens or self.no_repeat_ngram_size or self.kl_target):
            raise UserError("--preferences goes without --min-new-tokens, --no-repeat-ngram-size and --kl-target")
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(f"--min-new-tokens {self.min_new_tokens} exceeds --max-new-tokens {self.max_new_tokens}")
        if self.prompts % self.minibatches:
            raise UserError(f"--prompts {self.prompts} do not divide into --minibatches {self.minibatches}")
        if self.frontier_prompts > self.eval_prompts:
            raise UserError(f"--frontier-prompts {self.frontier_prompts} exceed --eval-prompts {self.eval_prompts}")
        if 0 < self.dual_clip <= 1:
            raise UserError(
                f"--dual-clip {self.dual_clip} leaves bad tokens no gradient: give more than 1, or 0 for none"
            )
        if self.freeze == "encoder" and self.reference:
            raise UserError("--freeze encoder shares the policy's encoder with the reference; leave out --reference")


PRESETS: dict[str, dict[str, Any]] = {
    "mini-news": {
        "grammar_label": "acceptable",
        "tone_label": "neutral",
        "prefix": "",
        "learning_rate": 4e-4,
        "value_lr_scale": 3.0,
        "value_clip": 1.0,
        "kl_coef": 0.4,
        "kl_target": 3.0,
        "kl_horizon": 0.2,
        "max_new_tokens": 32,
        "samples": 8,
        "epochs": 2,
        "iterations": 50,
    },
    "book": {
        "out": Path("runs/rlhf-book"),
        "prompts": 8,
        "samples": 1,
        "max_new_tokens": 64,
        "micro_prompts": 2,
        "iterations": 250,
    },
    "lm": {
        "out": Path("runs/rlhf-lm"),
        "policy": "openai-community/gpt2",
        "column": "prompt",
        "algorithm": "rloo",
        "prompts": 16,
        "max_new_tokens": 64,
        "micro_prompts": 2,
        "epochs": 1,
        "eval_prompts": 64,
    },
    "vqa": {
        "out": Path("runs/rlhf-vqa"),
        "policy": "runs/vqa",
        "max_new_tokens": 8,
        "length_weight": 0.01,
        "algorithm": "rloo",
        "freeze": "encoder",
        "prompts": 256,
        "epochs": 2,
        "micro_prompts": 64,
        "iterations": 22,
        "learning_rate": 1e-4,
        "eval_prompts": 512,
        "eval_samples": 1,
    },
}


def read_command_line(argv: Sequence[str]) -> RLHFOptions:
    """The options that the flags ask for. `--help` prints them and exits. Raises UserError, one line, on a flag or
    value that cannot be."""
    with first_rank_speaks():
        return parse(
            [RLHFOptions],
            PRESETS,
            argv,
            program="rlhf.py",
            about="Tune a language model by PPO, RLOO, GRPO or DPO against a frozen reference, and report the result.",
            example="python rlhf.py --preset book --articles news.csv",
        )
