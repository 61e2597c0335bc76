"""`ask --model` with an Idefics: pixels, prompt, tokens and text against the whole path of the reference."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as hf
from image_text_helpers import CPU, check_answers, check_study, pictures
from PIL import Image
from run_helpers import command
from test_idefics import reference
from test_zero_shot_prompts import QUESTIONS, refused
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from vqa_scratch import zero_shot
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import train_bpe
from vqa_scratch.study.record import take_apart
from vqa_scratch.zero_shot import INSTRUCTION, MAX_ANSWER_TOKENS, open_zero_shot

IMAGE = ["<fake_token_around_image>", "<image>"]
TURN = ["<end_of_utterance>"]


def made(folder: Path, tuned: bool):
    own = train_bpe([f"{INSTRUCTION}\nQuestion: {question} Answer: User:\nAssistant:" for question in QUESTIONS], 290)
    special = {f"{role}_token": token for role, token in own.special.items()}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=own.backend, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": IMAGE + TURN * tuned})
    processor = hf.IdeficsProcessor(IdeficsImageProcessorPil(image_size=8), tokenizer)
    processor.save_pretrained(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"vocab_size": len(own), "additional_vocab_size": len(tokenizer) - len(own), "use_resampler": True}
    return reference(folder, initializer_range=0.3, **sizes, **ends), processor


@pytest.fixture(scope="module", params=["base", "tuned"])
def theirs(request, tmp_path_factory):
    """(kind, folder, model, processor) of a checkpoint saved by the reference."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, *made(folder, request.param == "tuned")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    return pictures(tmp_path_factory.mktemp("images"), [(10, 15), (40, 60), (24, 20)])


def said_by(theirs, image: Path, question: str) -> str:
    kind, _, model, processor = theirs
    picture, question = Image.open(image), question.strip()
    parts = [f"{INSTRUCTION}\n", picture, f"Question: {question} Answer:"]
    if kind == "tuned":
        parts = ["User:", picture, f"{question}<end_of_utterance>\nAssistant:"]
    inputs = processor(text=[parts], return_tensors="pt")
    ends = [processor.tokenizer.eos_token_id, *processor.tokenizer.convert_tokens_to_ids(TURN * (kind == "tuned"))]
    barred = [[number] for number in processor.tokenizer.convert_tokens_to_ids(IMAGE)]
    how = {"max_new_tokens": MAX_ANSWER_TOKENS, "do_sample": False, "eos_token_id": ends, "bad_words_ids": barred}
    said = model.generate(**inputs, **how)
    ids = said[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip()


def test_answers_equal_those_of_the_reference(theirs, images):
    check_answers(theirs[1], images, QUESTIONS, partial(said_by, theirs), different=3)


def test_the_command_in_bf16_and_from_shards(theirs, images, capsys, tmp_path):
    given = ("--image", images[1], "--question", QUESTIONS[1])
    command("ask", "--model", theirs[1], *given, "--device", "cpu")
    text = said_by(theirs, images[1], QUESTIONS[1])
    assert capsys.readouterr().out.startswith(f"{text or '(nothing)'}  (probability 0.")
    folder = Path(shutil.copytree(theirs[1], tmp_path / "copy"))
    (folder / "model.safetensors").unlink()
    theirs[2].save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    command("ask", "--model", folder, *given, "--precision", "bf16")
    assert "(probability " in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_study(theirs, images, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(zero_shot, "MAX_ANSWER_TOKENS", 4)
    summary = check_study(theirs[1], images[1], QUESTIONS[1], tmp_path, precision)
    assert {"image.0.self", "resampler.0.cross", "decoder.0.cross"} <= {head["name"] for head in summary["heads"]}


def test_study_never_says_what_ask_never_says(theirs, images):
    """The head is made to want `<image>` most, which no answer holds: study finds the answer of `ask` all the same."""
    opened = open_zero_shot(str(theirs[1]), CPU)
    (answer,), _ = opened.ask(images[1], QUESTIONS[1])
    said, language = opened.tokenizer.encode(answer.text, add_special_tokens=False)[0], opened.model.language
    with torch.no_grad():
        language.direct_head[opened.image_token] = 3 * language.direct_head[said]
    (answer,), _ = opened.ask(images[1], QUESTIONS[1])
    study = take_apart(opened.subject(Image.open(images[1]), QUESTIONS[1]))
    assert (study.answer, len(study.tokens)) == (answer.text, answer.tokens)
    assert study.probability == pytest.approx(answer.probability, rel=1e-3)


def test_what_does_not_fit(theirs, images, tmp_path):
    refused(theirs[1], images[0], "is <image> red?", "the question holds <image>, which stands for the image")
    refused(theirs[1], images[0], "what " * 300, r"too long: its prompt has .* tokens, and \d+ have room")
    folder = Path(shutil.copytree(theirs[1], tmp_path / "copy"))
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<image>", "<picture>"))
    refused(folder, images[0], "what?", "has no <image>, as that of an Idefics has")
    (folder / "tokenizer.json").write_text(text)
    joint = json.loads((folder / "processor_config.json").read_text())
    sizes = joint["image_processor"] | {"size": {"height": 6, "width": 8}, "image_size": None}
    (folder / "processor_config.json").write_text(json.dumps(joint | {"image_processor": sizes}))
    refused(folder, images[0], "what?", "do not divide into patches of 4")


def test_older_files_call_the_size_otherwise():
    """As the Hub's preprocessor_config.json."""
    older = {"image_processor_type": "IdeficsImageProcessor", "image_num_channels": 3, "image_size": 224}
    assert ImageProcessor.from_hf(older) == ImageProcessor.from_hf({"image_processor_type": "IdeficsImageProcessor"})
    assert ImageProcessor.from_hf(older | {"image_size": 8}).output_size == (8, 8)
