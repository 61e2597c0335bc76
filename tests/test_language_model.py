"""A language model alone, asked and studied: what it says and where it looks are those of `transformers`.

Tolerance 1e-5: weights are at most 1, and fp32 rounds scores of the size met here to a few 1e-7.
"""

import io
import json
import math

import pytest
import torch
import transformers as hf
from lm_folders import TEXTS, gpt2_folder, llama_folder
from run_helpers import command, make_run, picture
from study_helpers import tiny_t5

from vqa_scratch.data.text import train_wordpiece
from vqa_scratch.errors import UserError
from vqa_scratch.language_model import open_language_model
from vqa_scratch.study.analysis import head_statistics, relevancy, rollout
from vqa_scratch.study.faithfulness import forced
from vqa_scratch.study.record import take_apart

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (folder, the model of transformers with weights that can be read)."""
    root = tmp_path_factory.mktemp("lm")
    made = {name: make(root / name) for name, make in (("gpt2", gpt2_folder), ("llama", llama_folder))}
    for model in made.values():
        model.set_attn_implementation("eager")
    return {name: (root / name, model) for name, model in made.items()}


@pytest.fixture(params=["gpt2", "llama"])
def both(request, folders):
    return folders[request.param]


def prompt_of(folder, text):
    """The ids (1, N) that `transformers` makes of it: of a folder with a chat template, what a user says."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        return tokenizer(text, return_tensors="pt")["input_ids"]
    said = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


@pytest.mark.parametrize("decoding", [{}, {"no_repeat_ngram_size": 1, "repetition_penalty": 1.3}])
def test_an_answer_is_that_of_transformers(both, decoding, capsys):
    """Also with options that look at the prompt."""
    folder, reference = both
    flags = [word for name, value in decoding.items() for word in (f"--{name.replace('_', '-')}", value)]
    for text in (*TEXTS, " ".join(TEXTS), "sky"):
        command("ask", folder, "--question", f" {text}\n", "--max-new-tokens", 7, *flags)
        ids = prompt_of(folder, text)
        made = reference.generate(
            ids, max_new_tokens=7, do_sample=False, return_dict_in_generate=True, output_scores=True, **decoding
        )
        likely = reference.compute_transition_scores(made.sequences, made.scores, normalize_logits=True).sum().exp()
        new = made.sequences[0, ids.shape[1] :]
        said = hf.AutoTokenizer.from_pretrained(folder).decode(new, skip_special_tokens=True)
        assert capsys.readouterr().out == f"{said.strip() or '(nothing)'}  (probability {likely:.3f})\n"


def test_study_shows_the_weights_of_transformers(both):
    folder, reference = both
    opened = open_language_model(folder, CPU).subject(TEXTS[1], 5)
    study, ids = take_apart(opened), prompt_of(folder, TEXTS[1])
    whole = torch.cat([ids, torch.tensor([[token.id for token in study.tokens]])], 1)
    assert torch.equal(whole, reference.generate(ids, max_new_tokens=5, do_sample=False))
    theirs = reference(whole[:, :-1], output_attentions=True)
    for layer, pattern in enumerate(theirs.attentions):
        torch.testing.assert_close(study.trace.pattern(f"decoder.{layer}.self"), pattern, rtol=0, atol=1e-5)
    chances = theirs.logits[0, ids.shape[1] - 1 :].detach().softmax(-1)
    expected = [float(row[token.id]) for row, token in zip(chances, study.tokens, strict=True)]
    assert [token.probability for token in study.tokens] == pytest.approx(expected, abs=1e-5)
    assert study.certificate.worst <= 1e-5 and study.certificate.attentions == len(theirs.attentions)
    assert len(opened.subject.sources[0]) == ids.shape[1] - 1 and len(opened.prompt) == 1
    total = study.attributions[0]
    parts = sum(float(part.sum()) for part in (*total.heads.values(), total.mlps)) + total.embedding + total.biases
    first = theirs.logits[0, ids.shape[1] - 1]
    assert parts == pytest.approx(float(first[study.tokens[0].id] - first.mean()), abs=1e-4)


def test_maps_follow_the_whole_sequence(both):
    """Rollout and relevancy of one stream, from the weights and gradients of `transformers`."""
    folder, reference = both
    subject = open_language_model(folder, CPU).subject(TEXTS[0], 4).subject
    answer = subject.generate()
    whole = torch.cat([subject.input_ids, torch.tensor([answer[:-1]])], 1)
    theirs = reference(whole, output_attentions=True)
    eye, own = torch.eye(whole.shape[1]), subject.prefix
    flow = eye
    for pattern in theirs.attentions:
        flow = (pattern[0].mean(0) + eye) / 2 @ flow
    found = rollout(subject, forced(subject, answer))
    torch.testing.assert_close(torch.cat([found.sources, found.decoder], 1), flow[own:], rtol=0, atol=1e-5)
    found = relevancy(subject, answer)
    for row, token in enumerate(answer):
        gradients = torch.autograd.grad(theirs.logits[0, own + row, token], theirs.attentions, retain_graph=True)
        flow = eye
        for pattern, gradient in zip(theirs.attentions, gradients, strict=True):
            flow = flow + (pattern * gradient)[0].clamp(min=0).mean(0) @ flow
        ours = torch.cat([found.sources[row], found.decoder[row]])
        torch.testing.assert_close(ours, flow[own + row], rtol=0, atol=1e-4)


