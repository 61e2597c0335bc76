"""Tests whether the maps show what the model uses, by removing what they point at.

Deletion and insertion curves: Petsiuk, Das and Saenko 2018, "RISE" (1806.07421), section 3.3, by the squares of whole
tokens (`places.py`). Pointing: the share of a map inside the object a question is about. Head ablation: accuracy with
one head silenced at a time (Michel, Levy and Neubig 2019, 1905.10650).

Shapes: N places, S source tokens, T rows of the answer; images (n, C, H, W).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.experts import Router
from vqa_scratch.study.analysis import Flow, cross_maps, flows, relevancy, rollout
from vqa_scratch.study.base import ImageSubject, Subject
from vqa_scratch.study.names import matches
from vqa_scratch.study.places import centred_in_box, share_in_box, token_of_pixel
from vqa_scratch.study.trace import Trace, trace


def forced(subject: Subject, answer: list[int]) -> Trace:
    """A teacher-forced pass over `prompt` + `answer`."""
    with trace(subject.model) as t, torch.no_grad():
        subject.logits(subject.prompt + answer[:-1])
    return t


def answer_rows(subject: Subject, answer: list[int]) -> list[int]:
    """The rows of a flow that wrote the answer, without the end token."""
    words = answer[:-1] if len(answer) > 1 and answer[-1] in subject.end_ids else answer
    first = len(subject.prompt) - 1
    return list(range(first, first + len(words)))


def patch_map(subject: Subject, flow: Flow, rows: Sequence[int]) -> Tensor:
    """(N,): the map over the places of the image, averaged over the given rows; what is below zero counts as zero."""
    return flow.sources[list(rows)][:, subject.image[1]].mean(0).clamp(min=0)


# ---------------------------------------------------------------------------------------------- deletion, insertion


@dataclass(frozen=True)
class Curves:
    """Probability of the answer as tokens are removed (deletion, lower is better) or added (insertion, higher)."""

    fractions: list[float]  # share of the tokens removed or added, 0 to 1
    deletion: list[float]
    insertion: list[float]

    @staticmethod
    def area(values: list[float]) -> float:
        """Area under one of the curves, by trapezoids."""
        return sum((a + b) / 2 for a, b in zip(values, values[1:], strict=False)) / (len(values) - 1)


@torch.no_grad()
def answer_probability(subject: ImageSubject, images: Tensor, answer: list[int]) -> Tensor:
    """(n,): probability of the whole answer for each of n images, with the same question."""
    logits = subject.logits_of(images, subject.prompt + answer[:-1])[:, len(subject.prompt) - 1 :]
    return subject.log_probabilities(logits)[:, torch.arange(len(answer)), answer].sum(-1).exp()


def _with_tokens(subject: ImageSubject, keep: Tensor) -> Tensor:
    """(n, C, H, W): the image in the squares of the tokens that `keep` (n, N) names, its mean colour elsewhere."""
    image = subject.pixel_values
    mask = keep[:, token_of_pixel(subject.image[0], (image.shape[2], image.shape[3]))][:, None]  # (n, 1, H, W)
    return torch.where(mask.to(image.device), image, image.mean((2, 3), keepdim=True))


def deletion_insertion(subject: ImageSubject, answer: list[int], order: Tensor, steps: int = 16) -> Curves:
    """Remove the tokens' squares, and add them, in `order` (N,), most important first, in `steps` steps."""
    tokens = len(order)
    counts = [round(i * tokens / steps) for i in range(steps + 1)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(tokens)
    touched = rank[None, :] < torch.tensor(counts)[:, None]  # (steps + 1, N)
    images = _with_tokens(subject, torch.cat([~touched, touched]))
    probability = answer_probability(subject, images, answer).tolist()
    return Curves([c / tokens for c in counts], probability[: steps + 1], probability[steps + 1 :])


@torch.no_grad()
def faithfulness(
    subjects: Iterable[ImageSubject], *, steps: int = 16, random_orders: int = 3, seed: int = 0
) -> dict[str, Curves]:
    """Mean curves over questions for each map of `flows` and for random order, on the model's own answers."""
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, list[tuple[list[float], list[float]]]] = {}
    fractions: list[float] = []
    for subject in subjects:
        answer = subject.generate()
        rows = answer_rows(subject, answer)
        found = flows(subject, forced(subject, answer), answer)
        maps = {name: patch_map(subject, flow, rows) for name, flow in found.items()}
        orders = [(name, values.argsort(descending=True)) for name, values in maps.items()]
        orders += [("random", torch.randperm(len(orders[0][1]), generator=generator)) for _ in range(random_orders)]
        for name, order in orders:
            curves = deletion_insertion(subject, answer, order, steps)
            fractions = curves.fractions
            sums.setdefault(name, []).append((curves.deletion, curves.insertion))
    if not sums:
        raise ValueError("no question to test the maps on")
    mean = {name: torch.tensor(values).mean(0).tolist() for name, values in sums.items()}
    return {name: Curves(fractions, deletion, insertion) for name, (deletion, insertion) in mean.items()}


