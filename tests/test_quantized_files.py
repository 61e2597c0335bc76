"""Quantised files: GPTQ's and AWQ's written by hand, runs that are exported, and what is refused."""

import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from run_helpers import command, make_run, picture
from safetensors.torch import load_file, save_file

from bench import quantize as bench
from bench.suite import figures
from vqa_scratch import systems
from vqa_scratch.commands.line import FILE_FORMATS, PRODUCT_FORMATS
from vqa_scratch.errors import UserError, note
from vqa_scratch.models import GPT2, GPT2Config, Llama, LlamaConfig
from vqa_scratch.nn.gptq import relative_error
from vqa_scratch.nn.quantized import FORMATS, QuantizedLinear, matrices
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.storage import write_json
from vqa_scratch.systems import quantize as quantized_runs
from vqa_scratch.systems.policy import vqa_task
from vqa_scratch.systems.run_folder import begin_or_go_on
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.weights.packed import dequantized, read_scheme

# ------------------------------------------------------------------------------------------ GPTQ and AWQ, by hand

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight neighbours, in the order of the nibbles of an int32
KEY = "model.layers.0.self_attn.q_proj"


def word(nibbles, bits: int) -> int:
    """An int32 of codes, the first in the lowest bits."""
    value = sum(int(code) << bits * place for place, code in enumerate(nibbles))
    return value - 2**32 if value >= 2**31 else value


