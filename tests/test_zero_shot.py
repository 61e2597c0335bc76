"""`ask --model`: a BLIP-2 checkpoint with its tokenizer and preprocessing, against the whole path of the reference."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import transformers as hf
from blip2_helpers import QUERIES, change_config, reference
from image_text_helpers import CPU, check_answers, check_study, pictures
from PIL import Image
from run_helpers import command
from tokenizers.processors import TemplateProcessing
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from vqa_scratch import zero_shot
from vqa_scratch.data.text import train_bpe
from vqa_scratch.errors import UserError
from vqa_scratch.zero_shot import MAX_ANSWER_TOKENS, open_zero_shot

QUESTIONS = ["what is it?", "how many cats are there?", "  is it red?  "]
PROMPT = "Question: {} Answer:"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(folder, model, processor) of a checkpoint saved by the reference, everything in it as it saves today."""
    folder = tmp_path_factory.mktemp("blip2")
    own = train_bpe([PROMPT.format(question) for question in QUESTIONS], 280)
    newline = own.encode("\n", add_special_tokens=False)
    own.backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", own.bos_id)])
    special = {f"{role}_token": token for role, token in own.special.items()}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=own.backend, **special)
    processor = hf.Blip2Processor(BlipImageProcessorPil(size={"height": 28, "width": 28}), tokenizer, QUERIES)
    processor.save_pretrained(folder)
    ids = {"bos_token_id": own.bos_id, "eos_token_id": newline[0], "pad_token_id": own.pad_id}
    place = tokenizer.convert_tokens_to_ids("<image>")
    model = reference(folder, text=ids | {"vocab_size": 300, "max_position_embeddings": 120}, image_token_index=place)
    return folder, model, processor


@pytest.fixture
def folder(theirs, tmp_path) -> Path:
    return Path(shutil.copytree(theirs[0], tmp_path / "copy"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    return pictures(tmp_path_factory.mktemp("images"), [(40, 60)] * 3)


def said_by(theirs, image: Path, question: str) -> str:
    _, model, processor = theirs
    inputs = processor(images=Image.open(image), text=PROMPT.format(question.strip()), return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS)
    return processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def test_answers_equal_those_of_the_reference(theirs, images):
    """Image preprocessing, prompt, tokens and text, through the files."""
    check_answers(theirs[0], images, QUESTIONS, partial(said_by, theirs), different=2)


def test_older_files_mean_the_same(theirs, images, folder):
    """A file of its own for the image processing, and nothing that says how many tokens an image becomes."""
    joint = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(joint["image_processor"]))
    (folder / "processor_config.json").unlink()
    change_config(folder, None, image_token_index=None)
    new, old = open_zero_shot(str(theirs[0]), CPU), open_zero_shot(str(folder), CPU)
    assert old.ask(images[0], QUESTIONS[0]) == new.ask(images[0], QUESTIONS[0])


def test_each_of_several_end_tokens_ends_an_answer(theirs, images, folder):
    """Those with which the answers of the images begin, after one that is not said."""
    first = {}
    for image in images:
        inputs = theirs[2](images=Image.open(image), text="Question: what is it? Answer:", return_tensors="pt")
        made = theirs[1].generate(**inputs, max_new_tokens=1)
        first.setdefault(int(made[0, -1]), (image, inputs))
    unsaid = next(token for token in range(300) if token not in first)
    change_config(folder, "text_config", eos_token_id=[unsaid, *first])
    opened, peer = open_zero_shot(str(folder), CPU), hf.Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    for image, inputs in first.values():
        (answer,), _ = opened.ask(image, "what is it?")
        assert (answer.tokens, answer.ended) == (1, True)
        assert peer.generate(**inputs, max_new_tokens=9).shape[1] == inputs["input_ids"].shape[1] + 1


def test_the_command(theirs, images, capsys):
    command("ask", "--model", theirs[0], "--image", images[1], "--question", QUESTIONS[1], "--device", "cpu")
    text = said_by(theirs, images[1], QUESTIONS[1])
    assert capsys.readouterr().out.startswith(f"{text or '(nothing)'}  (probability 0.")
    command("ask", "--model", theirs[0], "--image", images[1], "--question", QUESTIONS[1], "--precision", "bf16")
    assert "(probability " in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_study(theirs, images, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(zero_shot, "MAX_ANSWER_TOKENS", 4)
    summary = check_study(theirs[0], images[1], QUESTIONS[1], tmp_path, precision)
    assert summary["text"] == QUESTIONS[1]


@pytest.mark.parametrize("given", [(), ("somewhere", "--model", "elsewhere")])
def test_one_of_the_two(given, images):
    with pytest.raises(UserError, match="RUN, the folder of a trained system, or --model, .* one of the two"):
        command("ask", *given, "--image", images[0], "--question", "what?")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "the question is empty"),
        ("what " * 200, r"too long: its prompt has .* tokens, and 96 have room"),
        ("is <image> red?", "the question holds <image>, which stands for the image"),
    ],
)
def test_bad_questions(theirs, images, question, message):
    with pytest.raises(UserError, match=message):
        command("ask", "--model", theirs[0], "--image", images[0], "--question", question)


def test_bad_images_and_options(theirs, images, tmp_path):
    opened = open_zero_shot(str(theirs[0]), CPU)
    with pytest.raises(UserError, match="there is no such image"):
        opened.ask(tmp_path / "none.png", "what?")
    with pytest.raises(UserError, match="leave out --top"):
        opened.ask(images[0], "what?", 5)
    with pytest.raises(UserError, match="max_new_tokens 1000 is too much"):
        opened.ask(images[0], "what?", decoding={"max_new_tokens": 1_000})
    with pytest.raises(UserError, match="give it --question"):
        opened.ask(images[0], None)


def test_parts_that_do_not_fit(folder):
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            open_zero_shot(str(folder), CPU)
        assert "\n" not in str(error.value)

    joint = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(joint | {"num_query_tokens": 7}))
    refused("processor_config.json gives an image 7 tokens, the model of .* 4")
    joint["image_processor"]["size"] = {"height": 30, "width": 28}
    (folder / "processor_config.json").write_text(json.dumps(joint))
    refused("do not divide into patches of 14")
    (folder / "processor_config.json").unlink()
    refused("has no preprocessor_config.json")
    (folder / "tokenizer.json").unlink()
    refused("has no tokenizer.json")


def test_a_checkpoint_of_another_kind(folder):
    change_config(folder, None, model_type="vit")
    with pytest.raises(UserError, match="a model of type 'vit', expected blip-2, llava, fuyu, idefics"):
        open_zero_shot(str(folder), CPU)
