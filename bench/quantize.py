"""Quantised weights: what a token reads, how fast it is written, and what the rounding costs in answers.

A GPT-2 of random weights writes 24 tokens a row, one row and eight at once; the sides take turns, in a process each.
`transformers` has bitsandbytes for int8 (LLM.int8) and int4 (NF4), if that and accelerate are installed. GB/s are the
bytes of weights that a step of one row reads, over its time; beside it stands what the machine reads at most. The
second table is of a trained run: its validation questions, the loss on them in nats a token, and the error
||x W - x W'|| / ||x W|| of each matrix over what it reads there, the mean and the largest. Answers that changed, for
better or worse, are against bf16, and so is the accuracy. GPTQ saw training questions.
"""

import importlib.util
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench import processes, results, timing
from vqa_scratch import systems
from vqa_scratch.data.vqa_v2 import VQASample
from vqa_scratch.errors import UserError
from vqa_scratch.generate import GenerationOptions, generate
from vqa_scratch.models import GPT2, GPT2Config
from vqa_scratch.models.vqa import IGNORE
from vqa_scratch.nn.gptq import gptq_codes, relative_error
from vqa_scratch.nn.quantized import FORMATS, Codes, Format, install, matrices, quantize, round_to_nearest
from vqa_scratch.systems.quantize import CALIBRATED, read_inputs
from vqa_scratch.systems.scoring import score
from vqa_scratch.training.allocator import keep_freed_memory
from vqa_scratch.training.precision import DTYPES

TOKENS, ROWS, SECONDS = 24, (1, 8), 1.0
PLAIN = ("fp32", "bf16")
TIMED = (*PLAIN, "int8", "int4-g128", "int4")
PEERS = ("transformers bf16", "transformers int8", "transformers int4")
NEEDED = ("bitsandbytes", "accelerate")  # of the peers in int8 and int4
SCORED = (*TIMED, "nf4", "int4-g128 by GPTQ", "int4 by GPTQ")
GOALS = {"int8": 1.6, "int4-g128": 2.2, "int4": 2.2}  # times our own bf16, one row
LOST = {"int8": 0.001, "int4-g128": 0.005, "int4": 0.005}  # accuracy, at most
SPEED_HEAD = "format|MB a token reads|tokens/s, 1 row|tokens/s, 8 rows|GB/s, 1 row|of what is read at most|of bf16|goal"
LOSS_HEAD = "format|MB of the matrices|accuracy|loss|error of a matrix, mean|largest|answers changed|lost|goal"


class Writer:
    """One side: a GPT-2 of random weights in one format."""

    def __init__(self, name: str, sizes: dict[str, int]) -> None:
        torch.manual_seed(0)
        self.model = GPT2(GPT2Config(**sizes)).eval().to(DTYPES.get(name, torch.bfloat16))
        if name in FORMATS:
            quantize(self.model, FORMATS[name])
        keep_freed_memory()

    def seconds(self, rows: int, times: int) -> float:
        """Of a token, for all rows: the mean over `times` answers."""
        prompt = torch.full((rows, 1), 5)
        start = time.perf_counter()
        for _ in range(times):
            generate(self.model, prompt, options=GenerationOptions(TOKENS, None))
        return (time.perf_counter() - start) / times / TOKENS

    def reads(self) -> int:
        """Bytes of weights that a step reads: of the tables of tokens and positions only the head, if it is one."""
        tables = {id(self.model.tokens.weight), id(self.model.positions.weight)}
        head = self.model.head.nbytes if self.model.head_copy is None else 0
        weights = [*self.model.parameters(), *self.model.buffers()]
        return head + sum(weight.nbytes for weight in weights if id(weight) not in tables)


