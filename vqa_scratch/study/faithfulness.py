"""Do the maps say what the model uses? Remove what they point at and see.

Deletion and insertion curves: Petsiuk, Das and Saenko 2018, "RISE" (1806.07421), section 3.3, by whole patches.
Pointing: the share of a map inside the object a question is about. Head ablation: accuracy with one head silenced at a
time (Michel, Levy and Neubig 2019, 1905.10650).

Shapes: N patches, S source tokens, T decoder tokens; images (n, C, H, W).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.study.analysis import Flow, cross_maps, relevancy, rollout
from vqa_scratch.study.names import matches
from vqa_scratch.study.subject import Source, Subject, VQASubject
from vqa_scratch.study.trace import trace

METHODS = ("cross", "rollout", "relevancy")


def flows(subject: Subject, answer: list[int]) -> dict[str, Flow]:
    """The three kinds of map for every decoder token of `prompt` + `answer`, by a teacher-forced pass."""
    with trace(subject.model) as t, torch.no_grad():
        subject.logits(subject.prompt + answer[:-1])
    own = t.pattern("decoder.0.self")[0].mean(0).cpu()
    return {
        "cross": Flow(cross_maps(subject, t).mean((0, 1)), own),
        "rollout": rollout(subject, t),
        "relevancy": relevancy(subject, answer),
    }


def image_source(subject: Subject) -> tuple[Source, slice]:
    """The source with patches, and where its patches sit among the source tokens."""
    for source, where in subject.slices():
        if source.grid is not None:
            return source, slice(where.stop - source.grid[0] * source.grid[1], where.stop)
    raise ValueError("there is no image here: nothing to delete, insert or point at")


def answer_rows(subject: Subject, answer: list[int]) -> list[int]:
    """The rows of a flow that wrote the answer's words, the end token left out."""
    words = answer[:-1] if len(answer) > 1 and answer[-1] == subject.end_id else answer
    first = len(subject.prompt) - 1
    return list(range(first, first + len(words)))


def patch_map(subject: Subject, flow: Flow, rows: Sequence[int]) -> Tensor:
    """(N,): the map over patches, averaged over the given rows."""
    return flow.sources[list(rows)][:, image_source(subject)[1]].mean(0)


# ---------------------------------------------------------------------------------------------- deletion, insertion


@dataclass(frozen=True)
class Curves:
    """Probability of the answer while patches go (deletion, lower is better) or come (insertion, higher is better)."""

    fractions: list[float]  # share of the patches touched, 0 to 1
    deletion: list[float]
    insertion: list[float]

    @staticmethod
    def area(values: list[float]) -> float:
        """Area under one of the curves, by trapezoids."""
        return sum((a + b) / 2 for a, b in zip(values, values[1:], strict=False)) / (len(values) - 1)


@torch.no_grad()
def answer_probability(subject: VQASubject, images: Tensor, answer: list[int]) -> Tensor:
    """(n,): probability of the whole answer for each of n images, the same question to each."""
    ids = torch.tensor([subject.prompt + answer[:-1]], device=subject.device).expand(len(images), -1)
    question = subject.input_ids.expand(len(images), -1)
    logits = subject.model(images, question, subject.mask.expand(len(images), -1), ids).logits
    wanted = torch.tensor(answer, device=subject.device)
    logprobs = logits[:, len(subject.prompt) - 1 :].float().log_softmax(-1)
    return logprobs[:, torch.arange(len(answer)), wanted].sum(-1).exp()


def _with_patches(subject: VQASubject, keep: Tensor) -> Tensor:
    """(n, C, H, W): the image where `keep` (n, N) says so, its mean colour elsewhere."""
    image = subject.pixel_values
    rows, columns = image_source(subject)[0].grid
    pixels = subject.model.image.config.patch_size
    mask = keep.view(-1, 1, rows, columns).repeat_interleave(pixels, 2).repeat_interleave(pixels, 3)
    return torch.where(mask.to(image.device), image, image.mean((2, 3), keepdim=True))


def deletion_insertion(subject: VQASubject, answer: list[int], order: Tensor, steps: int = 16) -> Curves:
    """Take the patches out, and put them in, in `order` (N,), most important first; `steps` points after the start."""
    patches = len(order)
    counts = [round(i * patches / steps) for i in range(steps + 1)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(patches)
    touched = rank[None, :] < torch.tensor(counts)[:, None]  # (steps + 1, N)
    images = _with_patches(subject, torch.cat([~touched, touched]))
    probability = answer_probability(subject, images, answer).tolist()
    return Curves([c / patches for c in counts], probability[: steps + 1], probability[steps + 1 :])


@torch.no_grad()
def faithfulness(
    subjects: Iterable[VQASubject], *, steps: int = 16, random_orders: int = 3, seed: int = 0
) -> dict[str, Curves]:
    """Mean curves over questions for each method of METHODS and for random order, on the model's own answers."""
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, list[tuple[list[float], list[float]]]] = {}
    fractions: list[float] = []
    for subject in subjects:
        answer = subject.generate()
        rows = answer_rows(subject, answer)
        orders = [
            (name, patch_map(subject, flow, rows).argsort(descending=True))
            for name, flow in flows(subject, answer).items()
        ]
        patches = len(orders[0][1])
        orders += [("random", torch.randperm(patches, generator=generator)) for _ in range(random_orders)]
        for name, order in orders:
            curves = deletion_insertion(subject, answer, order, steps)
            fractions = curves.fractions
            sums.setdefault(name, []).append((curves.deletion, curves.insertion))
    if not sums:
        raise ValueError("no question to test the maps on")
    mean = {name: torch.tensor(values).mean(0).tolist() for name, values in sums.items()}
    return {name: Curves(fractions, deletion, insertion) for name, (deletion, insertion) in mean.items()}


