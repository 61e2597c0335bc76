"""Computes the cost of a model on one rank and on many: memory, bytes sent a step, and the least time for them.

Nothing is measured: sizes are counted from our own models, built without memory (on the meta device).
"""

import io
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bench.results import table
from vqa_scratch.connectors.tokens import TokensConnector
from vqa_scratch.data.shapes import ShapesSpec, ensure_shapes
from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.t5 import T5, T5Config
from vqa_scratch.models.vit import ViT, ViTConfig
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.systems.options import PRESETS, VQAOptions
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.systems.vqa_models import DISTILBERT
from vqa_scratch.training.parameter_groups import split_parameters
from vqa_scratch.training.precision import Precision

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
RANKS = 8
# Bytes a second that a rank can send: what one may hope for, of the three usual ways between two GPUs.
LINKS = {"NVLink, 300 GB/s": 300e9, "PCIe 4, 25 GB/s": 25e9, "100 Gb/s network": 12.5e9}
ROBERTA = BertConfig(layout="roberta", vocab_size=50265, max_positions=514, token_types=1)
T5_SIZES = {
    "small": T5Config(),
    "base": T5Config(dim=768, hidden=2048, encoder_layers=12, decoder_layers=12, heads=12),
    "large": T5Config(dim=1024, hidden=2816, encoder_layers=24, decoder_layers=24, heads=16),
    "xl": T5Config(dim=2048, hidden=5120, encoder_layers=24, decoder_layers=24, heads=32),
}


def shapes() -> nn.Module:
    """The small models; their vocabularies are learned from a few scenes, so a little smaller than in a real run."""
    with tempfile.TemporaryDirectory() as folder:
        data = ensure_shapes(Path(folder), ShapesSpec(train=64, val=2, test=2, holdout=2), progress=False)
        options = VQAOptions(**{"preset": "shapes", "data": data, "steps": 1} | PRESETS["shapes"])
        with redirect_stdout(io.StringIO()):
            samples = VQASystem.read(options)
        return VQASystem.build(options, samples, Precision("fp32", torch.device("cpu"))).model


def book() -> nn.Module:
    image, text, decoder = ViT(ViTConfig()), Bert(DISTILBERT), GPT2(GPT2Config(add_cross_attention=True))
    return VQAModel(image, text, TokensConnector(image, text, decoder, grid=image.config.grid), decoder)


@dataclass(frozen=True)
class Size:
    """Numbers of a model: its parameters, and the numbers that its optimizer keeps."""

    parameters: int
    optimizer: int

    @classmethod
    def of(cls, model: nn.Module, optimizer: str) -> "Size":
        """Muon keeps one number for each of its matrices' entries, AdamW two for every parameter."""
        hidden = sum(p.numel() for p in split_parameters(model)[0]) if optimizer == "muon" else 0
        total = sum(p.numel() for p in model.parameters())
        return cls(total, hidden + 2 * (total - hidden))

    @property
    def whole(self) -> int:
        """Bytes of weights, gradients and optimizer state in fp32: what a rank of DDP holds."""
        return 4 * (2 * self.parameters + self.optimizer)

    def ddp(self, ranks: int) -> float:
        """Bytes that a rank sends a step: a ring all-reduce of the gradients passes each of them on twice."""
        return 2 * (ranks - 1) / ranks * 4 * self.parameters

    def fsdp(self, ranks: int) -> float:
        """Bytes that a rank sends a step: weights gathered forward and backward, gradients scattered."""
        return 3 * (ranks - 1) / ranks * 4 * self.parameters


def amount(count: float, unit: str = "B") -> str:
    """1234567 -> "1.2 MB"."""
    for letter, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {letter}{unit}".strip()
    return f"{count:.0f} {unit}".strip()


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2g} ms" if seconds < 0.0995 else f"{1000 * seconds:.0f} ms"


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def training() -> str:
    """Rows: what `train.py` trains, and T5s for comparison."""
    models = {
        "`shapes` (Muon)": Size.of(shapes(), "muon"),
        "`book` (AdamW)": Size.of(on_meta(book), "adamw"),
        **{
            f"T5 {name} (AdamW)": Size.of(on_meta(lambda config=config: T5(config)), "adamw")
            for name, config in T5_SIZES.items()
        },
    }
    head = ["model", "parameters", "a rank, DDP", f"a rank, FSDP on {RANKS}", "checkpoint", "sent a step, DDP / FSDP"]
    rows = []
    for name, size in models.items():
        saved, sent = 4 * (size.parameters + size.optimizer), [f(RANKS) for f in (size.ddp, size.fsdp)]
        times = [milliseconds(sent[0] / speed) for speed in LINKS.values()]
        cells = [amount(size.whole), amount(size.whole / RANKS), amount(saved), " / ".join(map(amount, sent))]
        rows.append([name, amount(size.parameters, ""), *cells, *times])
    return table([*head, *LINKS], rows)


def ppo() -> str:
    """Rows: what a rank of `rlhf.py` holds with a T5 policy and two RoBERTa-base rewards."""
    reward = sum(p.numel() for p in on_meta(lambda: Bert(ROBERTA)).parameters())
    rows = []
    for name, config in T5_SIZES.items():
        size = Size.of(on_meta(lambda config=config: T5(config)), "adamw")
        parts = (size.whole, 4 * size.parameters, 2 * 4 * reward)
        held = ppo_in_parts(size, parts[-1], RANKS)
        cells = [*parts, sum(parts), *held, 4 * (3 * size.parameters)]
        rows.append([f"T5 {name}", *map(amount, cells)])
    head = ["policy", "policy, 16 B a parameter", "reference", "two rewards", "a rank, DDP"]
    return table([*head, "FSDP, update", "FSDP, rollout", "checkpoint"], rows)


def ppo_in_parts(size: Size, rewards: int, ranks: int) -> tuple[float, float]:
    """Bytes of a rank of `--parallel fsdp` in an update and in a rollout, `rewards` among them.

    Policy and reference are cut; a rollout has no gradients, and holds both whole beside what is left of the parts.
    """
    reference = weights = 4 * size.parameters
    update = (size.whole + reference) / ranks
    rollout = (weights + 4 * size.optimizer + reference) / ranks + weights + reference
    return rewards + update, rewards + rollout


def text(command: str) -> str:
    """The section of docs/scale.md."""
    return f"""Training, {RANKS} ranks, fp32 weights, gradients and optimizer state; activations come on top. The last
columns are the least time that DDP's gradients take over a link, all of it hidden where the backward pass is longer.

{training()}

PPO, {RANKS} ranks, everything in fp32 (in bf16 the reference's and the rewards' linear layers take half):

{ppo()}

`{command}`"""
