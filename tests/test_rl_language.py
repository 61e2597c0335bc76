"""A released decoder as the policy: its chances are those of `transformers`, and its runs are as any other's."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from lm_folders import CHAT, TEXTS, gpt2_folder, llama_folder
from test_rl_program import logged, refused, tensors
from tokenizers import pre_tokenizers

import rlhf
from vqa_scratch.data.chat_template import OF_TEXT, read_template
from vqa_scratch.data.prompts import read_prompts
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.kernels import chosen_logprobs
from vqa_scratch.models import released
from vqa_scratch.rl.decoder_policy import LanguagePolicy
from vqa_scratch.rl.language import prompt_of
from vqa_scratch.rl.mini_news import JUDGES, tokenizers_for
from vqa_scratch.rl.policy import ActorCritic, SamplingRules, policy_logits
from vqa_scratch.rl.rollout import chances, sample, score
from vqa_scratch.rl.types import Prompt

CPU = torch.device("cpu")
LENGTHS = (7, 1, 12, 3)
TINY = "--preset lm --prompts 4 --samples 2 --max-new-tokens 6 --micro-prompts 2 --eval-prompts 4 --eval-samples 2 "
TINY += "--frontier-prompts 2 --frontier-samples 4 --precision fp32 --device cpu --iterations 4 --save-every 1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (folder, the model of transformers)."""
    root = tmp_path_factory.mktemp("lm")
    return {name: (root / name, make(root / name)) for name, make in (("gpt2", gpt2_folder), ("llama", llama_folder))}


@pytest.fixture(params=["gpt2", "llama"])
def both(request, folders):
    """(policy, the model of transformers, prompts of several lengths)."""
    folder, reference = folders[request.param]
    model = released.decoder(folder, cross_attention=False)
    prompts = [Prompt("", tuple(torch.randint(3, 290, (n,)).tolist())) for n in LENGTHS]
    return LanguagePolicy(model, 0, model.config.eos_id), reference, prompts


def of_transformers(reference, prompt, response):
    """Log-probabilities (R,) of one response to one prompt, alone and without padding."""
    ids = torch.tensor([[*prompt.ids, *response]])
    logits = reference(ids).logits[0, len(prompt.ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt.ids) :, None])[:, 0]


