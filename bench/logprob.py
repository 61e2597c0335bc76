"""Log-probability and entropy of chosen tokens from logits on a GPU: the share of the memory's bandwidth it reaches.

The forward pass has to read each logit once; its bytes per second are compared with those of a copy on the same GPU
(read plus written). The plain way is log_softmax, its sum with the probabilities, and a gather.

Shapes: N rows, V vocabulary.
"""

from pathlib import Path

import torch

from bench import results, timing
from bench.attention import seconds_of
from vqa_scratch import kernels
from vqa_scratch.kernels import reference

GOAL = 0.75
CASES = [(8192, 151936), (8192, 50257), (16384, 32128)]


def row(count: int, vocabulary: int, rate: float) -> list[str]:
    """One line of the table."""
    columns = -(-vocabulary // 64) * 64
    logits = torch.randn(count, columns, device="cuda", dtype=torch.bfloat16)[:, :vocabulary]
    ids = torch.randint(vocabulary, (count,), device="cuda")
    expected = reference.chosen_logprobs(logits[:64].float(), ids[:64])
    torch.testing.assert_close(kernels.chosen_logprobs(logits[:64], ids[:64]), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        ours = seconds_of(lambda: kernels.chosen_logprobs(logits, ids))
        plain = seconds_of(lambda: reference.chosen_logprobs(logits, ids))
    bytes_read = count * vocabulary * 2
    return [
        f"{count} x {vocabulary:,}",
        f"{ours * 1e3:.3f} ms",
        f"{bytes_read / ours / 1e9:.0f} GB/s",
        f"{bytes_read / ours / rate:.0%} (goal {GOAL:.0%})",
        f"{plain * 1e3:.3f} ms",
        f"{plain / ours:.1f}x",
    ]


def run(command: str) -> str:
    """The section of the results file."""
    head = ["bf16 logits", "ours", "read at", "of a copy's rate", "plain", "ours is faster by"]
    if torch.cuda.is_available():
        rate = timing.copy_gb_per_second(device="cuda") * 1e9
        lines = [
            line for n, v in CASES for line in results.or_reason(f"{n} x {v:,}", 6, lambda n=n, v=v: [row(n, v, rate)])
        ]
        hardware = f"{torch.cuda.get_device_name()}, a copy at {rate / 1e9:.0f} GB/s"
    else:
        lines = [[f"{n} x {v:,}", "not measured: no GPU", "", "", "", ""] for n, v in CASES]
        hardware = "no GPU"
    return "\n".join(
        [
            "## Log-probability and entropy on a GPU",
            "",
            __doc__.split("\n\n")[1].replace("\n", " "),
            "",
            results.table(head, lines),
            "",
            f"- {hardware}. torch {torch.__version__}. Commit {timing.commit(Path(__file__).parent)}. `{command}`",
        ]
    )
