"""Cross-attention of a decoding step: the memory's keys and values, laid out once so that a step reads them in one go.

Several parts (patches and question tokens, say) become one list of keys where that copies little; where many rows share
an entry they stay apart and one softmax is taken over their union.

Shapes: R rows, E entries, N memory tokens, H heads, d head size, F = R / E rows that read an entry.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vqa_scratch.nn.attention import attention_over_parts
from vqa_scratch.nn.memory import KeyValue, Readers, concatenate, reading

# What joining parts may copy for rows that share entries, bytes a layer. A copy is read anew at every step; keeping
# parts apart costs some ten small operations, which is what reading about a megabyte costs.
JOIN_BYTES = 1 << 20

Reader = Callable[[Tensor], Tensor]  # queries (R, H * d) -> what they read (R, H * d)
Layers = list[list[KeyValue]]  # parts by layer; the readers of a part are the same in all layers


def select(layers: Layers, rows: Tensor) -> Layers:
    """Row i becomes what row `rows[i]` was, in all layers; who reads what is worked out once."""
    kept = [reading(part.readers.index(rows.device)[rows], part.readers.entries) for part in layers[0]]
    return [[part.keep(*how) for part, how in zip(parts, kept, strict=True)] for parts in layers]


def _joined(layers: Layers) -> Layers:
    """The parts of each layer as one, at the finest sharing that serves all of them; as they are if that costs much."""
    first = layers[0]
    rows = first[0].readers.rows
    shared = all(part.readers.slot is None for part in first)
    repeat = math.gcd(*(part.readers.repeat for part in first)) if shared else 1
    extra = sum((rows // repeat - len(part.k)) * part.k[0].nbytes * 2 for part in first)
    if extra > JOIN_BYTES:
        return layers
    chosen = torch.arange(0, rows, repeat, device=first[0].k.device)
    own = [part.readers.index(chosen.device)[chosen] for part in first]  # (E,) of each part: the entry behind entry e
    whole = Readers(len(chosen), repeat)
    return [
        [concatenate([part.take(index) for part, index in zip(parts, own, strict=True)])._replace(readers=whole)]
        for parts in layers
    ]


def readers(layers: Layers, scales: list[float]) -> list[Reader]:
    """One function a layer; `scales` multiply the scores."""
    if len(layers[0]) > 1 or layers[0][0].readers.slot is not None:
        layers = _joined(layers)
    first = layers[0][0]
    if len(layers[0]) > 1 or first.readers.slot is not None:
        return [_apart(parts, scale) for parts, scale in zip(layers, scales, strict=True)]
    bias = empty = None
    if first.mask is not None and not bool(first.mask.all()):
        may = first.mask.bool()
        empty = ~may.any(1)  # (E,) entries with nothing to read: their readers get zeros
        bias = torch.zeros_like(may, dtype=first.k.dtype).masked_fill_(~may & ~empty[:, None], -math.inf)
        if not bool(empty.any()):
            empty = None
        bias = bias[:, None].repeat_interleave(first.k.shape[1], 0)  # (E * H, 1, N)
    return [_as_one(part, bias, empty, scale) for (part,), scale in zip(layers, scales, strict=True)]


def attend(q: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """What queries q (S, T, d) read of keys (S, d, n) and values (S, n, d), S = rows times heads; no query is empty.

    The keys come scaled already; bias, broadcastable to (S, T, n), is added to the scores. Bare products cost a third
    of the fused operator's set-up where queries are few; in half precision the fused one is more exact, and on a GPU
    it is faster.
    """
    if q.is_cuda or q.dtype in (torch.float16, torch.bfloat16):
        mask = None if bias is None else bias[None]
        k = keys.transpose(1, 2)
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=1.0)[0]
    scores = torch.bmm(q, keys) if bias is None else torch.baddbmm(bias, q, keys)
    return torch.bmm(torch.softmax(scores, -1), v)


def _as_one(part: KeyValue, bias: Tensor | None, empty: Tensor | None, scale: float) -> Reader:
    (entries, heads, _, size), repeat = part.k.shape, part.readers.repeat
    v = part.v if empty is None else part.v.masked_fill(empty[:, None, None, None], 0.0)
    keys, v = (x.reshape(entries * heads, -1, size) for x in (part.k * scale, v))
    keys = keys.transpose(1, 2)
    if repeat == 1:
        flat = (entries * heads, 1, size)
        return lambda q: attend(q.view(flat), keys, v, bias).view(q.shape)
    shape = (entries, repeat, heads, size)

    def read(q: Tensor) -> Tensor:
        z = attend(q.view(shape).transpose(1, 2).reshape(-1, repeat, size), keys, v, bias)
        return z.view(entries, heads, repeat, size).transpose(1, 2).reshape(q.shape)

    return read


def _apart(parts: list[KeyValue], scale: float) -> Reader:
    heads, size = parts[0].k.shape[1], parts[0].k.shape[3]

    def read(q: Tensor) -> Tensor:
        z = attention_over_parts(q.view(len(q), heads, size).unsqueeze(2), parts, scale=scale)  # (R, H, 1, d)
        return z.flatten(1)

    return read
