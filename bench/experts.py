"""Experts in place of MLPs, side by side: what each row learns from the same questions, and what it costs.

Every run is one of `train.py` on the built-in data set, with the same encoders, connector, width and number of steps. A
token reads two of eight experts, each half as wide as the MLP of the first row, so as many weights as there; the MLP of
the second row is as wide as the eight together. Tokens are spread by a loss, by biases, or by nothing.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import connector_speed, results
from bench.connector_runs import Job, Plan, check_alike, jobs_of, train_all
from bench.connectors import about, about_text, provisional, spread
from vqa_scratch import systems
from vqa_scratch.data.vqa_v2 import VQASample, read_vqa
from vqa_scratch.models.vqa import labelled_loss
from vqa_scratch.nn.experts import MixtureOfExperts, Routing
from vqa_scratch.options import defaults_of
from vqa_scratch.storage import read_object
from vqa_scratch.systems.experts import routed_states
from vqa_scratch.systems.options import VQAOptions

EXPERTS, PER_TOKEN = 8, 2
WIDE = 4 * defaults_of(VQAOptions)["width"] * EXPERTS // PER_TOKEN  # of an MLP as wide as all experts together
READ, AT_ONCE = 2_000, 256  # validation questions whose tokens are counted; of a batch
WORDS = 6  # of an expert in the table
HEAD = "decoder|accuracy|loss|load entropy|least layer|largest load|set by the word|parameters|a token reads"


class Row(NamedTuple):
    """One kind of decoder."""

    name: str
    folder: str
    flags: tuple[str, ...]


def all_rows() -> list[Row]:
    """Dense of both sizes, and experts balanced in each way."""
    made = (f"--experts={EXPERTS}", f"--experts-per-token={PER_TOKEN}")
    ways = {"loss": "a loss", "bias": "biases", "none": "nothing"}
    return [
        Row("one MLP, of the active size", "active", ()),
        Row("one MLP, of the total size", "total", (f"--decoder-hidden={WIDE}",)),
        *(Row(f"experts, spread by {how}", way, (*made, f"--balance={way}")) for way, how in ways.items()),
    ]


# ---------------------------------------------------------------------------------------------- what a run gives


@dataclass
class Run:
    """The figures of one finished run."""

    summary: dict[str, Any]
    loss: float  # nats a labelled token of the validation questions
    parameters: int
    active: int  # those that a token reads
    counts: Tensor  # (L, V, E): how often each expert of a layer took each token of the vocabulary; L 0 without experts

    @property
    def entropies(self) -> list[float]:
        """Of the loads of each layer, over that of even ones."""
        return [entropy(of.sum(0)) / math.log(of.shape[1]) for of in self.counts]

    @property
    def largest(self) -> float | None:
        """The largest load of a layer over the mean one."""
        loads = self.counts.sum(1).double()
        return float((loads.amax(1) / loads.mean(1)).max()) if len(loads) else None

    @property
    def by_word(self) -> list[float]:
        """Of each layer, the share of the entropy of the expert that the word explains."""
        return [1 - conditional_entropy(of) / max(entropy(of.sum(0)), 1e-12) for of in self.counts]


def entropy(counts: Tensor) -> float:
    """Of shares (..., E), in nats."""
    return float(torch.special.entr(counts.double() / counts.sum()).sum())


def conditional_entropy(counts: Tensor) -> float:
    """Of the expert where the word is known, counts (V, E), in nats: the mean over words by how often they come."""
    often = counts.double().sum(1)
    entropies = torch.special.entr(counts.double() / often.clamp(min=1)[:, None]).sum(1)
    return float((entropies * often).sum() / often.sum())


def sizes(model: nn.Module) -> tuple[int, int]:
    """(parameters, those that a token reads)."""
    total = left = 0
    for module in model.modules():
        total += sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if isinstance(module, MixtureOfExperts):
            choice, all_experts = module.router.choice, sum(p.numel() for p in module.experts.parameters())
            left += all_experts * (choice.experts - choice.per_token) // choice.experts
    return total, total - left


def counted(found: Routing, ids: Tensor, vocabulary: int) -> Tensor:
    """(V, E): how often each token of ids (B, A) went to each expert; those of a prefix come first, without a word."""
    chosen, experts = found.chosen[-ids.numel() :], found.logits.shape[1]
    places = ids.reshape(-1, 1) * (experts + 1) + chosen  # the last column is padding
    return places.flatten().bincount(minlength=vocabulary * (experts + 1)).view(vocabulary, -1)[:, :experts]


@torch.no_grad()
def read_run(job: Job, samples: list[VQASample]) -> Run:
    """A finished run, with the loss of these questions and where their tokens went."""
    system = systems.load(job.folder)
    model, split, nats, labels, counts = system.model, system.split(samples), 0.0, 0, []
    with system.evaluating(), system.precision.autocast():
        for _, batch in split.batches(system.precision.device, split.questions.in_order(READ, AT_ONCE)):
            image, text = system.encode_image(batch.images), system.encode_text(batch.question, batch.attention_mask)
            hidden, found = routed_states(model, image, text, batch)
            nats += float(labelled_loss(hidden, model.decoder.head, batch.labels)[0])
            labels += batch.counts[1]
            vocabulary = len(model.decoder.head)
            of_layers = [counted(of, batch.decoder_input_ids, vocabulary) for of in found]
            counts.append(torch.stack(of_layers) if found else torch.zeros(0, vocabulary, 1))
    summary = read_object(job.folder / "summary.json")
    return Run(summary, nats / labels, *sizes(model), torch.stack(counts).sum(0).cpu())


Runs = Mapping[Row, Mapping[int, Run]]


# ---------------------------------------------------------------------------------------------- tables


def learned(runs: Runs) -> str:
    """The table of what each row learned."""
    lines = []
    for row, of in runs.items():
        every = list(of.values())
        lines.append(
            [
                row.name,
                spread([run.summary["accuracy"] for run in every]),
                spread([run.loss for run in every]),
                spread([statistics.mean(run.entropies) if run.entropies else None for run in every]),
                spread([min(run.entropies, default=None) for run in every]),
                spread([run.largest for run in every], 2),
                spread([statistics.mean(run.by_word) if run.by_word else None for run in every], 2),
                *(
                    f"{statistics.median(getattr(run, n) for run in every) / 1e6:.2f} M"
                    for n in ("parameters", "active")
                ),
            ]
        )
    return results.table(HEAD.split("|"), lines)


def words_of(counts: Tensor, texts: list[str]) -> str:
    """The table of the most frequent words of each expert, counts (V, E), with the share of a word that it takes."""
    often = counts.sum(1) / PER_TOKEN
    lines = []
    for expert in range(counts.shape[1]):
        best = counts[:, expert].topk(min(WORDS, len(texts))).indices.tolist()
        said = [f"{texts[i]} {float(counts[i, expert] / often[i]):.0%}" for i in best if counts[i, expert]]
        lines.append([str(expert), f"{float(counts[:, expert].sum() / counts.sum()):.0%}", ", ".join(said) or "none"])
    return results.table(["expert", "of all tokens", "its most frequent words, and how much of them it takes"], lines)


def texts_of(folder: Path) -> list[str]:
    """How the tokens of a run's decoder look."""
    system = systems.load(folder)
    words = system.tokenizers.decoder
    special = {system.tokenizers.start_id: "(start)", system.tokenizers.end_id: "(end)"}
    return [special.get(i) or words.decode([i]).strip() or "(blank)" for i in range(len(system.model.decoder.head))]