def test_chances_are_those_of_transformers_whatever_stands_beside(both):
    policy, reference, prompts = both
    ends = tuple(range(0, 300, 7))  # many, so that lengths differ
    rules = SamplingRules(ends, max_new_tokens=9)
    with torch.no_grad():
        context = policy.encode(prompts).shared_by(3)
        ids, mask, finished = made = sample(policy, context, rules, chances(12, rules, None, CPU))
        parts = [[1, 2], [0, 3]]
        read = [(part, context.of(part), context.of(part)) for part in parts]
        scored = score(ActorCritic(policy), policy, read, ids, mask, rules)
        for row, length in enumerate(mask.sum(1).tolist()):
            response = ids[row, :length].tolist()
            theirs = of_transformers(reference, prompts[row // 3], response)
            torch.testing.assert_close(scored.logprobs[row, :length], theirs, rtol=0, atol=1e-5)
            assert [token in ends for token in response] == [False] * (length - 1) + [finished[row].item()]
            assert made.lists()[row] == [token for token in response if token not in ends]
    assert 1 < mask.sum(1).float().mean() < 9 and not mask.all()
    assert torch.equal(scored.logprobs, scored.ref_logprobs)


def test_cached_decoding_is_what_the_update_scores(both):
    policy, _, prompts = both
    rules = SamplingRules(299, 6, min_new_tokens=2, temperature=0.7, no_repeat_ngram=2)
    with torch.no_grad():
        context = policy.encode(prompts).shared_by(2)
        ids, mask, _ = sample(policy, context, rules, chances(8, rules, None, CPU))
        scores, state = policy.begin(context, 5)
        cached = torch.zeros(ids.shape)
        for t in range(6):
            odds = policy_logits(scores, ids, torch.full((8,), t), rules)
            cached[:, t] = chosen_logprobs(odds, ids[:, t])[0]
            scores = state.step(ids[:, t]) if t < 5 else scores
        everything = [(list(range(4)), context, context)]
        scored = score(ActorCritic(policy), policy, everything, ids, mask, rules)
    torch.testing.assert_close(scored.logprobs[mask], cached[mask], rtol=1e-5, atol=1e-5)


def test_gradients_through_a_shared_prompt_are_those_of_repeated_ones(both):
    policy, reference, prompts = both
    responses = [torch.randint(3, 290, (n,)).tolist() for n in (4, 2, 5, 1, 3, 3, 2, 5)]
    mask = torch.arange(5) < torch.tensor([len(row) for row in responses])[:, None]
    ids = torch.zeros(8, 5, dtype=torch.long).masked_scatter(mask, torch.tensor(sum(responses, [])))
    logits, _ = ActorCritic(policy)(policy.encode(prompts).shared_by(2), ids, mask, SamplingRules(0, 5))
    chosen_logprobs(logits, ids[mask])[0].sum().backward()
    reference.zero_grad()
    sum(of_transformers(reference, prompts[i // 2], row).sum() for i, row in enumerate(responses)).backward()
    theirs = reference.get_input_embeddings().weight.grad
    torch.testing.assert_close(policy.model.tokens.weight.grad, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())


@pytest.mark.parametrize("place", OF_TEXT)
def test_prompts_are_those_of_the_chat_template(tmp_path, place):
    llama_folder(tmp_path, place)
    theirs, ours = hf.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)
    template = read_template(tmp_path, OF_TEXT)
    talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": TEXTS[0] + " "}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": x}) for x in (talk, TEXTS[1])))
    asked = read_prompts(tmp_path / "p.jsonl", "prompt", template, ours.special, pairs=False)
    talks = (talk, [{"role": "user", "content": TEXTS[1]}])
    for one, said in zip(asked, talks, strict=True):
        expected = theirs.apply_chat_template(said, chat_template=CHAT, add_generation_prompt=True)["input_ids"]
        assert list(prompt_of(one, ours, True, 2, 9, None).ids) == expected
    (tmp_path / "p.csv").write_text(f"ask\n{TEXTS[1]}\n")
    (plain,) = read_prompts(tmp_path / "p.csv", "ask", None, ours.special, pairs=False)
    assert list(prompt_of(plain, ours, False, 2, 9, None).ids) == theirs(TEXTS[1])["input_ids"]  # with BOS


