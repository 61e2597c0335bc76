"""The kernels compile for GPUs that are not here: Triton needs none for that, only its interpreter must be off.

Run as a program this file compiles every kernel for an A100 or an RTX card (8.0), an H100 (9.0) or an RTX card of the
50 series (12.0) and prints the shared memory that each asks for; the test holds it against what such a card has.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# Bytes a program may use; cards of 8.6 and 8.9 have less than an A100.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Head size, number format, bias, causal, mask: the large ones, and what can go wrong by itself: exact fp32 products, a
# head padded to its tile, no mask, all of it at once.
CASES = [(head, "bf16", bias, not bias, True) for head in (64, 128) for bias in (False, True)]
CASES += [(64, "fp32", True, False, True), (128, "fp32", False, True, False), (80, "fp16", True, True, False)]
CASES += [(32, "bf16", False, False, False)]


def compiled(fn, constants: dict, tile, capability: int, kind: str = "bf16"):
    """The kernel compiled with these constants for tensors in `kind`; other dtypes follow from the arguments' names."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = dict.fromkeys("BIAS LSE LSE2 DELTA DLSE DBIAS LOSS LOGPROBS ENTROPY DLOGPROBS DENTROPY".split(), "*fp32")
    kinds |= {"BUCKETS": "*i32", "RIGHT": "*i32", "LABELS": "*i64", "IDS": "*i64", "KEEP": "*u8"}
    kinds |= {"scale": "fp32", "scale2": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {n: kinds.get(n, f"*{kind}" if n.isupper() else "i32") for n in fn.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(fn.arg_names) if n.isupper() or "stride" in n}
    aligned = {place: given for place, given in aligned.items() if signature[fn.arg_names[place[0]]] != "constexpr"}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(capability: int) -> dict[str, int]:
    """Bytes of shared memory by kernel."""
    from vqa_scratch.kernels import attention, rows
    from vqa_scratch.kernels.attention_forward import attention_forward
    from vqa_scratch.kernels.attention_key_gradient import attention_delta, attention_key_gradients
    from vqa_scratch.kernels.attention_query_gradient import attention_query_gradient

    torch.cuda.get_device_capability = lambda device: divmod(capability, 10)
    used = {}
    three = {
        "forward": (attention_forward, "BLOCK_M", "BLOCK_N"),
        "query": (attention_query_gradient, "BLOCK_M", "BLOCK_N"),
        "key": (attention_key_gradients, "BLOCK_N", "BLOCK_M"),
    }
    for head, kind, bias, causal, masked in CASES:
        for name, (fn, rows_of, step_of) in three.items():
            width = attention._padded(head)
            tile = attention.tiles(name, width, KINDS[kind], bias, torch.device("cuda"))
            constants = {"HEAD": head, "BLOCK_D": width, rows_of: tile.rows, step_of: tile.step}
            constants |= {"PRECISION": "ieee" if kind == "fp32" else "tf32"}
            constants |= {"HAS_KEEP": masked, "HAS_BIAS": bias, "CAUSAL": causal}
            if name == "query":
                constants |= {"R": 32, "BIAS_GRAD": bias}
            kernel = compiled(fn, constants, tile, capability, kind)
            products = re.findall(r"wgmma\.mma_async|mma\.sync[.\w]*", kernel.asm["ptx"])
            if kind == "fp32":  # exact: a product in TF32 would keep 10 bits
                assert not products, products
            elif capability == 90:
                assert "wgmma.mma_async" in products, name  # the H100's own products
            used[f"{name}, head {head}, {kind}{', bias' * bias}{', causal' * causal}"] = kernel.metadata.shared
    tile = attention.Tile(1, rows.BLOCK, rows.WARPS, 3)
    delta = {"HEAD": 64, "BLOCK_D": 64, "BLOCK_M": 64, "HAS_DLSE": True}
    used["delta"] = compiled(attention_delta, delta, tile, capability).metadata.shared
    for fn, constants in (
        (rows.cross_entropy_rows, {"GRAD": True}),
        (rows.logprob_rows, {}),
        (rows.logprob_rows_gradient, {}),
    ):
        for kind in KINDS:
            kernel = compiled(fn, constants | {"BLOCK": rows.BLOCK}, tile, capability, kind)
            used[f"{fn.__name__}, {kind}"] = kernel.metadata.shared
    return used


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_and_fits(capability):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, str(capability)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    assert len(used) == 3 * len(CASES) + 10 and max(used.values()) <= SHARED[capability], used


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
