"""What a word activates in the image, without what earlier words did there; and which word each image token stands for.

Token Activation Maps: Li et al. 2025 (2506.23270), sections 3.2 to 3.4, and `tam.py` of github.com/xmed-lab/TAM. An
image token is as active for a word as its last state raises the word's logit. Where the image is no part of the
writer's sequence, and so has no last state there, it is what the token adds to the logit directly, through all heads
that read it. Logits are taken above their mean, since softmax ignores a shift of all. From a word's map the share that
earlier words explain is taken out, and a filter by rank takes out single tokens.

Lens of image tokens: Neo et al. 2025 (2410.07149), the logit lens of nostalgebraist 2020 at the places of the image.

Shapes: L layers, T rows of the answer, S source tokens, K keys, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.study.analysis import key_sources
from vqa_scratch.study.base import Flow, Subject
from vqa_scratch.study.lens import is_linear, key_parts, logit_direction
from vqa_scratch.study.names import attention_at
from vqa_scratch.study.trace import Trace

WINDOW = 3  # places a side of what the filter by rank looks at


@dataclass(frozen=True)
class Activations:
    """The maps of every row: row i is about the token after the writer's token i."""

    flow: Flow  # earlier words' influence taken out, filtered; what words of the writer activate is in `earlier`
    raw: Tensor  # (T, S): before both
    earlier: Tensor  # (T, T): the weight of each earlier word in what was taken out; a row sums to 1 or is 0


def has_activations(subject: Subject) -> bool:
    """Whether there are maps of what the subject writes."""
    sees = any(source.of_image for source in subject.sources)
    return sees and len(subject.end_ids) > 0 and (subject.prefix > 0 or is_linear(subject))


@torch.no_grad()
def activations(subject: Subject, t: Trace, answer: list[int]) -> Activations:
    """The maps of an answer. `t` must hold `every_attention` and `lens_taps`."""
    words, made = subject.prompt + answer, key_sources(subject, t)
    states = t[f"{subject.writer}.{subject.layers - 1}.resid_post"]
    logits = subject.readout(states.to(next(subject.decoder.parameters()).dtype))[0].float().cpu()
    logits = logits - logits.mean(-1, keepdim=True)  # (X, V)
    rows = len(words) - 1
    if subject.prefix:
        maps = logits[: subject.prefix, words].T.clamp(min=0) @ made  # (T + 1, S), of every word
    else:
        told = [_told(subject, t, row, words[row + 1]) @ made for row in range(rows)]
        maps = F.pad(torch.stack(told).clamp(min=0), (0, 0, 1, 0))  # the first word was told by nobody
    image = torch.zeros(made.shape[1])
    for source, where in subject.slices():
        image[where] = float(source.of_image)
    maps = maps * image
    raised = logits[subject.prefix :].clamp(min=0)[:, words]  # (T, T + 1): what each word read raises each word by
    earlier, kept = torch.zeros(rows, rows), torch.zeros(rows, made.shape[1])
    for row in range(rows):
        others = [i for i in range(row + 1) if words[i] != words[row + 1] and maps[i].any()]
        weights = raised[others, row + 1]
        earlier[row, others] = weights / weights.sum().clamp(min=1e-8)
        kept[row] = without(maps[row + 1], earlier[row] @ maps[:-1])
    return Activations(Flow(filtered(subject, kept), torch.zeros(rows, rows)), maps[1:], earlier)


def _told(subject: Subject, t: Trace, row: int, token: int) -> Tensor:
    """(K,): what each key adds to a token's logit directly, through all heads that read the sources."""
    direction = logit_direction(subject, t, row, token)
    return torch.stack([key_parts(subject, t, name, row, direction).sum(0) for name in subject.reading]).sum(0).cpu()


