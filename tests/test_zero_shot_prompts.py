"""`ask --model` with a LLaVA and a Fuyu: pixels, prompt, tokens and text against the whole path of the reference."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers as hf
from blip2_helpers import change_config
from image_text_helpers import CPU, check_answers, check_study, fuyu_reference, llava_reference, pictures
from PIL import Image
from run_helpers import command
from tokenizers import decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from vqa_scratch import zero_shot
from vqa_scratch.data.text import train_bpe
from vqa_scratch.errors import UserError
from vqa_scratch.zero_shot import MAX_ANSWER_TOKENS, open_zero_shot

QUESTIONS = ["what is it?", "how many cats are there?", "  is it red?  "]
CHAT = """{% for message in messages %}<s>{{ message['role'] }}
{% for part in message['content'] %}
{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}
{% endfor %}
{% endfor %}
{% if add_generation_prompt %}</s>assistant{% endif %}"""


def with_image_token() -> hf.PreTrainedTokenizerFast:
    own = train_bpe([f"USER: \n{question} ASSISTANT:" for question in QUESTIONS], 280)
    own.backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", own.bos_id)])
    special = {f"{role}_token": token for role, token in own.special.items()}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=own.backend, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def llava(folder: Path, template: str | None):
    tokenizer = with_image_token()
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    own = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = hf.LlavaProcessor(CLIPImageProcessorPil(**sizes), tokenizer, chat_template=template, **own)
    processor.save_pretrained(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    place = tokenizer.convert_tokens_to_ids("<image>")
    return llava_reference(folder, text_changes=ends | {"vocab_size": 300}, image_token_index=place), processor


def fuyu(folder: Path):
    """Its tokenizer is a Unigram whose pieces are its special tokens and letters, behind a mark for a space."""
    special = ["<unk>", "<s>", "</s>", "|SPEAKER|", "|NEWLINE|", "<0x04>"]
    letters = sorted({letter for question in QUESTIONS for letter in question} - {" "}) + ["\n", "\u2581"]
    pieces = [(piece, -1.0) for piece in special] + [(letter, -2.0 - i / 10) for i, letter in enumerate(letters)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Replace("\u2581", " ")
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    sizes = {"size": {"height": 24, "width": 48}, "patch_size": {"height": 4, "width": 4}}
    processor = hf.FuyuProcessor(FuyuImageProcessorPil(**sizes), tokenizer)
    processor.save_pretrained(folder)
    cut = processor.image_processor.patchify_image  # made for arrays, and called by its processor with tensors
    processor.image_processor.patchify_image = lambda image, **size: torch.from_numpy(cut(image.numpy(), **size))
    ends = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 64}
    model = fuyu_reference(folder, 4, ends)
    model.config.image_token_id = 3
    model.save_pretrained(folder)
    return model, processor


MADE = {"llava": lambda folder: llava(folder, None), "chat": lambda folder: llava(folder, CHAT), "fuyu": fuyu}


@pytest.fixture(scope="module", params=MADE)
def theirs(request, tmp_path_factory):
    """(name, folder, model, processor) of a checkpoint saved by the reference, everything in it as it saves today."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, *MADE[request.param](folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """One is smaller than the patches allow, one is larger than Fuyu's largest size."""
    return pictures(tmp_path_factory.mktemp("images"), [(10, 15), (40, 60), (24, 20)])


