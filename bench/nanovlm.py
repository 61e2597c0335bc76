"""A training step of nanoVLM at its own sizes: its code against ours, in turn, with the same weights and tokens.

    git clone https://github.com/huggingface/nanoVLM
    python -m bench nanovlm --nanovlm nanoVLM [--rounds 5] [--write]

SigLIP-B/16 at 224 pixels, its projector, and a decoder of SmolLM2-135M's sizes: the 222 million weights of its release,
at random, in fp32 and under bf16 autocast, as its train.py computes. The projector joins the places of an image in
squares of two by two and maps each square by one matrix to an embedding before the words. Ours is a connector of this
file with the same parameter, for the connector `prefix` has an MLP and keeps every place; all else is what `train.py`
trains. nanoVLM encodes one image a question.

Shapes: I images, B questions, h x w places in squares of s by s, D width, Q question tokens, A answer tokens.
"""

import importlib
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench import processes, results, timing
from bench.gradients import gradient_difference
from bench.sides import MAX_GRAD_NORM, Case
from train import train_step
from vqa_scratch.connectors.prefix import PrefixConnector
from vqa_scratch.data.batches import IGNORE, Batch
from vqa_scratch.errors import UserError
from vqa_scratch.models.llama import Llama, LlamaConfig
from vqa_scratch.models.vit import ViT, ViTConfig
from vqa_scratch.models.vqa import VQAModel, labelled_loss
from vqa_scratch.nn.connecting import Conditioning, Connector
from vqa_scratch.nn.rotary import Rotary
from vqa_scratch.nn.states import States
from vqa_scratch.training.allocator import keep_freed_memory
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision

# Fields of its VLMConfig: those of its release of 222 million weights. The decoder's last token stands for an image.
SIZES: dict[str, Any] = {
    "vit_img_size": 224,
    "vit_patch_size": 16,
    "vit_hidden_dim": 768,
    "vit_inter_dim": 3072,
    "vit_n_heads": 12,
    "vit_n_blocks": 12,
    "lm_hidden_dim": 576,
    "lm_inter_dim": 1536,
    "lm_n_heads": 9,
    "lm_n_kv_heads": 3,
    "lm_n_blocks": 30,
    "lm_vocab_size": 49_153,
    "lm_re_base": 100_000,
    "mp_pixel_shuffle_factor": 2,
}
CASES = tuple(Case(kind, questions=8, images=images) for kind in ("fp32", "bf16") for images in (8, 1))
GOAL = 1.3  # with an image a question
# Relative, of the loss, of all gradients and of the tensor whose gradient is worst. In fp32 sums over up to 1,568 rows
# in another order, 42 blocks deep, leave about 1e-5 of a tensor's norm; in bf16 each side is 1e-2 from fp32.
TOLERANCES = {"fp32": (1e-5, 1e-3, 1e-3), "bf16": (2e-3, 0.05, 0.5)}
LEARNING_RATES = {"MP": 0.00512, "vision_encoder": 5e-5, "decoder": 5e-5}  # of its TrainConfig
NAMES = {  # its parameters, as ours are called
    r"^vision_encoder\.patch_embedding\.conv": "image.patch_embed",
    r"^vision_encoder\.patch_embedding\.position_embedding": "image.positions",
    r"^vision_encoder\.layer_norm": "image.norm",
    r"^vision_encoder": "image",
    r"^decoder\.token_embedding": "decoder.tokens",
    r"^MP\.proj": "connector.map",
    r"\.ln(\d)": r".norm\1",
    r"\.(qkv|q)_proj": ".qkv",
    r"\.out_proj": ".out",
    r"\.fc1": ".up",
    r"\.fc2": ".down",
    r"\.(gate|up|down)_proj": r".\1",
}


TOWER = {  # our fields of its `vit_...`
    "image_size": "img_size",
    "patch_size": "patch_size",
    "dim": "hidden_dim",
    "hidden": "inter_dim",
    "heads": "n_heads",
    "layers": "n_blocks",
}
DECODER = {  # and of its `lm_...`
    "dim": "hidden_dim",
    "hidden": "inter_dim",
    "heads": "n_heads",
    "kv_heads": "n_kv_heads",
    "layers": "n_blocks",
    "vocab_size": "vocab_size",
}