class Peer(Writer):
    """The same in `transformers`; int8 (LLM.int8) and int4 (NF4) by bitsandbytes, its own path on a CPU."""

    def __init__(self, name: str, sizes: dict[str, int]) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        import tests.torchvision_shim  # noqa: F401  lets transformers import beside a CPU-only torch

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a warning a product
        how: dict[str, Any] = {}
        if "int" in name:
            four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
            given = {"load_in_4bit": True, **four} if "int4" in name else {"load_in_8bit": True}
            how = {"quantization_config": BitsAndBytesConfig(**given), "device_map": "cpu"}
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            GPT2(GPT2Config(**sizes)).save_pretrained(folder)
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **how).eval()
        keep_freed_memory()

    def seconds(self, rows: int, times: int) -> float:
        prompt, length = torch.full((rows, 1), 5), {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        start = time.perf_counter()
        for _ in range(times):
            mask = torch.ones_like(prompt)
            self.model.generate(prompt, attention_mask=mask, **length, do_sample=False, pad_token_id=0)
        return (time.perf_counter() - start) / times / TOKENS

    def reads(self) -> int:
        """Of the tables only that of tokens, which is the head."""
        weights = {x.data_ptr(): x.nbytes for key, x in self.model.state_dict().items() if "wpe" not in key}
        return sum(weights.values())


def _seconds(side: processes.Contestant, rows: int, times: int) -> float:
    return side.ask("seconds", rows, times)[1]


def speeds(rounds: int, sizes: dict[str, int]) -> tuple[str, float]:
    """The table of speeds, and what the machine reads, in GB/s."""
    most = timing.read_gb_per_second()
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    peers = [name for name in PEERS if "int" not in name or not absent]
    built = {name: (Writer, name, sizes) for name in TIMED} | {name: (Peer, name, sizes) for name in peers}
    with processes.contestants(built) as sides:
        reads = {one.side: one.ask("reads")[1] for one in sides}
        taken: dict[int, dict[str, list[float]]] = {}
        for rows in ROWS:
            times = {one.side: max(1, round(SECONDS / TOKENS / one.ask("seconds", rows, 1)[1])) for one in sides}
            turns = {one.side: partial(_seconds, one, rows, times[one.side]) for one in sides}
            taken[rows] = timing.in_turn(turns, rounds, lambda line: None)
            print(f"timed with {rows} rows", file=sys.stderr, flush=True)
    most = max(most, timing.read_gb_per_second())  # a shared machine reads faster at one time than at another
    table = []
    for name in built:
        one, eight = (timing.Spread.of([rows / s for s in taken[rows][name]]) for rows in ROWS)
        rate = reads[name] * one.median / 1e9
        goal = f"{GOALS[name]}x" if name in GOALS else "none"
        ratio = timing.speedup(taken[1][name], taken[1]["bf16"])
        against = f"**{ratio.median:.2f}x** ({ratio.low:.2f} to {ratio.high:.2f})"
        cells = [f"{reads[name] / 1e6:.1f}", one.text(1), eight.text(1), f"{rate:.1f}", f"{rate / most:.0%}"]
        table.append([name, *cells, against, goal])
    missing = {name: f"{' and '.join(absent)} not installed" for name in PEERS if name not in peers}
    missing["nf4"] = "it is a format for files, without a product"
    table += [[name, f"not measured: {why}", *[""] * 6] for name, why in missing.items()]
    return results.table(SPEED_HEAD.split("|"), table), most


@torch.no_grad()
def loss_of(system: Any, samples: list[VQASample]) -> float:
    """Nats a token of the answers, through the head that decoding reads."""
    split, total, tokens = system.split(samples), 0.0, 0
    with system.evaluating(), system.precision.autocast():
        for _, batch in split.batches(system.precision.device, split.questions.in_order(len(samples), 256)):
            image, text = system.encode_image(batch.images), system.encode_text(batch.question, batch.attention_mask)
            hidden = system.model.hidden(image, text, batch.decoder_input_ids, batch.image_index)
            asked = batch.labels != IGNORE
            logits = system.model.decoder.logits(hidden[asked]).float()
            total += float(F.cross_entropy(logits, batch.labels[asked], reduction="sum"))
            tokens += int(asked.sum())
    return total / tokens


def _put(model: nn.Module, kind: Format, codes: Mapping[str, Codes]) -> None:
    """Quantised weights where they have a product, else their values."""
    if kind.multiplies:
        install(model, kind, codes)
        return
    with torch.no_grad():
        for name, linear in matrices(model).items():
            linear.weight.copy_(kind.dequantize(codes[name]))


def losses(run: Path, questions: int) -> str:
    """The table of what is lost, for the run in that folder."""
    plain: Any = systems.load(run, precision="fp32")
    if not plain.writes:
        raise UserError(f"{run} does not write its answers: it has no decoder to quantise")
    data = plain.read(plain.options).samples
    train, val = data["train"][:CALIBRATED], data["val"][:questions]
    inputs, seen = read_inputs(plain, train), read_inputs(plain, val)
    weights = {name: linear.weight.detach() for name, linear in matrices(plain.model).items()}
    choices: dict[str, Callable[[Format], dict[str, Codes]]] = {
        "": lambda kind: round_to_nearest(plain.model, kind),
        "GPTQ": lambda kind: gptq_codes(plain.model, kind, inputs),
    }
    rows, best, said = [], 0.0, dict[Any, str]()  # of bf16: accuracy, and answers by question
    for name in SCORED:
        form, _, method = name.partition(" by ")
        system: Any = systems.load(run, precision="fp32" if name == "fp32" else "bf16")
        size, errors = sum(w.numel() for w in weights.values()) * (4 if name == "fp32" else 2), [0.0]
        if form in FORMATS:
            kind = FORMATS[form]
            codes = choices[method](kind)
            size = sum(tensor.nbytes for stored in codes.values() for tensor in stored.tensors)
            values = {key: kind.dequantize(stored) for key, stored in codes.items()}
            errors = [relative_error(w, values[key], seen[key]) for key, w in weights.items()]
            _put(system.model, kind, codes)
        answers = system.answer(val)
        accuracy, texts = score(val, answers).accuracy, {number: answer.text for number, answer in answers.items()}
        if name == "bf16":
            best, said = accuracy, texts
        changed = f"{sum(texts[number] != said[number] for number in said) / len(val):.2%}" if form in FORMATS else ""
        lost = f"{max(best - accuracy, 0.0):.4f}" if form in FORMATS else ""
        goal = f"at most {LOST[form]}" if form in LOST else "none"
        shown = [f"{sum(errors) / len(errors):.4f}", f"{max(errors):.4f}"] if form in FORMATS else ["", ""]
        rows.append(
            [name, f"{size / 1e6:.2f}", f"{accuracy:.4f}", f"{loss_of(system, val):.4f}", *shown, changed, lost, goal]
        )
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    return results.table(LOSS_HEAD.split("|"), rows)


def run(folder: Path, questions: int, rounds: int, command: str, sizes: dict[str, int] | None = None) -> str:
    """The section of the results file; `sizes` are those of the timed GPT-2, for tests."""
    table, most = speeds(rounds, sizes or {})
    lost = [f"Accuracy and loss: not measured, since there is no run in {folder} (`python train.py` makes one)."]
    if folder.is_dir():
        first = f"The first {questions:,} validation questions of {folder}; goals are those of the default run."
        lost = [first, "", losses(folder, questions)]
    return "\n".join(
        [
            "## Quantised weights",
            "",
            __doc__.split("\n\n")[1].replace("\n", " ").strip(),
            "",
            table,
            "",
            *lost,
            "",
            f"- {timing.machine()}. It reads {most:.1f} GB/s at most. torch {torch.__version__}. "
            f"Commit {timing.commit(Path(__file__).parent)}. `{command}`",
        ]
    )
