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
from vqa_scratch.nn.decoding import DecoderLayer, adding, linear, product
from vqa_scratch.nn.memory import KeyValue, Readers, concatenate, reading

# What joining parts may copy for rows that share entries, bytes a layer. A copy is read anew at every step; keeping
# parts apart costs some ten small operations, which is what reading about a megabyte costs.
JOIN_BYTES = 1 << 20
ABSORB_BYTES = 1 << 18  # what a layer may read more for the five operations that absorbing its projections saves

Reader = Callable[[Tensor], Tensor]  # queries (R, H * d) -> what they read (R, H * d)
Crossing = Callable[[Tensor], object]  # adds to states (R, D), in place, what they read
Layers = list[list[KeyValue]]  # parts by layer; the readers of a part are the same in all layers


def select(layers: Layers, rows: Tensor) -> Layers:
    """Row i becomes what row `rows[i]` was, in all layers; who reads what is worked out once."""
    kept = [reading(part.readers.index(part.k.device)[rows], part.readers.entries) for part in layers[0]]
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


def _readers(layers: Layers, scales: list[float]) -> list[Reader]:
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


def _constant(layer: DecoderLayer, part: KeyValue) -> Crossing:
    """A memory of one token an entry: whatever a query asks, its only key has all the weight."""
    z = part.v.flatten(1)  # (E, H * d)
    if part.mask is not None:
        z = z.masked_fill(~part.mask.bool(), 0.0)
    added = linear(layer.cross.out)(z)[part.readers.index(z.device)]  # (R, D)
    return lambda x: x.add_(added)


def _absorbed(layer: DecoderLayer, parts: list[KeyValue]) -> Crossing | None:
    """The memory of one row takes the projections in; None where reading it would then cost more.

    The scores (h Wq^T + bq) k^T are h (k Wq)^T + bq k^T, and the values go through the output projection alike: a step
    is softmax(h A^T + a) B + b, two products instead of four. (DeepSeek-V2 does this to its latent attention:
    2405.04434, section 2.1.2.)
    """
    module, (k, v, mask, _) = layer.cross, concatenate(parts)  # (1, H, N, d)
    if mask is not None:
        k, v = (x[:, :, mask[0].bool()] for x in (k, v))
    (_, heads, tokens, size), width = k.shape, module.out.out_features
    if tokens == 0:
        return None
    more = 2 * width * (heads * tokens - heads * size - tokens) * k.element_size()
    if more > ABSORB_BYTES or k.dtype in (torch.float16, torch.bfloat16):  # where `attend` is more exact
        return None
    k, v, weight, bias = k[0] * module.scale, v[0], module.q.weight, module.q.bias
    offset = None if bias is None else torch.bmm(k, bias.view(heads, size, 1)).flatten()
    keys = torch.bmm(k, weight.view(heads, size, width)).flatten(0, 1)  # (H * N, D)
    values = torch.bmm(v, module.out.weight.view(width, heads, size).permute(1, 2, 0)).flatten(0, 1)  # (H * N, D)
    if module.out.bias is not None:  # the weights of a head sum to 1, and bring their part of it
        values = values + module.out.bias / heads
    norm, scores, add = layer.cross_norm, product(keys, offset), adding(values.t(), None)
    return lambda x: add(x, torch.softmax(scores(norm(x)).view(heads, tokens), -1).view(1, -1))


def _plain(layer: DecoderLayer, read: Reader) -> Crossing:
    norm, q, add = layer.cross_norm, linear(layer.cross.q), adding(layer.cross.out.weight, layer.cross.out.bias)
    return lambda x: add(x, read(q(norm(x))))


def crossings(layers: list[DecoderLayer], memory: Layers | None) -> list[Crossing | None]:
    """One function a layer of the decoder: x (R, D) += cross-attention to the memory, norm and projections included.

    None for each layer where there is no memory.
    """
    if memory is None:
        return [None] * len(layers)
    first = memory[0]
    if len(first) == 1 and first[0].k.shape[2] == 1:
        return [_constant(layer, part) for layer, (part,) in zip(layers, memory, strict=True)]
    if first[0].readers.rows == 1:
        made = [_absorbed(layer, parts) for layer, parts in zip(layers, memory, strict=True)]
        if None not in made:
            return made
    readers = _readers(memory, [layer.cross.scale for layer in layers])
    return [_plain(layer, read) for layer, read in zip(layers, readers, strict=True)]