def without(activation: Tensor, interference: Tensor) -> Tensor:
    """What is left of a map after the multiple of another that explains it best, in least squares; nothing below 0."""
    multiple = (activation @ interference) / interference.square().sum().clamp(min=1e-12)
    return (activation - multiple * interference).clamp(min=0)


def filtered(subject: Subject, maps: Tensor) -> Tensor:
    """(T, S): each place of the image is the mean of its window, weighted by rank around the middle one.

    The less its values differ, relative to their mean, the more the median counts.
    """
    source = next((source for source in subject.sources if source.places is not None), None)
    if source is None or source.places is None or min(source.places.grid) < 2:
        return maps
    places, where = subject.image
    padded = F.pad(maps[:, None, where].unflatten(-1, places.grid), [WINDOW // 2] * 4, mode="reflect")
    window = F.unfold(padded, WINDOW).sort(1).values  # (T, 9, N)
    spread = window.std(1, correction=0, keepdim=True) / window.mean(1, keepdim=True).clamp(min=1e-12)
    rank = torch.arange(WINDOW**2)[:, None] - WINDOW**2 // 2
    weights = (-(rank**2) / (2 * spread.clamp(min=1e-3) ** 2)).exp()
    result = maps.clone()
    result[:, where] = (window * weights).sum(1) / weights.sum(1)
    return result


class ImageLens(NamedTuple):
    """Which words each key that is about the image stands for, by layer."""

    kind: str  # states: of the image's tokens in the writer's own sequence; values: what a layer would write of one key
    layers: list[str]
    tokens: list[str]  # the label of each key
    sources: list[int | None]  # and its source token, if it is made of one alone
    best: list[list[list[tuple[str, float]]]]  # [layer][key]: the likeliest words with their probabilities


@torch.no_grad()
def image_lens(subject: Subject, t: Trace, label: Callable[[int], str], shown: int = 3) -> ImageLens | None:
    """The lens of image tokens; None where no state can be read off, or no key is the image's. `t` as above."""
    image = torch.cat([torch.full((len(source),), source.of_image) for source in subject.sources])
    keys = [key for key, row in enumerate(subject.mixing) if image[row > 0].all()]
    if not keys or not subject.has_lens:
        return None
    writer, kind = subject.writer, next(subject.decoder.parameters()).dtype
    if subject.prefix:
        taps = {"embedding": f"{writer}.0.resid_pre"}
        taps |= {f"after layer {i}": f"{writer}.{i}.resid_post" for i in range(subject.layers)}
        # A model that reads its answer off one token may compute no other in its last layer.
        layers = [name for name, tap in taps.items() if t[tap].shape[1] >= subject.prefix]
        states = (t[taps[name]][0, keys] for name in layers)
    else:
        layers = [f"layer {name.split('.')[1]}" for name in subject.reading]
        states = (_written(t, name)[keys] for name in subject.reading)
    best = []
    for of_layer in states:  # one after the other: a large vocabulary times all layers would not fit
        chances, ids = subject.log_probabilities(subject.readout(of_layer[None].to(kind))[0]).topk(shown)
        pairs = zip(ids.tolist(), chances.exp().tolist(), strict=True)
        best.append([[(label(i), p) for i, p in zip(*pair, strict=True)] for pair in pairs])
    labels = [text for source in subject.sources for text in source.labels]
    sources = [row.index(1.0) if 1.0 in row else None for row in subject.mixing[keys].tolist()]
    tokens = [f"key {key}" if place is None else labels[place] for key, place in zip(keys, sources, strict=True)]
    return ImageLens("states" if subject.prefix else "values", layers, tokens, sources, best)


def _written(t: Trace, name: str) -> Tensor:
    """(K, D): what an attention would write if it read one key alone, with all of its heads."""
    module = attention_at(t.modules, name)
    out = module.out.weight.unflatten(1, (module.heads, module.head_dim))  # (D, H, d)
    return torch.einsum("hkd,ehd->ke", t[f"{name}.v"][0].to(out.dtype), out)
