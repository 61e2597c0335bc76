"""Cross-attention of a decoding step, with the memory prepared once so that a step does the least work.

`Constant` is for a memory of one token, `Absorbed` for a small memory of one row, `Projected` for any other. Each has
`add(layer, x)`: x (R, D) += cross-attention, norm and projections included; and `keep(rows)`: these rows (R',) only,
in this order.

Shapes: R rows, E entries, N memory tokens, L layers, H heads, d head size, D width, F = R / E rows that read an entry.
"""

import math

import torch
from torch import Tensor, nn

from vqa_scratch.generate.fast.products import Addition, Function, adding, attend, linear, linear_adding, norm, product
from vqa_scratch.nn.attention import MultiHeadAttention, attention_over_parts
from vqa_scratch.nn.cache import DecoderCache
from vqa_scratch.nn.decoding import FastBlock, Reader
from vqa_scratch.nn.memory import KeyValue, Sharing, share
from vqa_scratch.nn.memory_parts import concatenate

# Parts are joined if this copies at most so many bytes a layer for rows that share entries. Every step reads the
# copies; keeping parts separate costs some ten small operations, as much as reading about a megabyte.
JOIN_BYTES = 1 << 20
ABSORB_BYTES = 1 << 18  # projections are absorbed, which saves five operations, if a layer reads at most this much more

Layers = list[list[KeyValue]]  # parts by layer; how rows share a part is the same in all layers


def cross_attention(
    blocks: list[FastBlock], cache: DecoderCache, members: int
) -> "Constant | Absorbed | Projected | None":
    """Cross-attention of `members` rows a group to the memory in `cache`, in the fastest form; None without one."""
    memory = [own.cross for own in cache if own.cross is not None]
    if not memory:
        return None
    readers = [block.reader for block in blocks if block.reader is not None]
    if members > 1:
        rows = torch.arange(memory[0][0].sharing.rows, device=cache.device).repeat_interleave(members)
        memory = select(memory, rows)
    first = memory[0]
    if len(first) == 1 and first[0].k.shape[2] == 1:
        return Constant(readers, memory)
    if first[0].sharing.rows == 1:
        whole = [_visible(concatenate(parts)) for parts in memory]
        if Absorbed.pays(readers, whole):
            return Absorbed(readers, whole)
    return Projected(readers, memory)


def select(layers: Layers, rows: Tensor) -> Layers:
    """Row i becomes what row `rows[i]` was, in all layers; the sharing is computed once."""
    kept = [share(part.sharing.entry_of_row(part.k.device)[rows], part.sharing.entries) for part in layers[0]]
    return [[part.keep(*how) for part, how in zip(parts, kept, strict=True)] for parts in layers]


class Constant:
    """A memory of one token an entry: for any query the only key has all the weight."""

    def __init__(self, readers: list[Reader], memory: Layers) -> None:
        self.read = []  # (R, D) of each layer
        for (_, cross, factor), (part,) in zip(readers, memory, strict=True):
            z = part.v.flatten(1)  # (E, H * d)
            if part.mask is not None:
                z = z.masked_fill(~part.mask.bool(), 0.0)
            read = linear(cross.out)(z)[part.sharing.entry_of_row(z.device)]
            self.read.append(read if factor is None else read * factor)

    def add(self, layer: int, x: Tensor) -> None:
        x.add_(self.read[layer])

    def keep(self, rows: Tensor) -> None:
        self.read = [read.index_select(0, rows) for read in self.read]


def queries(attn: MultiHeadAttention) -> Function:
    """h (R, D) -> (R, H * d), each head normed if the module does so."""
    project, q_norm = linear(attn.q), norm(attn.q_norm)
    if isinstance(attn.q_norm, nn.Identity):
        return project
    return lambda h: q_norm(project(h).view(len(h), attn.heads, attn.head_dim)).flatten(1)


def _visible(part: KeyValue) -> KeyValue:
    """A part of one row, without masked tokens."""
    if part.mask is None:
        return part
    seen = part.mask[0].bool()
    return part._replace(k=part.k[:, :, seen], v=part.v[:, :, seen], mask=None)


class Absorbed:
    """A memory of one row that absorbs the projections.

    The scores (h Wq^T + bq) k^T are h (k Wq)^T + bq k^T, and the output projection is applied to the values: a step
    is softmax(h A^T + a) B + b, two products instead of four. (DeepSeek-V2 does this to its latent attention:
    2405.04434, section 2.1.2.)
    """

    def __init__(self, readers: list[Reader], memory: list[KeyValue]) -> None:
        """`memory` by layer, one entry of at least one token, none of them masked."""
        _, self.heads, self.tokens, _ = memory[0].k.shape
        self.blocks = [self._absorb(reader, part.k[0], part.v[0]) for reader, part in zip(readers, memory, strict=True)]

    @staticmethod
    def pays(readers: list[Reader], memory: list[KeyValue]) -> bool:
        """Whether the saved operations are worth the additional reading; a norm of the queries cannot be absorbed."""
        (_, heads, tokens, size), width, k = memory[0].k.shape, readers[0].attn.out.out_features, memory[0].k
        if not isinstance(readers[0].attn.q_norm, nn.Identity):
            return False
        if tokens == 0 or k.dtype in (torch.float16, torch.bfloat16):  # here `attend` is more exact
            return False
        return 2 * width * (heads * tokens - heads * size - tokens) * k.element_size() <= ABSORB_BYTES

    @staticmethod
    def _absorb(reader: Reader, k: Tensor, v: Tensor) -> tuple[Function, Function, Addition]:
        """The norm, h -> scores (1, H * N), and weights (1, H * N) -> the output, added in place."""
        (before, module, factor), (heads, _, size), width = reader, k.shape, reader.attn.out.out_features
        k, weight, bias = k * module.scale, module.q.weight, module.q.bias
        offset = None if bias is None else torch.bmm(k, bias.view(heads, size, 1)).flatten()
        keys = torch.bmm(k, weight.view(heads, size, width)).flatten(0, 1)  # (H * N, D)
        values = torch.bmm(v, module.out.weight.view(width, heads, size).permute(1, 2, 0)).flatten(0, 1)  # (H * N, D)
        if module.out.bias is not None:  # the weights of each head sum to 1 and add its share
            values = values + module.out.bias / heads
        return norm(before), product(keys, offset), adding(values.t(), None, factor)

    def add(self, layer: int, x: Tensor) -> None:
        before, scores, out = self.blocks[layer]
        out(x, torch.softmax(scores(before(x)).view(self.heads, self.tokens), -1).view(1, -1))

    def keep(self, rows: Tensor) -> None:
        """There is only one row."""