def test_responses_of_a_preference_continue_their_prompt(folders):
    """As TRL cuts them: the prompt and the response together in tokens, less those of the prompt; and the end token.

    Alone the first would begin with a space. The second shares a token with its prompt, so that only alone it has its
    own.
    """
    folder = folders["gpt2"][0]
    tokenizer, theirs = Tokenizer.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder)
    for backend in (tokenizer.backend, theirs.backend_tokenizer):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    path = folder / "pairs.jsonl"
    rows = {"prompt": "why t", "chosen": ", dark", "rejected": [{"role": "assistant", "content": "he sky"}]}
    path.write_text(json.dumps(rows))
    (asked,) = read_prompts(path, "prompt", None, tokenizer.special, pairs=True)
    prompt = prompt_of(asked, tokenizer, False, 0, 4, None)
    before = theirs("why t")["input_ids"]
    assert list(prompt.ids) == before
    whole, shared = (theirs("why t" + text)["input_ids"] for text in (", dark", "he sky"))
    assert whole[: len(before)] == before and shared[: len(before)] != before
    assert list(prompt.pair[0]) == [*whole[len(before) :], 0][:4]
    assert list(prompt.pair[1]) == [*theirs("he sky")["input_ids"], 0][:4]


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(rlhf, "draw_panels", lambda *args, **options: None)
    monkeypatch.setattr(rlhf.report, "frontier", lambda *args: None)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A reward in a file, prompts in three formats, preferences."""
    root = tmp_path_factory.mktemp("files")
    (root / "mine.py").write_text("def short(samples):\n    return [-float(len(text)) for text in samples.texts]\n")
    asked = [f"{TEXTS[i % 2]} {'again ' * (i % 3)}{i}" for i in range(12)]
    (root / "p.txt").write_text("\n".join([*asked, " "]))
    (root / "p.jsonl").write_text("\n".join(json.dumps({"prompt": [{"role": "user", "content": x}]}) for x in asked))
    pairs = ({"prompt": x, "chosen": " yes", "rejected": " " + "no " * (i % 4 + 1)} for i, x in enumerate(asked))
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return root


def flags(folder, files, out, *more):
    return [*TINY.split(), "--policy", str(folder), "--out", str(out), "--reward", f"{files}/mine.py:short", *more]


def test_a_run_of_a_gpt2_and_its_resumption(folders, files, tmp_path, monkeypatch, capsys):
    """Prompts of a text file; every line of the log and every weight as in the run that was left alone."""
    argv = flags(folders["gpt2"][0], files, tmp_path / "whole", "--data", str(files / "p.txt"), "--epochs", "2")
    summary = rlhf.run(argv)
    said = capsys.readouterr().out
    assert "chat template" not in said and f"greedy reward {summary['greedy_reward_before']:+.3f} -> " in said
    assert said.endswith(f"next:\n  python -m vqa_scratch ask {tmp_path / 'whole'}\n")
    page = (tmp_path / "whole" / "samples.html").read_text()
    likeliest = re.findall("<p class=people>greedy, reward (.*?):", page)
    assert len(likeliest) == 8  # before and after, of four prompts
    for when, shown in (("before", likeliest[::2]), ("after", likeliest[1::2])):
        assert sum(map(float, shown)) / 4 == pytest.approx(summary[f"greedy_reward_{when}"], abs=0.006)
    rows = logged(tmp_path / "whole")
    assert all(row["ppo/policy/first_ratio_error"] <= 1e-6 for row in rows) and rows[0]["objective/kl_exact"] < 1e-9
    assert summary["kl"] > 0 and math.isfinite(summary["greedy_reward_after"])
    whole, number = rlhf.iterate, iter(range(9))
    monkeypatch.setattr(rlhf, "iterate", lambda ppo: whole(ppo) if next(number) < 2 else 1 / 0)
    out = tmp_path / "killed"
    with pytest.raises(ZeroDivisionError):
        rlhf.run([*argv, "--out", str(out)])
    monkeypatch.setattr(rlhf, "iterate", whole)
    rlhf.run(["--preset", "lm", "--out", str(out), "--resume"])
    assert logged(out) == rows
    assert all(torch.equal(value, tensors(out)[name]) for name, value in tensors(tmp_path / "whole").items())
    tuned = hf.AutoModelForCausalLM.from_pretrained(out / "policy")
    ids = torch.randint(0, 290, (1, 9))
    ours = released.decoder(out / "policy", cross_attention=False)
    torch.testing.assert_close(tuned(ids).logits, ours(ids), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A classifier's folder, with a tokenizer of another vocabulary than any policy's."""
    from vqa_scratch.data.news import news
    from vqa_scratch.models.bert import BertConfig
    from vqa_scratch.models.classifier import TextClassifier

    folder, (_, tokenizer) = tmp_path_factory.mktemp("judge"), tokenizers_for(news(20, 0))
    size = BertConfig(layout="roberta", vocab_size=len(tokenizer), dim=16, layers=1, heads=2, hidden=16, pad_id=1)
    TextClassifier(replace(size, max_positions=66, token_types=1), JUDGES["tone"][1]).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def test_a_run_of_a_chat_model_paid_by_a_classifier(folders, files, judge, tmp_path, capsys):
    paid = ["--reward", str(judge), "--reward-label", "neutral", "--algorithm", "grpo"]
    paid += ["--data", str(files / "p.jsonl")]
    summary = rlhf.run(flags(folders["llama"][0], files, tmp_path, *paid, "--iterations", "1"))
    assert "written by the chat template" in capsys.readouterr().out
    assert math.isfinite(summary["reward_after"]) and "<|user|>" in (tmp_path / "samples.html").read_text().replace(
        "&lt;", "<"
    ).replace("&gt;", ">")
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert theirs.chat_template == CHAT
    assert hf.GenerationConfig.from_pretrained(tmp_path / "policy").eos_token_id == [1, 2]