# ---------------------------------------------------------------------------------------------- pointing


@dataclass(frozen=True)
class Pointing:
    """How much of a map is on the object that the question is about, over `questions` questions."""

    mass: float  # mean share of the map inside the object's box, each token spread evenly over its square
    area: float  # mean share of the pixels that are in the box
    hit: float  # how often the token with the largest value is centred in the box
    questions: int

    @property
    def ratio(self) -> float:
        """How many times more than for an even map."""
        return self.mass / self.area


def pointing(examples: Iterable[tuple[ImageSubject, Sequence[float]]]) -> dict[str, Pointing]:
    """For each method, over examples of (subject, its object's box in pixels), on the model's own answers.

    Besides the maps of `flows` there is the cross-attention of each block with one ("cross layer 2"), and of the head
    that points best ("best head, layer 2 head 0"). Raises ValueError without an example.
    """
    found: dict[str, list[tuple[float, float, float]]] = {}
    for subject, box in examples:
        answer, (places, where) = subject.generate(), subject.image
        rows, (_, _, *size) = answer_rows(subject, answer), subject.pixel_values.shape
        inside, centred = share_in_box(places, (size[0], size[1]), box), centred_in_box(places, box)
        left, top, right, bottom = box
        area = (right - left) * (bottom - top) / (size[0] * size[1])
        t = forced(subject, answer)
        cross = cross_maps(subject, t)[:, :, rows][..., where].mean(2)  # (layers, H, N)
        maps = {
            "cross": cross.mean((0, 1)),
            "rollout": patch_map(subject, rollout(subject, t), rows),
            "relevancy": patch_map(subject, relevancy(subject, answer[: len(rows)]), rows),
        }
        maps |= {name: patch_map(subject, flow, rows) for name, flow in subject.more_flows(t).items()}
        by_block = {name.split(".")[1]: layer for name, layer in zip(subject.reading, cross, strict=True)}
        maps |= {f"cross layer {i}": layer.mean(0) for i, layer in by_block.items()}
        maps |= {f"layer {i} head {h}": head for i, layer in by_block.items() for h, head in enumerate(layer)}
        for name, values in maps.items():
            mass = float((values * inside).sum() / values.sum().clamp(min=1e-12))
            found.setdefault(name, []).append((mass, area, float(centred[values.argmax()])))
    if not found:
        raise ValueError("no question that names one object")
    result = {}
    for name, measured in found.items():
        mass, area, hit = torch.tensor(measured).mean(0).tolist()
        result[name] = Pointing(mass, area, hit, len(measured))
    heads = [name for name in result if name.startswith("layer ")]
    best = max(heads, key=lambda name: result[name].mass)
    return {name: p for name, p in result.items() if name not in heads} | {f"best head, {best}": result[best]}


# ---------------------------------------------------------------------------------------------- heads


@dataclass(frozen=True)
class HeadEffect:
    """The score with one head, or expert, silenced. `drop` is how much lower it is; a negative one means that the head
    did harm."""

    name: str  # decoder.3.cross, or decoder.3.router
    head: int  # its number, or the expert's
    score: float
    drop: float

    @property
    def part(self) -> str:
        """ "head" or "expert"."""
        return "expert" if self.name.endswith(".router") else "head"


def head_ablation(
    model: torch.nn.Module, score: Callable[[], float], pattern: str = "*"
) -> tuple[float, list[HeadEffect]]:
    """(score of the whole model, scores with one head silenced, largest drop first), for attentions of `pattern`, and
    with one expert silenced for its routers.

    `score` runs the model over a split and returns one figure, for example official VQA accuracy in [0, 1]. Raises
    UserError or ValueError for a pattern with neither.
    """
    whole = trace(model, record=False)
    parts = []
    for name, module in whole.modules.items():
        if isinstance(module, MultiHeadAttention) and matches(name, pattern):
            parts += [(name, ("head", head)) for head in range(module.heads)]
        if isinstance(module, Router) and matches(name, pattern):
            parts += [(name, ("expert", expert)) for expert in range(module.choice.experts)]
    if not parts:
        trace(model, pattern)  # names the near miss
        raise ValueError(f"{pattern!r} means no attention and no router")
    base = score()
    effects = []
    for name, (kind, number) in parts:
        with trace(model, record=False) as t:
            t.ablate(name, **{kind: number})
            value = score()
        effects.append(HeadEffect(name, number, value, base - value))
    return base, sorted(effects, key=lambda effect: -effect.drop)
