"""What several tests share: reference models saved to disk, and attention by brute force.

Reference weights are drawn with a standard deviation of 0.2, ten times the usual one. States then differ between tokens
and logits spread over several units, so that a wrong mask, position or transpose cannot hide under the tolerance.
"""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from vqa_scratch.nn.states import Places

STD = 0.2
# fp32 rounding through a few layers leaves 1e-6 at logits of size 5; anything that is a mistake is far above this.
TOLERANCE = 1e-5

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def saved(model: transformers.PreTrainedModel, folder: Path) -> transformers.PreTrainedModel:
    """Give every parameter a random value (biases and norms too), save to `folder`, return the model in eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * STD)
    model.save_pretrained(folder)
    return model.eval()


def text_batch(vocab: int = 60, lengths: tuple[int, ...] = (44, 31, 5, 1), pad: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids (4, 44) above the special ones, and their mask; the last row is one token."""
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return torch.randint(5, vocab, mask.shape).masked_fill(mask == 0, pad), mask


def assert_close(ours: Tensor, theirs: Tensor, where: Tensor | None = None, tolerance: float = TOLERANCE) -> None:
    """Largest absolute difference within `tolerance`, over the places that `where` marks."""
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs()
    if where is not None:
        difference = difference[where.bool()]
    worst = difference.max().item()
    assert worst <= tolerance, f"largest difference {worst:.3g} > {tolerance:.3g}"
    assert theirs.abs().max() > 0.1, "the reference is trivially small"


def centre(places: Places, row: int, column: int) -> tuple[float, float]:
    """(y, x) in pixels: the centre of what a token sees."""
    return places.first + places.stride * row, places.first + places.stride * column


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Let the judge of attention choose this one everywhere, until the test ends."""
    module = sys.modules["vqa_scratch.nn.attention"]  # `vqa_scratch.nn` has a function of that name
    monkeypatch.setattr(module, "choose", lambda q, **_: backend)


def brute_force_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Attention in float64, one query at a time, from the definition. allowed (B, H, Tq, Tk) bool."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = allowed[b, h, i].nonzero()[:, 0].tolist()
                if not keys:
                    continue
                scores = torch.stack([scale * (q[b, h, i] * k[b, h, j]).sum() for j in keys])
                if bias is not None:
                    scores = scores + bias.double().expand(*q.shape[:3], k.shape[2])[b, h, i, keys]
                exponentials = (scores - scores.max()).exp()
                weights = exponentials / exponentials.sum()
                out[b, h, i] = sum(w * v[b, h, j] for w, j in zip(weights, keys, strict=True))
    return out