# ---------------------------------------------------------------------------------------------- pointing


def patches_of_box(box: Sequence[float], image_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(N,) bool: the patches that a box (left, top, right, bottom; in pixels of (height, width)) touches."""
    left, top, right, bottom = box
    rows, columns = grid
    height, width = image_size[0] / rows, image_size[1] / columns
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    inside = (row * height < bottom) & ((row + 1) * height > top)
    return (inside & (column * width < right) & ((column + 1) * width > left)).flatten()


@dataclass(frozen=True)
class Pointing:
    """How much of a map lies on the object asked about, over `questions` questions."""

    mass: float  # mean share of the map inside the object's patches
    area: float  # mean share of the patches that are the object's
    hit: float  # how often the map's largest patch is the object's
    questions: int

    @property
    def ratio(self) -> float:
        """How many times more than an even map."""
        return self.mass / self.area


def pointing(examples: Iterable[tuple[VQASubject, Tensor]]) -> dict[str, Pointing]:
    """For each method, over (subject, its object's patches (N,) bool), on the model's own answers.

    Besides METHODS there is each layer's cross-attention ("cross layer 2"), and "best head, layer 2 head 0", the head
    of all layers that points best over these questions. Raises ValueError without an example.
    """
    found: dict[str, list[tuple[float, float, float]]] = {}
    for subject, inside in examples:
        answer = subject.generate()
        rows, where = answer_rows(subject, answer), image_source(subject)[1]
        with trace(subject.model) as t, torch.no_grad():
            subject.logits(subject.prompt + answer[:-1])
        cross = cross_maps(subject, t)[:, :, rows][..., where].mean(2)  # (layers, H, N)
        maps = {
            "cross": cross.mean((0, 1)),
            "rollout": patch_map(subject, rollout(subject, t), rows),
            "relevancy": patch_map(subject, relevancy(subject, answer, rows=[r - rows[0] for r in rows]), rows),
        }
        maps |= {f"cross layer {i}": layer.mean(0) for i, layer in enumerate(cross)}
        maps |= {f"layer {i} head {h}": head for i, layer in enumerate(cross) for h, head in enumerate(layer)}
        for name, values in maps.items():
            mass = float(values[inside].sum() / values.sum().clamp(min=1e-12))
            hit = float(inside[values.argmax()])
            found.setdefault(name, []).append((mass, float(inside.float().mean()), hit))
    if not found:
        raise ValueError("no question that names one object")
    result = {}
    for name, values in found.items():
        mass, area, hit = torch.tensor(values).mean(0).tolist()
        result[name] = Pointing(mass, area, hit, len(values))
    heads = {name for name in result if name.startswith("layer ")}
    best = max(heads, key=lambda name: result[name].mass)
    return {name: p for name, p in result.items() if name not in heads} | {f"best head, {best}": result[best]}


# ---------------------------------------------------------------------------------------------- heads


@dataclass(frozen=True)
class HeadEffect:
    """The score with one head silenced. `drop` is what its silence costs; negative: it did harm."""

    name: str  # decoder.3.cross
    head: int
    score: float
    drop: float


def head_ablation(
    model: torch.nn.Module, score: Callable[[], float], pattern: str = "*"
) -> tuple[float, list[HeadEffect]]:
    """The score of the whole model, and with each head of the attentions that `pattern` means silenced, worst first.

    `score` runs the model over a split and returns one figure, for example official VQA accuracy in [0, 1].
    """
    whole = trace(model, record=False)
    attentions = {
        name: module
        for name, module in whole.modules.items()
        if isinstance(module, MultiHeadAttention) and matches(name, pattern)
    }
    if not attentions:
        trace(model, pattern)  # names the near miss
        raise ValueError(f"{pattern!r} means no attention")
    base = score()
    effects = []
    for name, module in attentions.items():
        for head in range(module.heads):
            with trace(model, record=False) as t:
                t.ablate(name, head=head)
                value = score()
            effects.append(HeadEffect(name, head, value, base - value))
    return base, sorted(effects, key=lambda effect: -effect.drop)
