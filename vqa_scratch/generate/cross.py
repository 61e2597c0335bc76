"""Cross-attention of a decoding step: the memory's keys and values, laid out once so that a step reads them in one go.

Several parts (patches and question tokens, say) become one list of keys where that copies little; where many rows share
an entry they stay apart and one softmax is taken over their union.

Shapes: R rows, E entries, N memory tokens, L layers, H heads, d head size, D width, F = R / E rows that read an entry.
"""

import math
from collections.abc import Callable
from typing import Protocol

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


def attend(q: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None, scale: float = 1.0) -> Tensor:
    """What queries q (S, T, d) read of keys (S, d, n) and values (S, n, d), S = rows times heads; no query is empty.

    bias, broadcastable to (S, T, n), is added to the scaled scores. Bare products cost a third of the fused operator's
    set-up where queries are few; in half precision the fused one is more exact, and on a GPU it is faster.
    """
    if q.is_cuda or q.dtype in (torch.float16, torch.bfloat16):
        mask = None if bias is None else bias[None]
        k = keys.transpose(1, 2)
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0]
    if bias is not None:
        scores = torch.baddbmm(bias, q, keys, alpha=scale)
    elif scale != 1.0:  # beta 0: the first argument only has to fit
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, keys, beta=0, alpha=scale)
    else:
        scores = torch.bmm(q, keys)
    return torch.bmm(torch.softmax(scores, -1), v)


class _Together:
    """One list of keys an entry for all layers: the rows that read an entry are queries of it, F side by side."""

    def __init__(self, parts: list[KeyValue], scales: list[float]) -> None:
        """`parts` by layer, without slots; `scales` multiply the scores."""
        first = parts[0]
        (entries, self.heads, tokens, self.size), self.repeat = first.k.shape, first.readers.repeat
        self.kept = first.k.new_empty(2, len(parts), entries, self.heads, tokens, self.size)
        for part, scale, keys, values in zip(parts, scales, *self.kept, strict=True):
            torch.mul(part.k, scale, out=keys)
            values.copy_(part.v)
        self.bias = None  # (E, H, 1, N)
        if first.mask is not None and not bool(first.mask.all()):
            may = first.mask.bool()
            empty = ~may.any(1)  # (E,) entries with nothing to read: their readers get zeros
            bias = torch.zeros_like(may, dtype=first.k.dtype).masked_fill_(~may & ~empty[:, None], -math.inf)
            self.bias = bias[:, None, None].repeat(1, self.heads, 1, 1)
            self.kept[1].masked_fill_(empty[:, None, None, None], 0.0)
        self._lay_out()

    def _lay_out(self) -> None:
        keys, values = self.kept.flatten(2, 3)  # (L, E * H, N, d)
        self.layers = list(zip(keys.transpose(2, 3).unbind(0), values.unbind(0), strict=True))
        self.spread = None if self.bias is None else self.bias.flatten(0, 1)  # (E * H, 1, N)

    def keep(self, entries: Tensor) -> None:
        """These entries (E',) only, in this order."""
        self.kept = self.kept.index_select(2, entries)
        self.bias = None if self.bias is None else self.bias.index_select(0, entries)
        self._lay_out()

    def read(self, layer: int, q: Tensor) -> Tensor:
        """Queries (R, H * d) -> what they read (R, H * d)."""
        keys, values = self.layers[layer]
        if self.repeat == 1:
            return attend(q.view(-1, 1, self.size), keys, values, self.spread).view(q.shape)
        queries = q.view(-1, self.repeat, self.heads, self.size).transpose(1, 2).reshape(-1, self.repeat, self.size)
        z = attend(queries, keys, values, self.spread)
        return z.view(-1, self.heads, self.repeat, self.size).transpose(1, 2).reshape(q.shape)


class _Apart:
    """Parts with readers of their own: one softmax over the union of their keys."""

    def __init__(self, memory: Layers, scales: list[float]) -> None:
        self.memory, self.scales = memory, scales

    def read(self, layer: int, q: Tensor) -> Tensor:
        """As `_Together.read`."""
        parts = self.memory[layer]
        heads, size = parts[0].k.shape[1], parts[0].k.shape[3]
        queries = q.view(len(q), heads, size).unsqueeze(2)
        return attention_over_parts(queries, parts, scale=self.scales[layer]).flatten(1)  # of (R, H, 1, d)


class _Projected:
    """Norm, queries, what they read, output projection: cross-attention as it is written."""

    def __init__(self, layers: list[DecoderLayer], memory: Layers) -> None:
        self.scales = [layer.cross.scale for layer in layers]
        self.reader: list[_Together | _Apart] = []  # one, in a list: closures that held `self` would be a cycle
        self._lay_out(memory)
        self.each = [self._crossing(number, layer) for number, layer in enumerate(layers)]

    def _lay_out(self, memory: Layers) -> None:
        if len(memory[0]) > 1 or memory[0][0].readers.slot is not None:
            memory = _joined(memory)
        together = len(memory[0]) == 1 and memory[0][0].readers.slot is None
        reader = _Together([part for (part,) in memory], self.scales) if together else _Apart(memory, self.scales)
        self.reader[:] = [reader]
        # Where each row has its own entry the rows are dropped from what was laid out.
        self.memory = None if together and reader.repeat == 1 else memory

    def _crossing(self, number: int, layer: DecoderLayer) -> Crossing:
        norm, q, add = layer.cross_norm, linear(layer.cross.q), adding(layer.cross.out.weight, layer.cross.out.bias)
        reader = self.reader
        return lambda x: add(x, reader[0].read(number, q(norm(x))))

    def keep(self, rows: Tensor) -> None:
        """Rows (R',) only, in this order."""
        if self.memory is None:
            self.reader[0].keep(rows)
        else:
            self._lay_out(select(self.memory, rows))


