"""A T5 encoder on a GPU whose Triton kernel looks up the relative bias, against the bias as a dense tensor.

Flan-t5-small's encoder, forward and backward, in bf16 autocast with weights in fp32; as a dense tensor, the bias goes
to the best backend of scaled_dot_product_attention that takes one. Both ways are one model and take turns. Before a
time is taken they must agree in fp32, on the states and on the gradients of the table and of the first projection, and
in bf16 the kernel may be twice as far from fp32 as the other. Peak memory is what a step holds beyond the model.

Shapes: B rows, T tokens.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from bench import results, timing
from vqa_scratch.errors import UserError
from vqa_scratch.models.t5 import T5, T5Config

CASES = [(16, 512), (8, 1024), (2, 4096)]  # B, T
WAYS = ("looked up", "written out")
TOLERANCE = 1e-4  # in fp32, relative to the largest number: sums of up to 4,096 terms in another order
ROUNDS, STEPS = 5, 5


@contextmanager
def way(name: str) -> Iterator[None]:
    """Let attention take the kernel, or not."""
    with (
        nullcontext()
        if name == "looked up"
        else mock.patch("vqa_scratch.kernels.takes_attention", lambda q, **options: False)
    ):
        yield


def step(model: T5, ids: Tensor, mask: Tensor, kind: torch.dtype) -> list[Tensor]:
    """The states, and the gradients of the table and of the first projection."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(ids.device.type, kind, enabled=kind != torch.float32):
        states = model.encode(ids, mask)
    (states.float() * mask[..., None]).square().sum().sqrt().backward()
    first = model.encoder.blocks[0].attn.qkv.weight
    return [(states * mask[..., None]).detach().float(), model.encoder.bias.table.weight.grad, first.grad]


def off(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))


def check(model: T5, ids: Tensor, mask: Tensor) -> str:
    """A line on how far the ways agree. Raises UserError where they do not."""
    found = {}
    for kind in (torch.float32, torch.bfloat16):
        for name in WAYS:
            with way(name):
                found[name, kind] = step(model, ids, mask, kind)
    exact = found["written out", torch.float32]
    single = off(found["looked up", torch.float32], exact)
    half = [off(found[name, torch.bfloat16], exact) for name in WAYS]
    said = f"{single:.1e} apart in fp32; in bf16 {half[0]:.1e} and {half[1]:.1e} from fp32"
    if not (single <= TOLERANCE and half[0] <= 2 * half[1] + 2**-8):
        raise UserError(f"T5's bias, {len(ids)} x {ids.shape[1]} tokens: {said}")
    return said


def row(model: T5, rows: int, tokens: int) -> list[str]:
    """One line of the table; the last row is padded."""
    ids = torch.randint(2, model.config.vocab_size, (rows, tokens), device="cuda")
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, tokens // 2 :] = False
    said, memory = check(model, ids, mask), {}

    def turn(name: str) -> float:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        with way(name):
            for _ in range(STEPS):
                step(model, ids, mask, torch.bfloat16)
        torch.cuda.synchronize()
        memory[name] = (torch.cuda.max_memory_allocated() - held) / 1e9
        return (time.perf_counter() - start) / STEPS * 1e3

    taken = timing.in_turn({name: lambda name=name: turn(name) for name in WAYS}, ROUNDS)
    times = [timing.Spread.of(taken[name]).text() for name in WAYS]
    faster = timing.speedup(taken["looked up"], taken["written out"])
    peaks = [f"{memory[name]:.2f}" for name in WAYS]
    return [f"{rows} x {tokens} tokens", *times, f"{faster.median:.2f}x", *peaks, said]


def run(command: str, config: T5Config | None = None) -> str:
    """The section of the results file."""
    head = ["case", *(f"{name}, ms a step" for name in WAYS), "faster by", *(f"{name}, peak GB" for name in WAYS)]
    lines, hardware = [[f"{b} x {t} tokens", "not measured: no GPU", *[""] * 5] for b, t in CASES], "no GPU"
    if torch.cuda.is_available():
        torch.manual_seed(0)
        model = T5(config or T5Config(vocab_size=512, dropout=0.0)).cuda()
        lines = [
            line
            for b, t in CASES
            for line in results.or_reason(f"{b} x {t} tokens", 7, lambda b=b, t=t: [row(model, b, t)])
        ]
        hardware = torch.cuda.get_device_name()
    return "\n".join(
        [
            "## T5's encoder on a GPU, its bias looked up or written out",
            "",
            __doc__.split("\n\n")[1].replace("\n", " "),
            "",
            results.table([*head, "agreement"], lines),
            "",
            f"- {hardware}. torch {torch.__version__}. Commit {timing.commit(Path(__file__).parent)}. `{command}`",
        ]
    )