def test_preferences_of_a_file(folders, files, tmp_path, capsys):
    """What is preferred becomes likelier than it is to the reference."""
    more = ["--algorithm", "dpo", "--preferences", str(files / "pairs.jsonl"), "--kl-coef", "0.5", "--epochs", "2"]
    summary = rlhf.run(flags(folders["gpt2"][0], files, tmp_path, *more, "--learning-rate", "1e-3"))
    said = capsys.readouterr().out
    assert "0 of 24 responses cut to 6 tokens" in said or "responses cut to 6 tokens" in said
    rows = logged(tmp_path)
    assert rows[0]["ppo/policy/first_ratio_error"] <= 1e-6
    assert rows[-1]["dpo/accuracy"] > 0.9 and rows[-1]["ppo/loss/policy"] < math.log(2)
    assert summary["kl"] > 0 and summary["algorithm"] == "dpo"


def test_dpo_by_the_reward(folders, files, tmp_path):
    more = ["--algorithm", "dpo", "--data", str(files / "p.txt"), "--iterations", "2"]
    summary = rlhf.run(flags(folders["gpt2"][0], files, tmp_path, *more))
    rows = logged(tmp_path)
    assert summary["kl"] > 0 and all(0 <= row["dpo/accuracy"] <= 1 for row in rows)


def test_responses_of_no_words(folders, files, tmp_path):
    """A policy that ends at once: the end token is the response, and a reward sees an empty text."""
    folder, _ = folders["gpt2"]
    everything = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": list(range(300))}
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(everything))
    argv = flags(tmp_path, files, tmp_path / "run", "--data", str(files / "p.txt"), "--iterations", "1")
    summary = rlhf.run(argv)
    assert summary["finish_after"] == 1 and summary["length_after"] == 0 and summary["reward_after"] == 0


# ---------------------------------------------------------------------------------------------------------- bad input


def test_without_a_generation_config_the_config_names_the_end(folders, files, tmp_path, capsys):
    folder, _ = folders["gpt2"]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").unlink()
    argv = flags(tmp_path, files, tmp_path / "run", "--data", str(files / "p.txt"), "--iterations", "1")
    rlhf.run(argv)
    said = capsys.readouterr().out
    assert "has no generation_config.json: responses end with '<|endoftext|>', as config.json says" in said
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))  # GPT-2's own is 50256
    argv += ["--out", str(tmp_path / "other")]
    refused("names no end token in generation_config.json or config.json: 50256 is none of its 300 ids", *argv)


