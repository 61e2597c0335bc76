"""The kernels compile for GPUs that are not here: Triton needs none for that, only its interpreter must be off.

Run as a program this file compiles every kernel for an A100 or an RTX card (8.0) or an H100 (9.0) and prints the shared
memory that each asks for; the test holds it against what such a card has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = {80: 99 * 1024, 90: 227 * 1024}  # bytes a program may use; cards of 8.6 and 8.9 have less than an A100


def compiled(fn, constants: dict, tile, capability: int):
    """The kernel compiled with these constants; dtypes follow from the arguments' names."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = dict.fromkeys("BIAS LSE LSE2 DELTA DLSE DBIAS LOSS LOGPROBS ENTROPY DLOGPROBS DENTROPY".split(), "*fp32")
    kinds |= {"BUCKETS": "*i32", "RIGHT": "*i32", "LABELS": "*i64", "IDS": "*i64", "KEEP": "*u8"}
    kinds |= {"scale": "fp32", "scale2": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {n: kinds.get(n, "*bf16" if n.isupper() else "i32") for n in fn.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(fn.arg_names) if n.isupper() or "stride" in n}
    aligned = {place: given for place, given in aligned.items() if signature[fn.arg_names[place[0]]] != "constexpr"}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(capability: int) -> dict[str, int]:
    """Bytes of shared memory by kernel."""
    from kernels import attention, rows
    from kernels.attention_forward import attention_forward
    from kernels.attention_key_gradient import attention_delta, attention_key_gradients
    from kernels.attention_query_gradient import attention_query_gradient

    torch.cuda.get_device_capability = lambda device: divmod(capability, 10)
    used = {}
    three = {
        "forward": (attention_forward, "BLOCK_M", "BLOCK_N"),
        "query": (attention_query_gradient, "BLOCK_M", "BLOCK_N"),
        "key": (attention_key_gradients, "BLOCK_N", "BLOCK_M"),
    }
    for head in (64, 128):
        for bias in (False, True):
            for name, (fn, rows_of, step_of) in three.items():
                tile = attention.tiles(name, head, torch.bfloat16, bias, torch.device("cuda"))
                constants = {"HEAD": head, "BLOCK_D": head, rows_of: tile.rows, step_of: tile.step, "PRECISION": "tf32"}
                constants |= {"HAS_KEEP": True, "HAS_BIAS": bias, "CAUSAL": not bias}
                if name == "query":
                    constants |= {"R": 32, "BIAS_GRAD": bias}
                kernel = compiled(fn, constants, tile, capability)
                assert capability < 90 or "wgmma.mma_async" in kernel.asm["ptx"], name  # the H100's own products
                used[f"{name}, head {head}{', bias' * bias}"] = kernel.metadata.shared
    tile = attention.Tile(1, rows.BLOCK, rows.WARPS, 3)
    delta = {"HEAD": 64, "BLOCK_D": 64, "BLOCK_M": 64, "HAS_DLSE": True}
    used["delta"] = compiled(attention_delta, delta, tile, capability).metadata.shared
    for fn, constants in (
        (rows.cross_entropy_rows, {"GRAD": True}),
        (rows.logprob_rows, {}),
        (rows.logprob_rows_gradient, {}),
    ):
        used[fn.__name__] = compiled(fn, constants | {"BLOCK": rows.BLOCK}, tile, capability).metadata.shared
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
    assert len(used) == 16 and max(used.values()) <= SHARED[capability], used


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
