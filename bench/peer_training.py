"""Trains the peer of the time to accuracy: towers of `transformers` at the sizes of the default run, on its batches.

The peer has what the default run has: the same questions in the same order, tokenizers and normalised pixels, the
question as the decoder's prompt, all states of the image to read, no dropout, and the schedule of the learning rate.
It also has what the book's system has, a text encoder whose states are read too, and answers alone as labels. Initial
weights, attention, AdamW and its other settings are those of `transformers`, and an image is encoded once for each of
its questions. Only steps are timed, for both sides.

Shapes: B questions, T question tokens, P prompt tokens.
"""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import TokensVQA, adamw
from vqa_scratch.data.batches import Batch
from vqa_scratch.metrics import accuracy_by
from vqa_scratch.systems.options import VQAOptions
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.systems.vqa_models import IMAGE_SIZE
from vqa_scratch.training.allocator import keep_freed_memory
from vqa_scratch.training.checkpoint import load_checkpoint, save_checkpoint
from vqa_scratch.training.optimizers import schedule
from vqa_scratch.training.precision import Precision

Point = tuple[float, int, float]  # seconds of steps, questions seen, accuracy on validation


def peer_model(system: VQASystem, options: VQAOptions) -> TokensVQA:
    """Random towers of the default run's sizes, and a text encoder, for its vocabularies."""
    torch.manual_seed(options.seed)
    words = system.tokenizers
    assert words.text is not None, "the peer has a text encoder, a DistilBERT"
    width, heads = options.width, options.heads
    image = {"image_size": IMAGE_SIZE, "patch_size": options.patch_size, "num_hidden_layers": options.image_layers}
    text = {"vocab_size": len(words.text), "n_layers": options.text_layers, "dim": width, "n_heads": heads}
    decoder = {"vocab_size": len(words.decoder), "n_layer": options.decoder_layers, "n_embd": width, "n_head": heads}
    return TokensVQA.random(
        image={"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads} | image,
        text={"hidden_dim": 4 * width, "max_position_embeddings": 64, "pad_token_id": words.text.pad_id or 0} | text,
        decoder={"n_positions": 64, "bos_token_id": words.start_id, "eos_token_id": words.end_id} | decoder,
    )


class PeerRun:
    """One run of the peer, with its curve; kept in `folder`, from which it goes on after a stop."""

    def __init__(self, folder: Path, options: VQAOptions, learning_rate: float, kind: str) -> None:
        keep_freed_memory()
        self.path, self.options, self.rate = folder / "last.pt", options, learning_rate
        self.precision = Precision(kind, torch.device("cpu"))
        data = VQASystem.read(options)
        self.system = VQASystem.build(options, data, self.precision)
        self.system.train_on(data)
        self.model = peer_model(self.system, options).train()
        self.optimizer = adamw(self.model, learning_rate)
        self.step, self.seconds, self.questions, self.curve = 0, 0.0, 0, list[Point]()
        if self.path.is_file():
            saved = load_checkpoint(self.path)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.seconds, self.questions = saved["step"], saved["seconds"], saved["questions"]
            self.curve = [(seconds, questions, accuracy) for seconds, questions, accuracy in saved["curve"]]

    @property
    def done(self) -> float:
        """The share of the run, of its steps or its minutes."""
        if self.options.steps is not None:
            return self.step / self.options.steps
        return self.seconds / (60 * (self.options.minutes or math.inf))

    def train(self) -> list[Point]:
        """All steps that are missing, and an evaluation now and then; returns the curve."""
        epoch, place = 0, self.step
        while place >= len(keys := self.system.epoch(epoch)):
            epoch, place = epoch + 1, place - len(keys)
        while self.done < 1:
            for key in self.system.epoch(epoch)[place:]:
                self.seconds += self.take_step(self.system.batch(key))
                self.step, self.questions = self.step + 1, self.questions + len(key.rows)
                if self.step % self.options.eval_every == 0 or self.done >= 1:
                    self.note()
                if self.done >= 1:
                    break
            epoch, place = epoch + 1, 0
        return self.curve

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels, ids and mask, a row a question."""
        assert batch.question is not None and batch.attention_mask is not None
        pixels = self.system.processor.normalize(batch.images)[batch.image_index]
        return pixels, batch.question, batch.attention_mask.long()

    def autocast(self) -> Any:
        return self.precision.autocast() if self.precision.kind != "fp32" else nullcontext()

    def take_step(self, batch: Batch) -> float:
        """One step of training; returns its seconds."""
        began = time.perf_counter()
        factor = schedule(self.step, self.done, self.options.warmup_steps, self.options.decay_from)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        with self.autocast():
            loss = self.model(*self.inputs(batch), batch.decoder_input_ids, batch.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def note(self) -> None:
        """Add a point to the curve, and keep everything."""
        self.curve.append((self.seconds, self.questions, self.accuracy()))
        state = {name: getattr(self, name) for name in ("step", "seconds", "questions", "curve")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.path, state | {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    @torch.no_grad()
    def accuracy(self) -> float:
        """Official accuracy of greedy answers to the validation questions that the default run answers."""
        split, texts = self.system.splits["val"], {}
        self.model.eval()
        for rows in split.questions.in_order(self.options.eval_questions, 256):
            with self.autocast():
                states, mask = self.model.memory(*self.inputs(split.questions.batch(rows, split.images)))
                answers = self.greedy(*split.questions.prompt_batch(rows), states, mask)
            texts |= {split.questions.samples[row].question_id: a for row, a in zip(rows, answers, strict=True)}
        self.model.train()
        asked = [sample for sample in split.questions.samples if sample.question_id in texts]
        return accuracy_by(asked, texts).overall.accuracy

    def greedy(self, ids: Tensor, real: Tensor, states: Tensor, mask: Tensor) -> list[str]:
        """The answers after prompts (B, P), padded on the left."""
        words, begins = self.system.tokenizers, ids.shape[1]
        over = torch.zeros(len(ids), dtype=torch.bool)
        while not over.all() and ids.shape[1] - begins < words.max_answer_tokens:
            logits = self.model.decoder(
                input_ids=ids,
                attention_mask=real.long(),
                position_ids=(real.long().cumsum(1) - 1).clamp(min=0),
                encoder_hidden_states=states,
                encoder_attention_mask=mask,
                use_cache=False,
            ).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            real = torch.cat([real, real.new_ones(len(real), 1)], 1)
            over |= ids[:, -1] == words.end_id
        ended = [row[: row.index(words.end_id)] if words.end_id in row else row for row in ids[:, begins:].tolist()]
        return [words.decoder.decode(row).strip() for row in ended]