class _Constant:
    """A memory of one token an entry: whatever a query asks, its only key has all the weight."""

    def __init__(self, layers: list[DecoderLayer], memory: Layers) -> None:
        self.added = []  # (R, D) of each layer
        for layer, (part,) in zip(layers, memory, strict=True):
            z = part.v.flatten(1)  # (E, H * d)
            if part.mask is not None:
                z = z.masked_fill(~part.mask.bool(), 0.0)
            self.added.append(linear(layer.cross.out)(z)[part.readers.index(z.device)])
        self.each = [self._crossing(number) for number in range(len(layers))]

    def _crossing(self, number: int) -> Crossing:
        added = self.added
        return lambda x: x.add_(added[number])

    def keep(self, rows: Tensor) -> None:
        """As `_Projected.keep`."""
        self.added[:] = [added.index_select(0, rows) for added in self.added]


def _seen(part: KeyValue) -> KeyValue:
    """The part of one row without the tokens that it may not read."""
    if part.mask is None:
        return part
    seen = part.mask[0].bool()
    return part._replace(k=part.k[:, :, seen], v=part.v[:, :, seen], mask=None)


class _Absorbed:
    """The memory of one row takes the projections in.

    The scores (h Wq^T + bq) k^T are h (k Wq)^T + bq k^T, and the values go through the output projection alike: a step
    is softmax(h A^T + a) B + b, two products instead of four. (DeepSeek-V2 does this to its latent attention:
    2405.04434, section 2.1.2.)
    """

    def __init__(self, layers: list[DecoderLayer], memory: list[KeyValue]) -> None:
        """`memory` by layer, one entry of at least one token, none of them masked."""
        self.each = [self._crossing(layer, part.k[0], part.v[0]) for layer, part in zip(layers, memory, strict=True)]

    @staticmethod
    def serves(layers: list[DecoderLayer], memory: list[KeyValue]) -> bool:
        """Whether the operations saved are worth what a step then reads more, or less."""
        (_, heads, tokens, size), width, k = memory[0].k.shape, layers[0].cross.out.out_features, memory[0].k
        if tokens == 0 or k.dtype in (torch.float16, torch.bfloat16):  # where `attend` is more exact
            return False
        return 2 * width * (heads * tokens - heads * size - tokens) * k.element_size() <= ABSORB_BYTES

    @staticmethod
    def _crossing(layer: DecoderLayer, k: Tensor, v: Tensor) -> Crossing:
        module, (heads, tokens, size), width = layer.cross, k.shape, layer.cross.out.out_features
        k, weight, bias = k * module.scale, module.q.weight, module.q.bias
        offset = None if bias is None else torch.bmm(k, bias.view(heads, size, 1)).flatten()
        keys = torch.bmm(k, weight.view(heads, size, width)).flatten(0, 1)  # (H * N, D)
        values = torch.bmm(v, module.out.weight.view(width, heads, size).permute(1, 2, 0)).flatten(0, 1)  # (H * N, D)
        if module.out.bias is not None:  # the weights of a head sum to 1, and bring their part of it
            values = values + module.out.bias / heads
        norm, scores, add = layer.cross_norm, product(keys, offset), adding(values.t(), None)
        return lambda x: add(x, torch.softmax(scores(norm(x)).view(heads, tokens), -1).view(1, -1))

    def keep(self, rows: Tensor) -> None:
        """There is one row: it is kept."""


class _Nothing:
    """No memory."""

    def __init__(self, layers: list[DecoderLayer]) -> None:
        self.each = [None] * len(layers)

    def keep(self, rows: Tensor) -> None:
        """Nothing to keep."""


class Crossings(Protocol):
    """What a decoding state asks of the memory."""

    each: list[Crossing | None]  # of each layer: x (R, D) += what it reads, norm and projections included

    def keep(self, rows: Tensor) -> None:
        """Rows (R',) only, in this order."""


def crossings(layers: list[DecoderLayer], memory: Layers | None) -> Crossings:
    """Cross-attention of all layers of a decoder to a memory, in the form that suits the memory."""
    if memory is None:
        return _Nothing(layers)
    first = memory[0]
    if len(first) == 1 and first[0].k.shape[2] == 1:
        return _Constant(layers, memory)
    if first[0].readers.rows == 1:
        whole = [_seen(concatenate(parts)) for parts in memory]
        if _Absorbed.serves(layers, whole):
            return _Absorbed(layers, whole)
    return _Projected(layers, memory)
