"""Attention on a GPU: ours against the best backend of scaled_dot_product_attention and against FlexAttention.

Forward and backward are timed separately by CUDA events, medians of many calls; gradients are those of q, k, v and, if
there is one, of T5's relative bias. FlexAttention looks the bias up in the same buckets. SDPA gets it as a dense
tensor; making that tensor and summing its gradient into buckets is not timed. Before a time is taken, every side must
match the output of the fp32 definition to the tolerance of its number format. TFLOP/s count two products forward and
five backward, no more for what a side computes twice.

Shapes: B batch, H heads, T tokens, d head size.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import results, timing
from vqa_scratch import kernels
from vqa_scratch.errors import UserError
from vqa_scratch.kernels import reference

OUTPUT_TOLERANCE = 2e-2  # bf16 holds 8 bits; outputs are averages of numbers of size 1
OURS, FLEX = "ours", "FlexAttention"
SDPA = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


@dataclass(frozen=True)
class Case:
    """One comparison, in bf16."""

    tokens: int
    head: int = 64
    causal: bool = False
    bias: bool = False
    batch: int = 8
    heads: int = 12

    @property
    def name(self) -> str:
        words = [f"{self.tokens} tokens", f"d {self.head}", "causal" * self.causal, "T5 bias" * self.bias]
        return ", ".join(word for word in words if word)

    @property
    def goals(self) -> tuple[float, float]:
        """At least so many times as fast as the best SDPA backend, forward and backward."""
        if self.tokens < 1024:
            return 1.0, 1.0
        return (1.3, 1.0) if self.bias else (0.9, 0.75)

    def operations(self) -> float:
        """Of the two products of the forward pass."""
        return 4.0 * self.batch * self.heads * self.tokens**2 * self.head / (2 if self.causal else 1)


CASES = [
    Case(197, batch=64),
    Case(1024),
    Case(1024, causal=True),
    Case(1024, bias=True),
    Case(1024, head=128),
    Case(4096, bias=True),
]

Way = Callable[[Tensor, Tensor, Tensor, kernels.DistanceBias | Tensor | None], Tensor]


def ours(case: Case) -> Way:
    return lambda q, k, v, bias: kernels.flash_attention(q, k, v, causal=case.causal, bias=bias)[0]


def sdpa(case: Case, backend: str) -> Way:
    def run(q: Tensor, k: Tensor, v: Tensor, dense: Tensor | None) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=dense, is_causal=case.causal)

    return run


def flex(case: Case) -> Way:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    order = None
    if case.causal:
        order = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.tokens, case.tokens, device="cuda")

    def run(q: Tensor, k: Tensor, v: Tensor, bias: kernels.DistanceBias | None) -> Tensor:
        if bias is None:
            return compiled(q, k, v, block_mask=order)
        table, line = bias.table, bias.buckets(case.tokens, case.tokens)
        return compiled(q, k, v, score_mod=lambda s, b, h, i, j: s + table[line[j - i + case.tokens - 1], h])

    return run


def seconds_of(work: Callable[[], object], budget: float = 0.3) -> float:
    """Median seconds of a call by CUDA events, over about `budget` seconds."""
    for _ in range(3):
        work()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    while len(taken) < 5 or sum(taken) < budget:
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(taken)


def measure(way: Way, case: Case, dense: bool) -> tuple[float, float, float]:
    """(seconds forward, seconds backward, peak GB). Raises UserError if the output is wrong.

    `dense`: the way takes its bias written out.
    """
    torch.manual_seed(0)
    shape = (case.batch, case.tokens, case.heads, case.head)
    q, k, v, do = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    bias = given = None
    if case.bias:
        table = torch.randn(32, case.heads, device="cuda", requires_grad=True)
        bias = given = kernels.DistanceBias(table, 128, not case.causal)
        leaves.append(table)
        if dense:
            leaves[-1] = given = bias.dense(case.tokens, case.tokens).detach().to(q.dtype).requires_grad_()
    with torch.no_grad():
        few = [x[:1].float() for x in (q, k, v)]
        expected = reference.attention(*few, causal=case.causal, bias=bias)[0]
        off = float((way(q, k, v, given)[:1].float() - expected).abs().max())
    if not off <= OUTPUT_TOLERANCE:
        raise UserError(f"attention, {case.name}: off by {off:.1e}")
    torch.cuda.reset_peak_memory_stats()
    forward = seconds_of(lambda: way(q, k, v, given))
    out = way(q, k, v, given)
    backward = seconds_of(lambda: torch.autograd.grad(out, leaves, do, retain_graph=True))
    return forward, backward, torch.cuda.max_memory_allocated() / 1e9


Figures = dict[str, tuple[float, float, float] | str]  # by side: those of `measure`, or why there are none


def try_ways(case: Case, names: Sequence[str]) -> Figures:
    """The figures of these sides. A peer may fail, and then its row says how; ours may not."""
    figures: Figures = {}
    for name in names:
        try:
            way = {OURS: ours, FLEX: flex}.get(name)
            figures[name] = measure(way(case) if way else sdpa(case, name), case, name in SDPA)
        except Exception as error:  # a backend that does not take this case says so in many ways
            if name == OURS:
                raise
            figures[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:60]}"
    return figures


def rows(case: Case, figures: Figures) -> list[list[str]]:
    """The lines of the table for one case."""
    lines = []
    timed = [f for name, f in figures.items() if not isinstance(f, str) and name in SDPA]
    best = [min((f[i] for f in timed), default=float("nan")) for i in range(2)]
    for name, f in figures.items():
        if isinstance(f, str):
            lines.append([case.name, name, f"not measured: {f}", "", "", ""])
            continue
        rates = [case.operations() * factor / f[i] / 1e12 for i, factor in enumerate((1.0, 2.5))]
        times = [f"{f[i] * 1e3:.3f} ms, {rates[i]:.0f} TFLOP/s" for i in range(2)]
        ratio = ""
        if name == OURS:
            ratio = " / ".join(f"{best[i] / f[i]:.2f}x (goal {case.goals[i]})" for i in range(2))
        lines.append([case.name, name, *times, ratio, f"{f[2]:.2f}"])
    return lines


def all_rows(cases: list[Case], seconds: float) -> list[list[str]]:
    """The table: first ours and SDPA in every case; then, while there is time, FlexAttention, which compiles long."""
    if not torch.cuda.is_available():
        return [[c.name, side, "not measured: no GPU", "", "", ""] for c in cases for side in (OURS, "best SDPA", FLEX)]
    end, found, lines = time.monotonic() + seconds, {}, {}
    for case in cases:
        made = results.or_reason(case.name, 6, lambda c=case: rows(c, found.setdefault(c, try_ways(c, [OURS, *SDPA]))))
        lines[case] = printed(made)
    for case, figures in found.items():
        late = time.monotonic() > end
        figures |= {FLEX: "no time left"} if late else try_ways(case, [FLEX])
        lines[case] = rows(case, figures)
        printed(lines[case][-1:])
    return [line for case in cases for line in lines[case]]


def printed(lines: list[list[str]]) -> list[list[str]]:
    """The same lines, also said at once: a run that is cut short has not been for nothing."""
    print("\n".join(" | ".join(line) for line in lines), file=sys.stderr, flush=True)
    return lines


def run(command: str, cases: list[Case] = CASES, seconds: float = math.inf) -> str:
    """The section of the results file; after so many seconds no further peer is compiled."""
    head = ["case", "side", "forward", "backward", "ours to the best SDPA, forward / backward", "peak GB"]
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return "\n".join(
        [
            "## Attention on a GPU, bf16",
            "",
            __doc__.split("\n\n")[1].replace("\n", " "),
            "",
            results.table(head, all_rows(cases, seconds)),
            "",
            f"- {hardware}. torch {torch.__version__}. Commit {timing.commit(Path(__file__).parent)}. `{command}`",
        ]
    )