def words(rows, bits: int) -> torch.Tensor:
    return torch.tensor([[word(row[i : i + 32 // bits], bits) for i in range(0, len(row), 32 // bits)] for row in rows])


def gptq_file(codes, zeros, scales, bits: int, less: int) -> dict[str, torch.Tensor]:
    """codes (K, N), zeros and scales (G, N)."""
    qweight = words(codes.t().tolist(), bits).t().contiguous().int()
    return {"qweight": qweight, "qzeros": words((zeros - less).tolist(), bits).int(), "scales": scales.half()}


def awq_file(codes, zeros, scales) -> dict[str, torch.Tensor]:
    def packed(matrix):
        return words([[row[i + p] for i in range(0, len(row), 8) for p in AWQ_PLACES] for row in matrix.tolist()], 4)

    return {"qweight": packed(codes).int(), "qzeros": packed(zeros).int(), "scales": scales.half()}


def by_formula(codes, zeros, scales, groups) -> torch.Tensor:
    """(N, K) one weight at a time, rounded to the type of the scales."""
    inputs, outputs = codes.shape
    values = [
        [(int(codes[k, n]) - int(zeros[groups[k], n])) * float(scales[groups[k], n].half()) for k in range(inputs)]
        for n in range(outputs)
    ]
    return torch.tensor(values, dtype=torch.float64).half()


def parts(inputs: int, outputs: int, group: int, bits: int):
    codes, count = torch.randint(0, 2**bits, (inputs, outputs)), inputs // group
    zeros, scales = torch.randint(1, 2**bits, (count, outputs)), torch.rand(count, outputs) + 0.01
    return codes, zeros, scales


def described(**more) -> dict:
    return {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8} | more}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("layout", [None, "gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ["none", "in order", "by activity"])
def test_gptq_by_hand(bits, layout, order):
    codes, zeros, scales = parts(32, 16, 8, bits)
    groups = torch.arange(32) // 8
    if order == "by activity":
        groups = groups[torch.randperm(32)]
    file = gptq_file(codes, zeros, scales, bits, 0 if layout == "gptq_v2" else 1)
    if order != "none":
        file["g_idx"] = groups.int()
    scheme = read_scheme(described(bits=bits, **({"checkpoint_format": layout} if layout else {})), "x")
    assert torch.equal(dequantized(scheme, "a", file, "x").t(), by_formula(codes, zeros, scales, groups))


@pytest.mark.parametrize("group", [8, -1])
def test_awq_by_hand(group):
    codes, zeros, scales = parts(32, 24, 32 if group == -1 else group, 4)
    given = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    scheme = read_scheme({"quantization_config": given}, "x")
    groups = torch.arange(32) // (32 if group == -1 else group)
    expected = by_formula(codes, zeros, scales, groups)
    assert torch.equal(dequantized(scheme, "a", awq_file(codes, zeros, scales), "x").t(), expected)


@pytest.mark.parametrize("stored", [7, 8])
def test_zeros_of_the_second_version_under_the_first_ones_name(stored, capsys):
    """Symmetric weights of 4 bits have zero 8: files of the first version hold 7, some hold 8 all the same."""
    note.cache_clear()
    codes, _, scales = parts(16, 8, 8, 4)
    eights = torch.full((2, 8), 8)
    file = gptq_file(codes, eights, scales, 4, 8 - stored)
    scheme = read_scheme(described(sym=True), "x")
    expected = by_formula(codes, eights, scales, torch.arange(16) // 8)
    assert torch.equal(dequantized(scheme, "a", file, "x").t(), expected)
    assert ("zeros as in gptq_v2" in capsys.readouterr().err) == (stored == 8)


def checkpoint(folder: Path, kind: str) -> tuple[Llama, torch.Tensor]:
    """A Llama with one matrix packed, and what it means."""
    model = Llama(LlamaConfig(40, dim=16, layers=1, heads=2, hidden=24))
    model.save_pretrained(folder)
    codes, zeros, scales = parts(16, 16, 8, 4)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    del tensors[f"{KEY}.weight"]
    file = awq_file(codes, zeros, scales) if kind == "awq" else gptq_file(codes, zeros, scales, 4, 1)
    tensors |= {f"{KEY}.{part}": tensor for part, tensor in file.items()}
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", config | described(quant_method=kind))
    return model, by_formula(codes, zeros, scales, torch.arange(16) // 8)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_checkpoint_opens_with_plain_weights(tmp_path, kind):
    model, expected = checkpoint(tmp_path, kind)
    opened = Llama.from_pretrained(tmp_path)
    assert torch.equal(opened.blocks[0].attn.qkv.weight[:16], expected.float())
    assert torch.equal(opened.blocks[0].attn.qkv.weight[16:], model.blocks[0].attn.qkv.weight[16:])


def test_a_gpt2_keeps_its_matrices_the_other_way_round(tmp_path):
    model = GPT2(GPT2Config(40, 16, dim=16, layers=1, heads=2))
    model.save_pretrained(tmp_path)
    codes, zeros, scales = parts(16, 64, 8, 4)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    (key,) = (key for key in tensors if key.endswith("h.0.mlp.c_fc.weight"))
    del tensors[key]
    file = gptq_file(codes, zeros, scales, 4, 1)
    tensors |= {f"{key.removesuffix('.weight')}.{part}": tensor for part, tensor in file.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", config | described())
    expected = by_formula(codes, zeros, scales, torch.arange(16) // 8)
    assert torch.equal(GPT2.from_pretrained(tmp_path).blocks[0].mlp.up.weight, expected.float())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "is quantised by bitsandbytes, which cannot be read"),
        ({"quant_method": "fp8"}, "quantised by fp8, .*; supported are gptq of 2, 4 or 8 bits and awq of 4 bits"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 8}, "quantised by gptq of 3 bits, which cannot be read"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv", "group_size": 8}, "awq of 4 bits gemv, which cannot"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq of 4 bits marlin, which cannot"),
        ({"quant_method": "gptq", "bits": "4"}, "quantization_config: 'bits' is '4', not int"),
        ({"quant_method": "gptq", "bits": 4}, "quantization_config has no 'group_size'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "'group_size' is 0; it is a number of inputs, or -1"),
        ({"bits": 4}, "quantization_config has no 'quant_method'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, r"q_proj in .* has scales \(2, 16\) .* \(1, 16\)"),
        (None, r"q_proj.qweight, but config.json has no quantization_config"),
    ],
)
def test_schemes_that_are_not_supported(tmp_path, given, message):
    checkpoint(tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"quantization_config": given})
    with pytest.raises(UserError, match=message):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{KEY}.scales"), f"has {KEY}.qweight, but no scales for it"),
        (lambda t: t.update({f"{KEY}.qweight": t[f"{KEY}.qweight"].long()}), "whose codes are int32"),
        (lambda t: t.update({f"{KEY}.g_idx": torch.arange(16).int()}), "g_idx in .* must give each of 16 inputs"),
        (lambda t: t.update({f"{KEY}.g_idx": torch.zeros(9).int()}), "g_idx in"),
        (lambda t: t.update({f"{KEY}.scales": t[f"{KEY}.scales"] * float("nan")}), "holds NaN or infinite numbers"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, change, message):
    checkpoint(tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        Llama.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    return make_run(data, tmp_path_factory.mktemp("quantised") / "run", question_prompt=True, width=64)


def exported(run: Path, folder: Path, *flags: str) -> Path:
    command("export", run, folder, *flags)
    return folder


QUESTION = ("--question", "what color is the square?")


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_an_exported_run_says_what_the_run_says_with_rounded_weights(run, data, tmp_path, form, capsys):
    folder = exported(run, tmp_path / form, "--quantize", form)
    said = capsys.readouterr().out
    sizes = [(where / "model.safetensors").stat().st_size for where in (folder, run)]
    assert re.search(r"model.safetensors has (\S+) MB, that of \S+ (\S+) MB", said).groups() == tuple(
        f"{size / 1e6:.1f}" for size in sizes
    )
    linears = matrices(systems.load(run).model)
    bits = {"int8": 8, "int4": 5}[form]
    saved = sum(linear.weight.numel() * (32 - bits) / 8 for linear in linears.values())
    assert sizes[1] - sizes[0] == pytest.approx(saved, rel=0.05)  # int8's scales, and the names of more tensors
    asked = ("ask", "--image", picture(data), *QUESTION, "--precision", "bf16")
    command(*asked, folder)
    answers = [capsys.readouterr().out]
    command(*asked, run, "--quantize", form)
    assert answers == [capsys.readouterr().out] and "probability" in answers[0]
    kept = systems.load(folder, precision="bf16").model.decoder
    assert isinstance(kept.blocks[0].mlp.down, QuantizedLinear) and kept.head_copy is not None


def test_without_a_product_the_weights_are_unpacked_with_a_note(run, data, tmp_path, capsys):
    """In fp32, and of nf4 anywhere; `evaluate` opens it too."""
    for form, precision in (("int8", "fp32"), ("nf4", "bf16")):
        note.cache_clear()
        folder = exported(run, tmp_path / form, "--quantize", form)
        capsys.readouterr()
        opened, plain = systems.load(folder, precision=precision), systems.load(run)
        (line,) = capsys.readouterr().err.splitlines()
        assert f"has weights in {form}; here they are unpacked to {precision}: " in line
        kind = FORMATS[form]
        for name, linear in matrices(opened.model).items():
            weight = plain.model.get_submodule(name).weight
            assert torch.equal(linear.weight, kind.dequantize(kind.quantize(weight)))
    command("evaluate", folder, "--data", data, "--limit", "8")
    assert json.loads((folder / "evaluation.json").read_text())["questions"] == 8


def test_codes_by_gptq(run, tmp_path, monkeypatch):
    """They differ from the nearest ones, and cost less of what the matrices say about other questions."""
    monkeypatch.setattr(quantized_runs, "CALIBRATED", 96)
    plain = systems.load(run)
    seen = quantized_runs.read_inputs(plain, plain.read(plain.options).samples["val"])
    error = {}
    for flags in ((), ("--calibrate",)):
        opened = systems.load(exported(run, tmp_path / f"by{len(flags)}", "--quantize", "int4", *flags))
        weights = {name: linear.weight for name, linear in matrices(opened.model).items()}
        error[flags] = {n: relative_error(plain.model.get_submodule(n).weight, w, seen[n]) for n, w in weights.items()}
    assert sum(error["--calibrate",].values()) < 0.9 * sum(error[()].values())


def test_quantised_runs_are_not_trained(run, tmp_path):
    folder = exported(run, tmp_path / "small", "--quantize", "int8")
    message = "small has weights in int8, which cannot be trained; take the run they come from"
    plain = systems.load(run)
    with pytest.raises(UserError, match=message):
        begin_or_go_on(plain.options.__class__(**vars(plain.options) | {"out": folder, "resume": True}))
    with pytest.raises(UserError, match=message):
        VQASystem.continued(plain.options, folder, plain.precision)
    with pytest.raises(UserError, match=message):
        vqa_task(RLHFOptions(preset="vqa", policy=str(folder)), torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="cannot be trained; train the run"):
        systems.load(folder, precision="bf16").model.train()
    with pytest.raises(UserError, match="small is quantised already; start from the run"):
        exported(folder, tmp_path / "smaller", "--quantize", "int4")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--quantize", "int4-g256"), "int4-g256 has groups of 256 weights, which do not divide the 64 of"),
        (("--quantize", "int3"), "'int3' is not one of .*; did you mean 'int"),
        (("--calibrate",), "--calibrate says how to choose codes: it needs --quantize"),
        (("--quantize", "int8", "--push", "me/mine"), "no place for --quantize"),
    ],
)
def test_exports_that_are_refused(run, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        exported(run, tmp_path / "out", *flags)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("flags", [(), ("--precision", "fp32"), ("--precision", "auto")])
def test_asking_with_rounded_weights_needs_bf16(run, data, flags):
    with pytest.raises(UserError, match=r"--quantize int8: the products of .* --precision bf16"):
        command("ask", run, "--image", picture(data), *QUESTION, "--quantize", "int8", *flags)


def test_a_run_in_a_format_of_another_version(run, tmp_path):
    folder = exported(run, tmp_path / "small", "--quantize", "int8")
    config = json.loads((folder / "config.json").read_text())
    for given, message in (("int3", "small has weights in the format int3; known are int8"), (8, "'quantized' is 8")):
        write_json(folder / "config.json", config | {"quantized": given})
        with pytest.raises(UserError, match=message):
            systems.load(folder)
    write_json(folder / "config.json", config | {"quantized": "int4"})
    with pytest.raises(UserError, match="is no matrix in the format int4"):
        systems.load(folder)
    write_json(folder / "config.json", config)
    tensors = load_file(folder / "model.safetensors")
    name = next(key.removesuffix(".codes") for key in tensors if key.endswith(".codes"))
    tensors[f"{name}.weight"] = tensors.pop(f"{name}.codes").float()
    del tensors[f"{name}.scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="does not hold the matrices of its decoder in int8"):
        systems.load(folder)


def test_the_flags_have_the_names_of_the_formats():
    assert list(FILE_FORMATS.choices) == list(FORMATS)
    assert list(PRODUCT_FORMATS.choices) == [name for name, kind in FORMATS.items() if kind.multiplies]


# ------------------------------------------------------------------------------------------------------ benchmark


class Here:
    """A side without a process of its own."""

    def __init__(self, side, built) -> None:
        self.side, (make, *given) = side, built
        self.made = make(*given)

    def ask(self, name, *given):
        return 0.0, getattr(self.made, name)(*given)


def test_the_benchmark_at_tiny_sizes(run, monkeypatch):
    here = contextmanager(lambda sides: iter([[Here(*side) for side in sides.items()]]))
    monkeypatch.setattr(bench.processes, "contestants", here)
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(bench, "NEEDED", ("no_such_package",))
    monkeypatch.setattr(bench, "TIMED", ("fp32", "bf16", "int8"))
    monkeypatch.setattr(bench, "SCORED", ("fp32", "bf16", "int8", "nf4", "int4 by GPTQ"))
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    monkeypatch.setattr(bench, "CALIBRATED", 64)
    monkeypatch.setattr(bench.timing, "read_gb_per_second", lambda: 10.0)
    sizes = {"vocab_size": 64, "max_positions": 32, "dim": 32, "layers": 1, "heads": 2}
    text = bench.run(run, 24, 1, "python -m bench quantize", sizes)
    lines = {cells[1].strip(): cells[2:] for line in text.splitlines() if len(cells := line.split("|")) > 3}
    found = figures("quantize", text)
    assert [one.goal for one in found] == ["1.6x", "at most 0.001", "at most 0.005"]
    assert lines["transformers int8"][0].strip() == "not measured: no_such_package not installed"
    assert lines["transformers bf16"][5].strip().startswith("**") and float(lines["nf4"][1]) <= 1.0
    assert text.count("int4 by GPTQ") == 1 and "reads 10.0 GB/s at most" in text
    monkeypatch.setattr(bench, "speeds", lambda rounds, sizes: ("", 10.0))  # they do not need the run
    text = bench.run(run / "none", 24, 1, "python -m bench quantize", sizes)
    assert "not measured, since there is no run in" in text


def test_what_a_token_reads():
    """By hand: a block's matrices, biases and norms, the last norm and the head; int8 has a scale of 2 bytes a row."""
    sizes = {"vocab_size": 64, "max_positions": 32, "dim": 32, "layers": 1, "heads": 2}
    matrix, biases, norms = 32 * (96 + 32 + 128 + 128), 96 + 32 + 128 + 32, 6 * 32
    assert bench.Writer("fp32", sizes).reads() == 4 * (matrix + biases + norms + 64 * 32)
    assert bench.Writer("int8", sizes).reads() == matrix + 2 * (biases + norms + biases) + 64 * 32 + 2 * 64