class SquaresConnector(PrefixConnector):
    """Each square of s by s places, one after the other in a vector, mapped to an embedding before the words."""

    def __init__(self, image: ViT, decoder: Llama, side: int) -> None:
        Connector.__init__(self)
        self.side = side
        self.map = nn.Linear(image.dim * side**2, decoder.config.dim, bias=False)

    def forward(self, image: States, text: States | None, image_index: Tensor | None = None) -> Conditioning:
        assert image.places is not None, "an image has places"
        (rows, columns), s = image.places.grid, self.side
        cut = image.tokens.unflatten(1, (rows // s, s, columns // s, s)).transpose(2, 3)  # (I, h/s, w/s, s, s, D)
        return Conditioning(prefix=self.map(cut.flatten(3).flatten(1, 2)), prefix_index=image_index)


def batch_of(case: Case, sizes: dict[str, Any]) -> Batch:
    """The words of a question and its answer, of which the answer is labelled: (B, Q + A)."""
    words = sizes["lm_vocab_size"] - 1
    batch = case.batch(sizes["vit_img_size"], words, words)
    ids = torch.cat([batch.question, batch.decoder_input_ids], 1)
    labels = F.pad(batch.labels, (case.question_tokens, 0), value=IGNORE)
    return replace(batch, question=None, attention_mask=None, decoder_input_ids=ids, labels=labels)


class NanoVLM:
    """Its model, optimizer and step, from a checkout. What its tokenizer is asked is the token of an image alone, so it
    is not fetched. No token is padding; its mask is passed all the same, as its collator does."""

    def __init__(self, checkout: Path, sizes: dict[str, Any], case: Case, weights: Path) -> None:
        if not (checkout / "models" / "vision_language_model.py").is_file():
            raise UserError(f"{checkout} is no checkout of nanoVLM: there is no models/vision_language_model.py in it")
        image_token = sizes["lm_vocab_size"] - 1
        processors = ModuleType("data.processors")
        processors.get_tokenizer = lambda *given: SimpleNamespace(image_token_id=image_token)  # type: ignore[attr-defined]
        sys.modules.update({"data": ModuleType("data"), "data.processors": processors})
        sys.path.insert(0, str(checkout))
        config = importlib.import_module("models.config").VLMConfig(**sizes)
        torch.manual_seed(0)
        build = importlib.import_module("models.vision_language_model").VisionLanguageModel
        self.model = build(config, load_backbone=False).train()
        groups = [{"params": [*getattr(self.model, of).parameters()], "lr": lr} for of, lr in LEARNING_RATES.items()]
        self.optimizer, self.precision = torch.optim.AdamW(groups), Precision(case.precision, torch.device("cpu"))
        batch = batch_of(case, sizes)
        places = (sizes["vit_img_size"] // sizes["vit_patch_size"] // sizes["mp_pixel_shuffle_factor"]) ** 2
        self.ids = F.pad(batch.decoder_input_ids, (places, 0), value=image_token)
        self.labels = F.pad(batch.labels, (places, 0), value=IGNORE)
        self.images, self.mask = batch.images[batch.image_index], torch.ones_like(self.ids)
        save_file({name: p.detach() for name, p in self.named(dict(self.model.named_parameters()))}, weights)

    def named(self, own: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Its parameters, or as many tensors of their names, as ours are called: q, k and v of its decoder are one."""
        for name, tensor in own.items():
            if ".k_proj" in name or ".v_proj" in name:
                continue
            if ".q_proj" in name:
                tensor = torch.cat([own[name.replace("q_proj", f"{one}_proj")] for one in "qkv"])
            for pattern, ours in NAMES.items():
                name = re.sub(pattern, ours, name)
            yield name, tensor

    def loss(self) -> Tensor:
        with self.precision.autocast():
            return self.model(self.ids, self.images, attention_mask=self.mask, targets=self.labels)[1]

    def gradients(self, path: Path) -> float:
        """The loss; its gradients go to the file."""
        loss = self.loss()
        loss.backward()
        save_file(dict(self.named({name: p.grad for name, p in self.model.named_parameters()})), path)
        self.optimizer.zero_grad()
        return loss.item()

    def step(self) -> None:
        """As in its train.py."""
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fused_step(self) -> None:
        """The same with torch's fused AdamW."""
        for group in self.optimizer.param_groups:
            group["fused"] = True
        self.step()
        for group in self.optimizer.param_groups:
            group["fused"] = None


class Ours:
    """The same model of our parts, and `train_step` of train.py."""

    def __init__(self, sizes: dict[str, Any], case: Case, weights: Path) -> None:
        keep_freed_memory()
        tower = {ours: sizes[f"vit_{theirs}"] for ours, theirs in TOWER.items()}
        tower |= {"layout": "siglip_vision_model", "activation": "gelu_pytorch_tanh", "norm_eps": 1e-6}
        image = ViT(ViTConfig(**tower))
        words = {ours: sizes[f"lm_{theirs}"] for ours, theirs in DECODER.items()}
        rotary = Rotary(theta=float(sizes["lm_re_base"]))
        decoder = Llama(LlamaConfig(**words, norm_eps=1e-5, tied=True, rotary=rotary))
        connector = SquaresConnector(image, decoder, sizes["mp_pixel_shuffle_factor"])
        self.model = VQAModel(image, None, connector, decoder).train()
        self.model.load_state_dict(load_file(weights))
        self.precision = Precision(case.precision, torch.device("cpu"))
        rates = {"learning_rate": 5e-5, "matrix_learning_rate": 0.0, "weight_decay": 0.01}
        self.optimizers = Optimizers(self.model, kind="adamw", **rates, betas=(0.9, 0.999))
        self.batch = batch_of(case, sizes)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum over the answer tokens, and how many of them are right, as `System.loss` gives them."""
        hidden = self.model.hidden(
            self.model.image.states(batch.images), None, batch.decoder_input_ids, batch.image_index
        )
        return labelled_loss(hidden, self.model.decoder.head, batch.labels)

    def gradients(self, path: Path) -> float:
        """The loss, a mean over the answer tokens; its gradients go to the file."""
        with self.precision.autocast():
            loss = self.loss(self.batch)[0] / self.batch.counts[1]
        loss.backward()
        save_file({name: p.grad for name, p in self.model.named_parameters()}, path)
        self.optimizers.zero_grad()
        return loss.item()

    def step(self) -> None:
        train_step(self.loss, self.batch, self.optimizers, self.precision, max_grad_norm=MAX_GRAD_NORM)


def check(sides: dict[str, processes.Contestant], precision: str, work: Path) -> str:
    """A line on how far losses and gradients are apart. Raises UserError where that is far."""
    losses = {}
    for name, side in sides.items():
        (work / name).mkdir()
        losses[name] = side.ask("gradients", work / name / "gradients.safetensors")[1]
    ours, theirs = losses["ours"], losses["nanoVLM"]
    off, worst, tensor = gradient_difference(work / "ours", work / "nanoVLM")
    of_loss, of_all, of_worst = TOLERANCES[precision]
    if not abs(ours - theirs) <= of_loss * theirs:
        raise UserError(f"the losses differ: ours {ours:.7f}, nanoVLM's {theirs:.7f}")
    if not (off <= of_all and worst <= of_worst):
        raise UserError(f"the gradients differ, that of {tensor} by {worst:.1e}")
    return (
        f"loss {ours:.5f}, {abs(ours - theirs) / theirs:.0e} apart; gradients {off:.0e}, the worst tensor {worst:.0e}"
    )


def run_case(checkout: Path, case: Case, rounds: int, sizes: dict[str, Any], work: Path) -> tuple[list[str], str]:
    """(the row of the table, a line about losses and gradients)."""
    weights = work / "weights.safetensors"
    built = {"nanoVLM": (NanoVLM, checkout, sizes, case, weights), "ours": (Ours, sizes, case, weights)}
    with processes.contestants(built) as made:  # the peer writes the weights
        sides = {side.side: side for side in made}
        said = check(sides, case.precision, work)
        for side in made:
            side.ask("step")  # makes the optimizer's state
        steps = {"ours": ("ours", "step"), "nanoVLM": ("nanoVLM", "step"), "fused": ("nanoVLM", "fused_step")}
        turns = {name: lambda side=side, step=step: sides[side].ask(step)[0] for name, (side, step) in steps.items()}
        seconds = timing.in_turn(turns, rounds, lambda line: print(line, file=sys.stderr, flush=True))
        memory = [f"{sides[name].ask('peak_memory_gb')[1]:.2f}" for name in ("ours", "nanoVLM")]
    ratio = timing.speedup(seconds["ours"], seconds["nanoVLM"])
    cells = [timing.Spread.of(seconds[name]).text() for name in ("ours", "nanoVLM")]
    cells += [f"**{ratio.median:.2f}x** ({ratio.low:.2f} to {ratio.high:.2f})"]
    cells += [f"{GOAL}x" if case.questions == case.images else ""]
    cells += [f"{timing.speedup(seconds['ours'], seconds['fused']).median:.2f}x", " / ".join(memory)]
    return [case.precision, str(case.questions), str(case.images), *cells], f"{case.name}: {said}"


HEAD = "precision|questions|images|ours, s|nanoVLM, s|ratio|goal|ratio, its AdamW fused|peak GB, ours / its".split("|")


def run(checkout: Path, rounds: int, command: str, sizes: dict[str, Any] = SIZES) -> str:
    """The section of the results file."""
    rows, lines = [], []
    for case in CASES:
        with tempfile.TemporaryDirectory() as work:
            row, line = run_case(checkout, case, rounds, sizes, Path(work))
        rows.append(row)
        lines.append(f"- {line}.")
    size = "222 million weights" if sizes is SIZES else "sizes of a test, which say nothing"
    return "\n".join(
        [
            "## A prefix step against nanoVLM's",
            "",
            f"One training step of nanoVLM at {size}, random: its model, AdamW and order of work, and ours, "
            f"each in a process, in turn, medians of {rounds} rounds. A row has {CASES[0].question_tokens} question "
            f"tokens and {CASES[0].answer_tokens} answer tokens after those of its image. nanoVLM encodes it once for "
            "each question; ours once for all, and they share the prefix. Both have nanoVLM's projector.",
            "",
            results.table(HEAD, rows),
            "",
            *lines,
            f"- nanoVLM {timing.commit(checkout)}. {timing.machine()}. torch {torch.__version__}. Commit "
            f"{timing.commit(Path(__file__).parent)}. `{command}`",
        ]
    )


@click.command("nanovlm")
@click.option("--nanovlm", "checkout", type=click.Path(path_type=Path), required=True, help="A checkout of nanoVLM.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each side.")
@click.option("--write", is_flag=True, help="Put the table into bench/RESULTS.md.")
def command(checkout: Path, rounds: int, write: bool) -> None:
    """A training step with an image as a prefix against that of nanoVLM, at its sizes."""
    results.present("nanovlm", run(checkout, rounds, results.command_given()), write)