def run(plan: Plan, command: str) -> str:
    """Train what is missing, measure, and return the section of the results file."""
    rows = all_rows()
    jobs = jobs_of(plan, rows)
    train_all(list(jobs.values()), plan.jobs)
    asked = {seed: read_vqa(plan.data(seed), "val").samples for seed in plan.seeds}
    runs = {row: {seed: read_run(jobs[row, seed], asked[seed]) for seed in plan.seeds} for row in rows}
    check_alike(runs)
    first, shown = plan.seeds[0], rows[2]
    costs = connector_speed.measure({row.name: jobs[row, first].folder for row in rows}, plan.data(first), plan.rounds)
    counts, folder = runs[shown][first].counts, jobs[shown, first].folder
    text = [
        "## Experts in place of MLPs",
        "",
        provisional(plan, True) + about_text(__doc__),
        "Figures are medians of the seeds with their range. Accuracy: of the test questions. Loss: nats a token of the "
        f"answers to {READ:,} validation questions. Load entropy: of the shares of tokens by expert, over that of even "
        "shares: the mean of the layers, and the least; the largest load is over the mean one. Set by the word: how "
        "much of that entropy is gone once the word is known.",
        "",
        learned(runs),
        "",
        f"Which words go where, in the last of {len(counts)} layers of `{shown.name}`, seed {first}; each token goes "
        f"to {PER_TOKEN} of the experts:",
        "",
        words_of(counts[-1], texts_of(folder)),
        "",
        "On a CPU experts take longer than an MLP that does as many multiplications: each has its own small products. "
        + about_text(connector_speed.__doc__),
        "",
        connector_speed.table(costs, "decoder"),
        "",
        *about(plan, runs, command),
    ]
    return "\n".join(text)