PAIR = {"prompt": "why", "chosen": "so", "rejected": "no"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PAIR | {"rejected": "so"}, "line 1: 'chosen' and 'rejected' are equal, so neither is better"),
        (PAIR | {"chosen": " "}, "line 1: 'chosen' is empty"),
        (PAIR | {"chosen": [{"role": "assistant", "content": ""}]}, "line 1: 'chosen' is empty"),
        (PAIR | {"chosen": [{"role": "a", "content": "x"}] * 2}, "line 1: 'chosen' has 2 messages; it must be one"),
        (PAIR | {"chosen": 3}, "line 1: 'chosen' must be a text or a list of messages, not a int"),
        (PAIR | {"prompt": [{"role": "user"}]}, "line 1: a message of 'prompt' has no 'content'"),
        (PAIR | {"prompt": [{"role": "user", "content": "x"}]}, "is a conversation, which only a chat template"),
        ({"chosen": "a", "rejected": "b"}, "line 1: no column 'prompt'; the columns are chosen, rejected"),
        (PAIR | {"prompt": "why " * 99}, r"line 1: the prompt has \d+ tokens, and with --max-new-tokens 6 only 59"),
    ],
)
def test_bad_preferences_are_one_line_with_their_place(folders, files, tmp_path, row, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(x) for x in [row, *({"prompt": str(i)} | PAIR for i in range(9))]))
    more = ["--algorithm", "dpo", "--preferences", str(path)]
    refused(message, *flags(folders["gpt2"][0], files, tmp_path / "run", *more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--preset lm needs --data, a file of prompts, or --algorithm dpo and a file of --preferences"),
        (["--data", "none.txt"], "none.txt not found"),
        (["--data", "FILES/p.txt", "--chat"], "--chat needs a chat template, and .*gpt2 has none"),
        (["--data", "FILES/p.txt", "--column", "ask", "--eval-prompts", "11"], "12 prompts are too few: 11 are held"),
        (["--data", "FILES/p.txt", "--reward", "no.such.module:f"], "No module named 'no'; give FILE.py:NAME, MODULE"),
        (["--data", "FILES/p.txt", "--reward", "math:nothing"], "math has no function 'nothing'"),
        (["--data", "FILES/p.txt", "--freeze", "encoder"], "--freeze means nothing with --preset lm"),
        (["--data", "FILES/p.txt", "--preferences", "FILES/pairs.jsonl"], "--preferences means nothing with"),
        (["--data", "FILES/p.txt", "--algorithm", "dpo", "--samples", "3"], "--samples must be even, not 3"),
        (["--data", "FILES/p.txt", "--algorithm", "dpo", "--clip-low", "0.1"], "--clip-low means nothing with --algo"),
        (
            ["--preferences", "FILES/pairs.jsonl", "--algorithm", "dpo", "--data", "FILES/p.txt"],
            "give --preferences or --data, not both",
        ),
        (
            ["--preferences", "FILES/pairs.jsonl", "--algorithm", "dpo", "--samples", "4"],
            "--preferences has two responses to a prompt: --samples must be 2, not 4",
        ),
        (
            ["--preferences", "FILES/pairs.jsonl", "--algorithm", "dpo", "--kl-target", "4"],
            "--preferences goes without --min-new-tokens, --no-repeat-ngram-size and --kl-target",
        ),
        (["--data", "FILES/p.txt", "--reference", "LLAMA"], "has other tokens than the policy: a KL needs the same"),
        (["--data", "FILES/p.txt", "--reference", "WIDER"], "the reference has vocab_size 310, the policy 300"),
        (["--data", "FILES/p.txt", "--reward", "FILES/mine.py:nan"], "reward 'nan' is nan for 8 of 8 responses"),
        (["--data", "FILES/p.txt", "--reward", "FILES/mine.py:inf"], "reward 'inf' is inf for 8 of 8 responses"),
        (["--data", "FILES/p.txt", "--reward", "FILES/mine.py:few"], r"reward 'few' has shape \(1,\), expected \(8,\)"),
        (["--data", "FILES/p.txt", "--reward", "FILES/mine.py:none"], "reward 'none' must be numbers, one a response"),
    ],
)
def test_bad_flags_and_rewards_are_one_line(folders, files, tmp_path, more, message):
    if "WIDER" in more:
        gpt2_folder(tmp_path / "wider", vocab_size=310)
    own = "nan = lambda s: [float('nan')] * len(s.ids)\ninf = lambda s: [float('inf')] * len(s.ids)\n"
    code = files / "mine.py"
    if "lambda" not in code.read_text():
        code.write_text(code.read_text() + own + "few = lambda s: [1.0]\nnone = lambda s: None\n")
    places = {"FILES": str(files), "LLAMA": str(folders["llama"][0]), "WIDER": str(tmp_path / "wider")}
    for name, place in places.items():
        more = [word.replace(name, place) for word in more]
    refused(message, *flags(folders["gpt2"][0], files, tmp_path / "run", *more))


def test_a_judge_of_another_vocabulary_is_fine_but_not_one_beyond_its_own(folders, files, judge, tmp_path):
    """Judges read texts; their own tokenizer must fit their own rows."""
    for file in Path(judge).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 9000, "content": "<beyond>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    more = ["--data", str(files / "p.txt"), "--reward", str(tmp_path), "--reward-label", "neutral"]
    message = "the tokenizer has ids up to 700, the classifier has rows for 700"
    refused(message, *flags(folders["gpt2"][0], files, tmp_path / "r", *more))