def said_by(theirs, image: Path, question: str) -> str:
    name, _, model, processor = theirs
    picture, question = Image.open(image), question.strip()
    if name == "fuyu":
        inputs = processor(images=picture, text=f"{question}\n", return_legacy_image_output=False, return_tensors="pt")
    else:
        text, more = f"USER: <image>\n{question} ASSISTANT:", {}
        if name == "chat":
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            assert text == f"<s>user\n<image>{question}</s>assistant"
            more = {"add_special_tokens": False}
        inputs = processor(images=picture, text=text, return_tensors="pt", **more)
    inputs.pop("mm_token_type_ids", None)
    made = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
    ids = made[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip()


def test_answers_equal_those_of_the_reference(theirs, images):
    check_answers(theirs[1], images, QUESTIONS, partial(said_by, theirs), different=5)


def test_the_command(theirs, images, capsys):
    given = ("ask", "--model", theirs[1], "--image", images[1], "--question", QUESTIONS[1])
    command(*given, "--device", "cpu")
    text = said_by(theirs, images[1], QUESTIONS[1])
    assert capsys.readouterr().out.startswith(f"{text or '(nothing)'}  (probability 0.")
    command(*given, "--precision", "bf16")
    assert "(probability " in capsys.readouterr().out


def test_study(theirs, images, tmp_path, capsys, monkeypatch):
    """From shards: the answer of `ask`, and squares on the very pixels that the model reads."""
    monkeypatch.setattr(zero_shot, "MAX_ANSWER_TOKENS", 4)
    name, folder, model, _ = theirs
    shards = Path(shutil.copytree(folder, tmp_path / "shards", ignore=shutil.ignore_patterns("*.safetensors")))
    model.save_pretrained(shards, max_shard_size="20KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    check_study(shards, images[1], QUESTIONS[1], tmp_path / "out")
    opened = open_zero_shot(str(folder), CPU)
    studied = opened.subject(Image.open(images[1]), QUESTIONS[1])
    assert {"report.html", "overlay_relevancy.png", "trace.safetensors"} <= set(
        path.name for path in (tmp_path / "out").iterdir()
    )
    subject, size = studied.subject, (24, 36) if name == "fuyu" else (8, 8)
    assert torch.equal(opened.processor(studied.image)[None], subject.pixel_values) and studied.image.size == size[::-1]
    words = "".join(subject.sources[0].labels) + studied.prompt[0]
    assert QUESTIONS[1] in words and ("<0x04>" in words if name == "fuyu" else "ASSISTANT:" in words or name == "chat")
    check_study(shards, images[1], QUESTIONS[1], tmp_path / "out", "bf16")
    assert "certificate: " in capsys.readouterr().out


def test_studies_that_cannot_be(theirs, images, tmp_path):
    given = ("--out", tmp_path / "out", "--image", images[0])
    for message, argv in {
        "give RUN, the folder of a trained system, or --model": ["study", *given, "--question", "what?"],
        "or --model, a released checkpoint: one of the two": ["study", tmp_path, "--model", theirs[1], *given],
        "answers questions: give it --question": ["study", "--model", theirs[1], *given],
        'give it --image FILE and a --question "...", and no --text': [
            *("study", "--model", theirs[1], *given, "--question", "what?", "--text", "a")
        ],
        "--ablation scores the answers of a run": [
            *("study", "--model", theirs[1], "--out", tmp_path / "out", "--ablation", tmp_path)
        ],
        "--precision is that of the weights of --model": ["study", tmp_path, *given, "--precision", "bf16"],
    }.items():
        with pytest.raises(UserError, match=re.escape(message)) as error:
            command(*argv)
        assert "\n" not in str(error.value) and len(str(error.value)) <= 300
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_prompt_that_ends_with_its_image(tmp_path, images):
    template = "{% for part in messages[0]['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    llava(tmp_path, template + "{% endfor %}<image>")
    opened = open_zero_shot(str(tmp_path), CPU)
    opened.ask(images[0], "what?")
    with pytest.raises(UserError, match="ends with its image; study needs a word that reads it"):
        opened.subject(Image.open(images[0]), "what?")


def refused(folder: Path, image: Path, question: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_zero_shot(str(folder), CPU).ask(image, question)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_bad_questions(theirs, images):
    place = "|SPEAKER|" if theirs[0] == "fuyu" else "<image>"
    refused(theirs[1], images[0], "", "the question is empty")
    refused(theirs[1], images[0], "what " * 300, r"too long: its prompt has .* tokens, and \d+ have room")
    refused(theirs[1], images[0], f"is {place} red?", r"the question holds \W\w+\W, which stands for the image")


def test_parts_that_do_not_fit(theirs, images, tmp_path):
    name, folder = theirs[0], Path(shutil.copytree(theirs[1], tmp_path / "copy"))
    joint = json.loads((folder / "processor_config.json").read_text())

    def write(**changes) -> None:
        changed = joint | {"image_processor": joint["image_processor"] | changes}
        (folder / "processor_config.json").write_text(json.dumps(changed))

    if name == "fuyu":
        write(patch_size={"height": 2, "width": 2})
        refused(folder, images[0], "what?", "are cut into patches of 2 x 2 x 3, its model reads 4 x 4 x 3")
        write()
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace("|NEWLINE|", "|LINE|").replace("<0x04>", "<0x05>"))
        refused(folder, images[0], "what?", r"has no \|NEWLINE\|, <0x04>, as that of a Fuyu has")
        return
    write(crop_size={"height": 6, "width": 8})
    refused(folder, images[0], "what?", "do not divide into patches of 4")
    write()
    change_config(folder, None, image_token_index=299)
    refused(folder, images[0], "what?", "gives an image the token 299, which its tokenizer does not have")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'][1]['text'] }}", "has <image> 0 times; it must hold one image"),
        ("<image><image>", "has <image> 2 times"),
        ("{% for %}", "the chat template cannot be followed: TemplateSyntaxError"),
        ("{{ raise_exception('only texts') }}", "cannot be followed: TemplateError: only texts"),
        ("{{ messages.append(1) }}", "cannot be followed: SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "cannot be followed: SecurityError|has <image> 0 times"),
    ],
)
def test_templates_that_cannot_be_followed(tmp_path, images, template, message):
    torch.manual_seed(0)
    llava(tmp_path, CHAT)
    assert (tmp_path / "chat_template.jinja").is_file()
    (tmp_path / "chat_template.jinja").write_text(template)
    refused(tmp_path, images[0], "what?", message)


def test_where_a_template_may_be(tmp_path, images):
    """In a file of its own, in an older one, or with the preprocessing: they say the same."""
    torch.manual_seed(0)
    llava(tmp_path, CHAT)
    first = open_zero_shot(str(tmp_path), CPU).ask(images[0], "what is it?")
    (tmp_path / "chat_template.jinja").unlink()
    plain = open_zero_shot(str(tmp_path), CPU).ask(images[0], "what is it?")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    assert open_zero_shot(str(tmp_path), CPU).ask(images[0], "what is it?") == first != plain
    (tmp_path / "chat_template.json").unlink()
    joint = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps(joint | {"chat_template": CHAT}))
    assert open_zero_shot(str(tmp_path), CPU).ask(images[0], "what is it?") == first
