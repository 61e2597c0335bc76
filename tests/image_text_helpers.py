"""Tiny random LLaVA and Fuyu checkpoints, saved by the reference, and prompts with places for images."""

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from helpers import STD, saved
from PIL import Image
from run_helpers import command

from vqa_scratch.zero_shot import MAX_ANSWER_TOKENS, open_zero_shot

CPU = torch.device("cpu")
VOCABULARY, PLACE, LONG = 60, 59, 128
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "max_position_embeddings": LONG, "initializer_range": STD}
TOWER = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 3, "num_attention_heads": 3}
TOWER |= {"image_size": 8, "patch_size": 4, "initializer_range": STD}
END = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}


def pictures(folder: Path, sizes: Sequence[tuple[int, int]]) -> list[Path]:
    """Image files of random pixels, one of each (height, width)."""
    paths = [folder / f"{i}.png" for i in range(len(sizes))]
    for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return paths


def llava_reference(
    folder: Path, vision: str = "CLIP", text: str = "Llama", *, vision_changes=(), text_changes=(), **changes
) -> hf.LlavaForConditionalGeneration:
    heads = {"num_key_value_heads": 2} if text != "Persimmon" else {}
    config = hf.LlavaConfig(
        vision_config=getattr(hf, f"{vision}VisionConfig")(**TOWER | dict(vision_changes)),
        text_config=getattr(hf, f"{text}Config")(**TEXT | END | heads | dict(text_changes)),
        **{"image_token_index": PLACE} | changes,
    )
    model = hf.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name or "multi_modal" in name:  # CLIP's are drawn by rules of their own
                parameter.normal_(std=STD)
    return saved(model, folder)


def fuyu_reference(folder: Path, patch_size: int = 2, text_changes=(), **changes) -> hf.FuyuForCausalLM:
    text = {"model_type": "persimmon"} | TEXT | END | dict(text_changes)
    config = hf.FuyuConfig(text_config=text, patch_size=patch_size, image_token_id=PLACE, **changes)
    model = hf.FuyuForCausalLM(config)
    with torch.no_grad():
        model.model.vision_embed_tokens.weight.normal_(std=STD)
    return saved(model, folder)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, T), padding on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def words(count: int) -> list[int]:
    return torch.randint(5, PLACE, (count,)).tolist()


def check_answers(
    folder: Path, images: list[Path], questions: list[str], said_by: Callable[[Path, str], str], different: int
) -> None:
    """The checkpoint in a folder answers each question about each image as `said_by(image, question)`, with at least so
    many `different` answers: with fewer, the test says little."""
    opened, answers = open_zero_shot(str(folder), CPU), set()
    for image, question in product(images, questions):
        (answer,), notes = opened.ask(image, question)
        assert answer.text == said_by(image, question) and notes == []
        assert 0 < answer.probability < 1 and 1 <= answer.tokens <= MAX_ANSWER_TOKENS
        answers.add(answer.text)
    assert len(answers) >= different


def check_study(folder: Path, image: Path, question: str, out: Path, precision: str = "fp32") -> dict[str, Any]:
    """`study --model` writes what `ask` answers, with a certificate that is that of the precision; its summary."""
    given = ("--image", image, "--question", question, "--device", "cpu", "--precision", precision)
    command("study", "--model", folder, *given, "--out", out)
    summary = json.loads((out / "summary.json").read_text())
    certificate = summary["certificate"]
    (answer,), _ = open_zero_shot(str(folder), CPU, precision).ask(image, question)
    assert (summary["answer"], len(summary["tokens"])) == (answer.text, answer.tokens)
    # Of outputs of size 1 or more. In bf16 the model's own attention rounds weights and outputs to 8 bits each.
    assert certificate["output"] <= (1e-5 if precision == "fp32" else 0.02) * max(1, certificate["size"])
    assert certificate["mass"] <= 1e-5
    if precision == "fp32":
        assert summary["probability"] == pytest.approx(answer.probability, rel=1e-3)
    return summary
