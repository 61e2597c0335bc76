"""The two sides of the training-step benchmark: load the same files, write gradients, take a step, report memory.

Each side runs in its own process and has its own peak memory; only one works at a time. The side of this project uses
`train_step` of `train.py`, the function that training runs.

Shapes: I images, B questions, T question tokens, A decoder tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train import train_step
from vqa_scratch.connectors.mean import MeanConnector
from vqa_scratch.data.batches import Batch
from vqa_scratch.models.bert import Bert
from vqa_scratch.models.gpt2 import GPT2
from vqa_scratch.models.vit import ViT
from vqa_scratch.models.vqa import VQAModel, labelled_loss
from vqa_scratch.training.allocator import keep_freed_memory
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision

MAX_GRAD_NORM = 1.0  # the default of both


@dataclass(frozen=True)
class Case:
    """One comparison: number format, questions and images of a step, and the shape of its texts."""

    precision: str = "fp32"
    questions: int = 8
    images: int = 8
    question_tokens: int = 16
    answer_tokens: int = 8
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.questions % self.images:
            raise ValueError(f"{self.questions} questions do not divide among {self.images} images")

    @property
    def name(self) -> str:
        where = "" if self.device == "cpu" else ", on the GPU"
        return f"{self.precision}, {self.questions} questions, {self.images} images{where}"

    @property
    def steps(self) -> int:
        """Steps of a turn: a GPU takes several before anyone waits for it."""
        return 1 if self.device == "cpu" else 10

    def batch(self, image_size: int, text_vocabulary: int, decoder_vocabulary: int) -> Batch:
        """Random pixels and tokens, the same at every call; all tokens real, all answer tokens labelled.

        `images` are (I, 3, H, W), as the image encoders of both sides take them.
        """
        random = torch.Generator().manual_seed(0)
        answers = torch.randint(decoder_vocabulary, (self.questions, self.answer_tokens + 1), generator=random)
        return Batch(
            images=torch.randn(self.images, 3, image_size, image_size, generator=random),
            question=torch.randint(text_vocabulary, (self.questions, self.question_tokens), generator=random),
            attention_mask=torch.ones(self.questions, self.question_tokens, dtype=torch.bool),
            decoder_input_ids=answers[:, :-1].contiguous(),
            labels=answers[:, 1:].contiguous(),
            image_index=torch.arange(self.questions) // (self.questions // self.images),
            rows=torch.arange(self.questions),
        )


@contextmanager
def gradients_as_weights(model: nn.Module) -> Iterator[None]:
    """Inside, every parameter holds its gradient, so that what saves weights saves gradients under the same keys."""
    weights = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, data in weights:
        parameter.data = torch.zeros_like(data) if parameter.grad is None else parameter.grad
    yield
    for parameter, data in weights:
        parameter.data = data


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


class Ours:
    """This project's model with the `mean` connector, its step and its optimizer, set up as train.py does."""

    def __init__(self, folder: Path, case: Case) -> None:
        keep_freed_memory()
        towers = {name: kind.from_pretrained(folder / name) for name, kind in TOWERS.items()}
        self.model = VQAModel(**towers, connector=MeanConnector(**towers)).train()
        self.model.connector.load_state_dict(load_file(folder / "projections.safetensors"))
        self.model.to(case.device)
        self.precision = Precision(case.precision, torch.device(case.device))
        self.optimizers = Optimizers(
            self.model,
            kind="adamw",
            learning_rate=5e-5,
            matrix_learning_rate=0.0,
            weight_decay=0.0,
            betas=(0.9, 0.999),
        )
        batch = case.batch(towers["image"].config.image_size, *(towers[t].config.vocab_size for t in TEXTS))
        self.case, self.data = case, batch.to(torch.device(case.device))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum over the answer tokens, and how many of them are right, as `System.loss` gives them."""
        image = self.model.image.states(batch.images)
        text = self.model.text.states(batch.question, batch.attention_mask)
        hidden = self.model.hidden(image, text, batch.decoder_input_ids, batch.image_index)
        return labelled_loss(hidden, self.model.decoder.head, batch.labels)

    def gradients(self, folder: Path, *, fp32: bool = False) -> float:
        """The loss, its gradients saved to `folder` as a checkpoint would be."""
        with nullcontext() if fp32 else self.precision.autocast():
            loss = self.loss(self.data)[0] / self.data.labels.numel()
        loss.backward()
        with gradients_as_weights(self.model):
            for name in TOWERS:
                getattr(self.model, name).save_pretrained(folder / name)
            save_file(self.model.connector.state_dict(), folder / "projections.safetensors")
        self.optimizers.zero_grad()
        return loss.item()

    def turn(self) -> None:
        """The case's number of training steps."""
        for _ in range(self.case.steps):
            self.step()
        wait(self.case.device)

    def step(self) -> None:
        """One step of training."""
        train_step(self.loss, self.data, self.optimizers, self.precision, max_grad_norm=MAX_GRAD_NORM)


class Peer:
    """The model assembled from `transformers`, trained as its Trainer would; on a GPU through `torch.compile`."""

    def __init__(self, folder: Path, case: Case) -> None:
        from bench.peers import TransformersVQA, adamw

        self.model = TransformersVQA.from_pretrained(folder).train().to(case.device)
        self.forward = self.model if case.device == "cpu" else torch.compile(self.model)
        self.optimizer = adamw(self.model)
        self.case = case
        configs = {name: getattr(self.model, name).config for name in TOWERS}
        batch = case.batch(configs["image"].image_size, *(configs[text].vocab_size for text in TEXTS))
        batch = batch.to(torch.device(case.device))
        self.inputs = (
            batch.images[batch.image_index],
            batch.question,
            batch.attention_mask.long(),
            batch.decoder_input_ids,
            batch.labels,
        )

    def autocast(self):
        return torch.autocast(self.case.device, torch.bfloat16) if self.case.precision == "bf16" else nullcontext()

    def gradients(self, folder: Path, *, fp32: bool = False) -> float:
        """The loss, its gradients saved to `folder` as a checkpoint would be."""
        with nullcontext() if fp32 else self.autocast():
            loss = self.model(*self.inputs)
        loss.backward()
        with gradients_as_weights(self.model):
            self.model.save_pretrained(folder)
        self.optimizer.zero_grad()
        return loss.item()

    def step(self) -> None:
        """One step of training."""
        with self.autocast():
            loss = self.forward(*self.inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fused_step(self) -> None:
        """The same with the fused AdamW, the Trainer's default since torch 2.8."""
        (group,) = self.optimizer.param_groups
        group["fused"] = True
        self.step()
        group["fused"] = None

    def turn(self, fused: bool = False) -> None:
        """The case's number of training steps."""
        for _ in range(self.case.steps):
            self.fused_step() if fused else self.step()
        wait(self.case.device)


TOWERS = {"image": ViT, "text": Bert, "decoder": GPT2}
TEXTS = ("text", "decoder")
SIDES: dict[str, Callable[[Path, Case], Ours | Peer]] = {"ours": Ours, "peer": Peer}


def save_random_weights(folder: Path, sizes: dict[str, dict]) -> None:
    """Random weights that both sides load. Runs in a process of its own, which gives its memory back."""
    from bench.peers import TransformersVQA

    torch.manual_seed(0)
    TransformersVQA.random(**sizes).save_pretrained(folder)