class Projected:
    """Norm, queries, attention, output projection, as in the module.

    Several parts (such as patches and question tokens) are joined to one list of keys if that copies little; if many
    rows share an entry the parts stay separate, with one softmax over all of them.
    """

    def __init__(self, readers: list[Reader], memory: Layers) -> None:
        self.scales = [reader.attn.scale for reader in readers]
        self.blocks = [
            (norm(before), queries(cross), linear_adding(cross.out, factor)) for before, cross, factor in readers
        ]
        self._lay_out(memory)

    def _lay_out(self, memory: Layers) -> None:
        if len(memory[0]) > 1 or memory[0][0].sharing.slot is not None:
            memory = _joined(memory)
        whole = len(memory[0]) == 1 and memory[0][0].sharing.slot is None
        self.memory, self.keys = memory, _Keys([part for (part,) in memory], self.scales) if whole else None
        if self.keys is not None and self.keys.repeat == 1:  # each row has its own entry: `keys` alone can drop rows
            self.memory = []

    def add(self, layer: int, x: Tensor) -> None:
        before, ask, out = self.blocks[layer]
        q = ask(before(x))
        out(x, self._apart(layer, q) if self.keys is None else self.keys.read(layer, q))

    def _apart(self, layer: int, q: Tensor) -> Tensor:
        """Queries (R, H * d) -> attention (R, H * d), each part with its own sharing."""
        parts = self.memory[layer]
        heads, size = parts[0].k.shape[1], parts[0].k.shape[3]
        queries = q.view(len(q), heads, size).unsqueeze(2)
        return attention_over_parts(queries, parts, scale=self.scales[layer]).flatten(1)  # of (R, H, 1, d)

    def keep(self, rows: Tensor) -> None:
        if self.keys is not None and self.keys.repeat == 1:
            self.keys.keep(rows)
        else:
            self._lay_out(select(self.memory, rows))


def _joined(layers: Layers) -> Layers:
    """Join the parts of each layer, with the finest sharing among them; unchanged if that copies too much."""
    first = layers[0]
    rows = first[0].sharing.rows
    shared = all(part.sharing.slot is None for part in first)
    repeat = math.gcd(*(part.sharing.repeat for part in first)) if shared else 1
    extra = sum((rows // repeat - len(part.k)) * part.k[0].nbytes * 2 for part in first)
    if extra > JOIN_BYTES:
        return layers
    chosen = torch.arange(0, rows, repeat, device=first[0].k.device)
    own = [p.sharing.entry_of_row(chosen.device)[chosen] for p in first]  # (E,) of each part: the entry behind entry e
    whole = Sharing(len(chosen), repeat)
    return [
        [concatenate([part.take(index) for part, index in zip(parts, own, strict=True)])._replace(sharing=whole)]
        for parts in layers
    ]


class _Keys:
    """One list of keys for each entry, in all layers; the F rows that read an entry are its queries."""

    def __init__(self, parts: list[KeyValue], scales: list[float]) -> None:
        """`parts` by layer, without slots; `scales` multiply the scores."""
        first = parts[0]
        (entries, self.heads, tokens, self.size), self.repeat = first.k.shape, first.sharing.repeat
        self.kept = first.k.new_empty(2, len(parts), entries, self.heads, tokens, self.size)
        for part, scale, keys, values in zip(parts, scales, *self.kept, strict=True):
            torch.mul(part.k, scale, out=keys)
            values.copy_(part.v)
        self.bias = None  # (E, H, 1, N)
        if first.mask is not None and not bool(first.mask.all()):
            may = first.mask.bool()
            empty = ~may.any(1)  # (E,) entries without real tokens: their rows get zeros
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
        """Queries (R, H * d) -> attention (R, H * d)."""
        keys, values = self.layers[layer]
        if self.repeat == 1:
            return attend(q.view(-1, 1, self.size), keys, values, self.spread).view(q.shape)
        queries = q.view(-1, self.repeat, self.heads, self.size).transpose(1, 2).reshape(-1, self.repeat, self.size)
        z = attend(queries, keys, values, self.spread)
        return z.view(-1, self.heads, self.repeat, self.size).transpose(1, 2).reshape(q.shape)