def test_heads_are_measured_over_the_whole_text(folders):
    """The first token is a sink, the last of the prompt is none; distances are over all tokens."""
    folder, reference = folders["gpt2"]
    subject = open_language_model(folder, CPU).subject(TEXTS[0], 4).subject
    answer = subject.generate()
    heads = head_statistics(subject, forced(subject, answer))
    theirs = reference(torch.cat([subject.input_ids, torch.tensor([answer[:-1]])], 1), output_attentions=True)
    for head in heads:
        pattern = theirs.attentions[int(head.name.split(".")[1])][0, head.head]
        places = torch.arange(len(pattern))
        far = (pattern * (places[:, None] - places).abs()).sum(-1).mean()
        assert (head.image, head.sink) == pytest.approx((0.0, float(pattern[:, 0].mean())), abs=1e-5)
        assert head.text == pytest.approx(1 - head.sink, abs=1e-5) and head.distance == pytest.approx(
            float(far), abs=1e-4
        )


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """A run of rlhf.py, as it leaves one: a policy, and options."""
    root = tmp_path_factory.mktemp("runs") / "rlhf-lm"
    (root / "policy").mkdir(parents=True)
    for file in folders["llama"][0].iterdir():
        (root / "policy" / file.name).write_bytes(file.read_bytes())
    options = {"program": "rlhf.py", "preset": "lm", "prefix": "summarize: ", "max_new_tokens": 3}
    (root / "config.json").write_text(json.dumps(options))
    return root


def test_a_run_is_asked_and_studied_in_its_own_terms(run, folders, tmp_path, capsys, monkeypatch):
    """As many tokens as its responses had, and its chat template; a prompt takes one text after the other."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TEXTS[0]}\n{TEXTS[1]}\n"))
    command("ask", run)
    said = capsys.readouterr().out
    for text in TEXTS:
        command("ask", folders["llama"][0], "--question", text, "--max-new-tokens", 3)
    assert said == capsys.readouterr().out and said.count("\n") == 2
    (tmp_path / "text.txt").write_text(TEXTS[0] + "\n")
    command("study", run, "--text", tmp_path / "text.txt", "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["run"], summary["text"]) == ("rlhf-lm", TEXTS[0]) and 1 <= len(summary["tokens"]) <= 3
    assert summary["answer"] == said.split("  (probability")[0].replace("(nothing)", "")
    assert (
        "&lt;|user|&gt;" in (tmp_path / "out" / "report.html").read_text()
        or "\\u003c|user|\\u003e" in (tmp_path / "out" / "report.html").read_text()
    )


def test_a_t5_is_asked_with_the_prefix_of_its_run(tmp_path, capsys):
    tokenizer = train_wordpiece(["sum the museum cut the night trains because of rising costs ."], 64)
    tokenizer.save(tmp_path / "policy")
    tiny_t5(len(tokenizer)).save_pretrained(tmp_path / "policy")
    told = {"prefix": "sum ", "max_new_tokens": 4, "max_prompt_tokens": 6}
    (tmp_path / "config.json").write_text(json.dumps(told))
    opened = open_language_model(tmp_path, CPU)
    subject = opened.subject("the museum cut the night trains", 4)
    assert subject.text == "sum the museum cut the night trains"
    assert subject.notes == ("the text is longer than 6 tokens; only its beginning was read",)
    command("ask", tmp_path, "--question", "the museum cut the night trains")
    printed = capsys.readouterr()
    said = subject.decode(subject.subject.generate())
    assert printed.out.startswith(said or "(nothing)") and printed.err == f"note: {subject.notes[0]}\n"
    assert not opened.subject("the museum").notes


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--question", " "], "the text is empty: there is nothing to read"),
        (["--question", "a"], "the text is a single token: give one more word"),
        (
            ["--question", "why " * 30],
            r"the text has \d+ tokens, and .*gpt2 has 64 positions, which leaves \d+ for the",
        ),
        (["--question", TEXTS[0], "--max-new-tokens", "99"], "for the answer: max_new_tokens is 99"),
        (["--question", TEXTS[0], "--top", "3"], "writes one answer and ranks no list of them: leave out --top"),
        (["--question", TEXTS[0], "--image", "a.png"], "gpt2 reads texts alone: leave out --image"),
        (["--question", TEXTS[0], "--top-k", "3"], "top_k has an effect on sampling only"),
    ],
)
def test_what_cannot_be_asked_is_one_line(folders, more, message):
    with pytest.raises(UserError, match=message) as caught:
        command("ask", folders["gpt2"][0], *more)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_studied_is_one_line(folders, data, tmp_path):
    folder, out = folders["gpt2"][0], ("--out", tmp_path / "out")
    (tmp_path / "text.txt").write_text(TEXTS[0])
    text = ("--text", tmp_path / "text.txt")
    looking = make_run(data, tmp_path / "run")
    for argv, message in (
        (("study", folder, *out), "gpt2 reads texts: give it --text FILE, and neither --image nor --question"),
        (("study", folder, *text, "--question", "a", *out), "reads texts: give it --text FILE, and neither"),
        (
            ("study", folder, "--faithfulness", data, *out),
            "--faithfulness goes over questions about images, and .*gpt2",
        ),
        (("ask", looking, "--question", "what?"), "run looks at images: give it --image FILE"),
        (("ask", tmp_path / "none", "--question", "what?"), "none"),
    ):
        with pytest.raises(UserError, match=message):
            command(*argv)


def test_released_ones_open_by_model_too(folders, data, capsys):
    """As any released model does; one that reads images stays one."""
    folder, _ = folders["gpt2"]
    for how in ((folder,), ("--model", folder)):
        command("ask", *how, "--question", TEXTS[0], "--max-new-tokens", 3)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    with pytest.raises(UserError, match="give RUN, the folder of a trained system, or --model"):
        command("ask", folder, "--model", folder, "--image", picture(data))
    assert math.isfinite(float(first.rpartition(" ")[2].rstrip(")")))
