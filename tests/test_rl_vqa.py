"""A system that writes answers, as PPO's policy: its cached decoding is the distribution that the update scores."""

import copy
import dataclasses
import hashlib
import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_systems import flags as flags_of_train

import rlhf
from vqa_scratch import systems
from vqa_scratch.data.vqa_v2 import read_vqa
from vqa_scratch.errors import UserError
from vqa_scratch.kernels import chosen_logprobs
from vqa_scratch.rl.options import RLHFOptions
from vqa_scratch.rl.policy import ActorCritic, SamplingRules, policy_logits
from vqa_scratch.rl.ppo import PPO
from vqa_scratch.rl.rollout import chances, sample, score
from vqa_scratch.rl.types import Samples
from vqa_scratch.rl.vqa_policy import VQAPolicy, official_accuracy, prompts_from
from vqa_scratch.systems.base import System
from vqa_scratch.systems.options import read_command_line
from vqa_scratch.systems.run_folder import save_weights
from vqa_scratch.training.precision import Precision

CPU = torch.device("cpu")
# Name -> system in test_systems.py and other options: memories with and without the question as a prompt, a single key,
# three kinds of prefix, gated layers, and a captioner that answers questions.
KINDS = {name: (name, {}) for name in ("tokens", "mean", "prefix", "patches", "qformer", "resampler", "caption")}
KINDS["bare"] = ("tokens", {"question_prompt": False})
NEW = ("prefix", "caption")


def policy_of(system: System) -> VQAPolicy:
    return VQAPolicy(system.model, system.tokenizers, system.processor)


def rules_for(policy: VQAPolicy, **options) -> SamplingRules:
    barred = torch.zeros(len(policy.model.decoder.head), dtype=torch.bool)
    barred[policy.pad_id] = True
    return SamplingRules(policy.eos_id, barred=barred, **{"max_new_tokens": 6} | options)


def untrained_run(data: Path, out: Path, kind: str, **changes) -> Path:
    """A run folder as train.py leaves it before the first step."""
    options = dataclasses.replace(read_command_line(flags_of_train(kind, data, out)), **changes)
    system = systems.find(options.preset)
    system = system.build(options, system.read(options), Precision("fp32", CPU))
    system.save(out)
    save_weights(out / "model.safetensors", system.model)
    return out


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """name of a kind -> its run folder."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: untrained_run(data, folder / name, kind, decoder_layers=2, **changes)
        for name, (kind, changes) in KINDS.items()
    }


@pytest.fixture(params=KINDS)
def system(request, runs) -> System:
    return systems.load(runs[request.param])


@pytest.fixture(scope="module")
def samples(data):
    """Two questions about each of six pictures, next to each other; every second question is longer."""
    first, found = {}, []
    for number, one in enumerate(read_vqa(data, "train").samples):
        if first.setdefault(one.image_id, number) + 2 > number and len(found) < 12:
            found.append(dataclasses.replace(one, question=one.question + " of them all" * (number % 2)))
    assert len({one.image_id for one in found}) == 6
    return found


def test_cached_decoding_equals_scoring(system, samples):
    policy = policy_of(system)
    prompts = prompts_from(samples[:8], policy.tokenizers)
    with torch.no_grad():
        context = policy.encode(prompts).shared_by(3)
        ids = torch.randint(3, 40, (24, 5))
        inputs = torch.cat([torch.full_like(ids[:, :1], policy.start_id), ids[:, :-1]], 1)
        whole = policy.decode_hidden(inputs, context)
        assert whole.shape == (24, 5, 16)
        logits, rows = policy.logits(whole), torch.arange(24)
        scores, state = policy.begin(context, 4)
        for t in range(5):
            torch.testing.assert_close(scores, logits[rows, t], rtol=1e-5, atol=1e-5)
            if t == 2:  # some rows are done
                keep = torch.tensor([0, 1, 5, 9, 10, 22])
                state.keep(keep)
                rows = rows[keep]
            if t < 4:
                scores = state.step(ids[rows, t])
        alone = policy.decode_hidden(inputs[9:12], policy.encode(prompts[3:4]).shared_by(3))
        torch.testing.assert_close(alone, whole[9:12], rtol=1e-5, atol=1e-5)


def test_answers_are_scored_with_the_chances_they_were_sampled_with(system, samples):
    """Log-probabilities token by token, from the cache, and those of the whole answers at once."""
    policy = policy_of(system)
    rules, prompts = rules_for(policy, min_new_tokens=2, temperature=0.7), prompts_from(samples, policy.tokenizers)
    with torch.no_grad():
        context = policy.encode(prompts).shared_by(4)
        ids, mask, _ = sample(policy, context, rules, chances(context.rows, rules, None, CPU))
        assert (mask.sum(1) >= 2).all() and ids.shape == mask.shape
        scores, state = policy.begin(context, ids.shape[1])
        sampled = torch.zeros(ids.shape)
        for t in range(ids.shape[1]):
            odds = policy_logits(scores, ids, torch.full((len(ids),), t), rules)
            sampled[:, t] = chosen_logprobs(odds, ids[:, t])[0]
            scores = state.step(ids[:, t])
        parts = [list(range(i, i + 3)) for i in range(0, 12, 3)]  # as the update goes through them
        read = ((part, context.of(part), context.of(part)) for part in parts)
        scored = score(ActorCritic(policy), policy, read, ids, mask, rules)
    torch.testing.assert_close(scored.logprobs[mask], sampled[mask], rtol=1e-5, atol=1e-5)
    assert torch.equal(scored.logprobs, scored.ref_logprobs)


def test_an_image_is_encoded_once_for_all_its_prompts(system, samples):
    """And all of them read the same entry, also where some of the prompts are taken out."""
    policy, shared = policy_of(system), system.options.preset == "caption" or system.options.connector == "tokens"
    about = enumerate((2, 0, 2, 5, 0, 2))
    asked = [dataclasses.replace(samples[2 * image], question=samples[i].question) for i, image in about]
    prompts, encoded, states = prompts_from(asked, policy.tokenizers), [], policy.model.image.states
    policy.model.image.states = lambda pixels: encoded.append(len(pixels)) or states(pixels)
    with torch.no_grad():
        together = policy.encode(prompts)
        assert encoded == [3] and together.prompts == 6
        chosen = [4, 0, 1]  # the first and the last ask about one image
        some = together.of(chosen)
        assert some.prompts == 3
        if shared:  # an image's keys are projected once
            assert [len(x.parts[0].states) for x in (together, some)] == [3, 2]
        for context, asking in ((together, prompts), (some, [prompts[i] for i in chosen])):
            ids = torch.randint(3, 40, (2 * len(asking), 4))
            ids[:, 0] = policy.start_id
            whole = policy.decode_hidden(ids, context.shared_by(2))
            for row, prompt in enumerate(asking):
                mine = slice(2 * row, 2 * row + 2)
                alone = policy.decode_hidden(ids[mine], policy.encode([prompt]).shared_by(2))
                torch.testing.assert_close(whole[mine], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("micro", [8, 3])
def test_an_iteration_moves_the_policy_alone(system, tmp_path, micro):
    """From a first ratio of exactly 1 where the same prompts come together. What it leaves opens as a run again."""
    options = RLHFOptions(
        preset="vqa",
        prompts=8,
        samples=2,
        micro_prompts=micro,
        max_new_tokens=6,
        iterations=4,
        critic_warmup=0,
        scale_reward=False,
        learning_rate=1e-3,
        warmup_steps=0,
    )
    task = system.policy(options, torch.float32)
    assert task.reference._pixels is task.policy._pixels, "every image is decoded once for both"
    actor = ActorCritic(task.policy)
    ppo = PPO(options, actor, task.reference, task.reward, task.train, task.rules, task.decode)
    before = copy.deepcopy(task.policy.model.state_dict())
    for _ in range(2):
        log = rlhf.iterate(ppo)
        assert log["ppo/policy/first_ratio_error"] <= (0 if micro == 8 else 1e-5)
    assert 0 < log["objective/kl_exact"] < 5
    moved = [name for name, value in task.policy.model.state_dict().items() if not torch.equal(value, before[name])]
    for part in ("image.", "connector.", "decoder."):  # with `patches` there is no image encoder
        assert any(name.startswith(part) for name in moved) == any(name.startswith(part) for name in before), part
    assert all(torch.equal(v, before[k]) for k, v in task.reference.model.state_dict().items())

    task.save(tmp_path)
    opened = systems.load(tmp_path)
    assert all(torch.equal(v, opened.model.state_dict()[k]) for k, v in task.policy.model.state_dict().items())
    asked = task.held_out[0].payload
    answers = [which.ask(asked.image_path, asked.question)[0] for which in (opened, system)]
    assert answers[0] == answers[1]


def test_reward_is_the_official_accuracy(runs, samples):
    system = systems.load(runs["tokens"])
    prompts = prompts_from([dataclasses.replace(one, answers=("red",) * 10) for one in samples], system.tokenizers)
    few = dataclasses.replace(samples[0], answers=("red",) * 2 + ("blue",) * 8)
    prompts[1] = dataclasses.replace(prompts[1], payload=few)
    seen = Samples(prompts[:3], [[1]] * 3, [" red", "red", "green"], [True] * 3)
    torch.testing.assert_close(official_accuracy(seen), torch.tensor([1.0, 0.6, 0.0]))


def test_greedy_accuracy_is_that_of_the_weights_it_is_given(runs, monkeypatch):
    """Of `evaluate`'s answers: here every third question of both splits is right by construction."""
    system = systems.load(runs["tokens"])
    data, expected = system.read(system.options), {}
    for name, split in (("greedy_accuracy", "test"), ("holdout_accuracy", "holdout")):
        said, asked = system.answer(data.samples[split]), data.samples[split]
        right = [number % 3 == 0 and bool(said[one.question_id].text) for number, one in enumerate(asked)]
        true = [said[one.question_id].text if hit else "no such answer" for one, hit in zip(asked, right, strict=True)]
        asked[:] = [dataclasses.replace(one, answers=(text,) * 10) for one, text in zip(asked, true, strict=True)]
        expected[name] = pytest.approx(sum(right) / len(right))
    monkeypatch.setattr(system, "read", lambda options: data)
    task = system.policy(RLHFOptions(preset="vqa", eval_prompts=10_000), torch.float32)
    assert task.figures(task.policy, None) == expected
    with torch.no_grad():
        task.policy.model.decoder.head.neg_()
    assert task.figures(task.policy, None) == {name: 0.0 for name in expected}
    assert task.figures(task.reference, None) == expected


def test_questions_without_answers_are_refused(runs, monkeypatch):
    system = systems.load(runs["tokens"])
    data = system.read(system.options)
    data.samples["test"][:] = [dataclasses.replace(one, answers=()) for one in data.samples["test"]]
    monkeypatch.setattr(system, "read", lambda options: data)
    with pytest.raises(UserError, match=r"question \d+ of the test split has no answers: the reward is the VQA acc"):
        system.policy(RLHFOptions(preset="vqa"), torch.float32)


def test_sampling_keeps_to_the_rules(system, samples):
    policy = policy_of(system)
    with torch.no_grad():
        context = policy.encode(prompts_from(samples, policy.tokenizers)).shared_by(16)
        rules = rules_for(policy, min_new_tokens=3)
        ids, mask, finished = sample(policy, context, rules, chances(context.rows, rules, None, CPU))
    assert (mask.sum(1) >= 3).all() and not (ids[mask] == policy.pad_id).any()
    assert torch.equal(((ids == policy.eos_id) & mask).any(1), finished)


# ---------------------------------------------------------------------------------------------------- the program


# An untrained run is always wrong, so no answer is better than the others to its question: the critic alone moves it.
MOVES = "--algorithm ppo --critic-warmup 0 --freeze nothing".split()


def flags(run: Path, out: Path, *more: str) -> list[str]:
    """The command line of one iteration on that run."""
    argv = f"--preset vqa --policy {run} --out {out} --prompts 4 --samples 2 --iterations 1 --eval-prompts 6"
    argv += " --no-scale-reward --frontier-prompts 2 --frontier-samples 2 --precision fp32 --device cpu"
    return [*argv.split(), *more]


@pytest.mark.parametrize("name", ["tokens", *NEW])
def test_a_run_reports_the_figures_that_answers_have(runs, tmp_path, capsys, name):
    summary = rlhf.run(flags(runs[name], tmp_path, *MOVES, "--warmup-steps", "0"))
    names = {name.removesuffix("_before") for name in summary if name.endswith("_before")}
    held = name != "caption"  # whose hold-out has captions alone
    figures = "reward reward_std finish distinct_2 length accuracy shortness greedy_accuracy".split()
    assert names == {*figures, *["holdout_accuracy"] * held}
    said = capsys.readouterr().out
    assert "overlap" not in said and "greedy answers to 6 new questions 0.000 -> 0.000" in said
    assert ("; hold-out 0.000 -> 0.000\n" in said) == held
    ask, study = (shlex.split(line) for line in said.splitlines()[-2:])
    assert ask[3:5] == ["ask", str(tmp_path / "policy")] and study[3] == "study" and "--question" in study
    assert "<h3>reference text</h3>" in (tmp_path / "samples.html").read_text()
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["ppo/policy/first_ratio_error"] == 0 and row["ppo/steps"] > 0
    then, now = (load_file(folder / "model.safetensors") for folder in (runs[name], tmp_path / "policy"))
    assert then.keys() == now.keys() and any(not torch.equal(then[k], now[k]) for k in then)
    assert systems.load(tmp_path / "policy").options == systems.load(runs[name]).options


PREFIXED = ["tokens", "prefix", "patches", "qformer"]


@pytest.mark.parametrize("name", PREFIXED)
def test_answers_too_long_for_the_decoder_are_refused(runs, tmp_path, name):
    """Before anything is sampled; and the number that the error names is the most that works."""
    argv = [*flags(runs[name], tmp_path / "run"), "--max-new-tokens"]
    positions = systems.load(runs[name]).model.decoder.max_positions
    with pytest.raises(UserError, match=f"max_new_tokens 200 is too much: the decoder has {positions} pos") as caught:
        rlhf.run([*argv, "200"])
    most = int(re.search(r"leaves (\d+) behind", str(caught.value))[1])
    with pytest.raises(UserError, match=f"max_new_tokens {most + 1} is too much"):
        rlhf.run([*argv, str(most + 1)])
    rlhf.run([*argv, str(most)])


@pytest.mark.parametrize("name", PREFIXED)
def test_an_answer_too_long_for_the_decoder_is_refused(runs, data, name):
    """The same for a question that is only asked; a connector's prefix takes positions too."""
    system, asked = systems.load(runs[name]), read_vqa(data, "train").samples[0]
    answer = partial(system.ask, asked.image_path, asked.question)
    with pytest.raises(UserError) as caught:
        answer(decoding={"max_new_tokens": 200})
    most = int(re.search(r"leaves (\d+) behind", str(caught.value))[1])
    with pytest.raises(UserError, match=f"max_new_tokens {most + 1} is too much"):
        answer(decoding={"max_new_tokens": most + 1})
    answer(decoding={"max_new_tokens": most})


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"program": "rlhf.py"}))
    for folder, message in ((tmp_path, "is a run of rlhf.py, not of train.py"), (tmp_path / "none", "no run folder")):
        with pytest.raises(UserError, match=message):
            rlhf.run(["--preset", "vqa", "--policy", str(folder), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("vilt", {}, "is a run of preset vilt, which cannot be tuned by feedback: it does not write its answers"),
        ("caption", {"question_share": 0.0}, "was trained to describe images alone; --question-share trains one that"),
    ],
)
def test_a_run_that_writes_no_answers_is_one_line(data, tmp_path, kind, changes, why):
    run = untrained_run(data, tmp_path / "run", kind, **changes)
    with pytest.raises(UserError) as caught:
        rlhf.run(flags(run, tmp_path / "out"))
    assert why in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ older checkpoints


def as_before_connectors(saved: dict, reference: torch.nn.Module, freeze: str) -> dict:
    """A checkpoint of a `tokens` policy as versions without connectors wrote it: what a connector has now were parts of
    the model itself, single tensors before all modules, and modules behind them. So weights stood in another order."""
    own, weights = "backbone.model.", reference.state_dict()
    single = [name for name in weights if name in ("connector.modality", "connector.places")]
    last = [name for name in weights if name.startswith("connector.") and name not in single]
    order = [*single, *(name for name in weights if not name.startswith("connector.")), *last]

    actor = saved["ppo"]["actor"]
    before = {own + name.removeprefix("connector."): actor[own + name] for name in order}
    before |= {name: x for name, x in actor.items() if not name.startswith(own)}
    groups, state = (saved["ppo"]["optimizer"][key] for key in ("param_groups", "state"))
    head, body = (group["params"] for group in groups)
    moves = [name for name in weights if freeze == "nothing" or name.startswith("decoder.")]
    now = dict(zip(moves, body, strict=True))
    then = zip([name for name in order if name in now], body, strict=True)
    moments = {i: state[i] for i in head} | {number: state[now[name]] for name, number in then}

    digest = hashlib.sha256()
    for name in order:
        digest.update(weights[name].numpy().tobytes())
    ppo = saved["ppo"] | {"actor": before, "optimizer": {"param_groups": groups, "state": moments}}
    return saved | {"ppo": ppo, "reference": digest.hexdigest()}


@pytest.mark.parametrize("freeze", ["nothing", "encoder"])
def test_a_run_from_before_there_were_connectors_goes_on(runs, tmp_path, monkeypatch, freeze):
    """To the same bits as one that was never stopped."""
    more = f"--iterations 4 --save-every 2 --algorithm ppo --critic-warmup 1 --learning-rate 0.001 --freeze {freeze}"
    whole, again = ([*flags(runs["tokens"], tmp_path / name), *more.split()] for name in ("whole", "again"))
    saved = []
    with monkeypatch.context() as patched:
        patched.setattr(rlhf, "save_checkpoint", lambda path, state: saved.append(copy.deepcopy(state)))
        rlhf.run(whole)
    middle, *_, end = saved
    assert (middle["ppo"]["iteration"], end["ppo"]["iteration"]) == (2, 4)

    last = tmp_path / "again" / "checkpoints" / "last.pt"
    last.parent.mkdir(parents=True)
    (tmp_path / "again" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    torch.save(as_before_connectors(middle, systems.load(runs["tokens"]).model, freeze), last)
    rlhf.run([*again, "--resume"])
    ours = torch.load(last, weights_only=True)["ppo"]
    assert all(torch.equal(x, ours["actor"][name]) for name, x in end["ppo"]["actor"].items())
    for number, moments in end["ppo"]["optimizer"]["state"].items():
        assert all(torch.equal(x, ours["optimizer"]["state"][number][key]) for key, x in moments.items())


def test_a_reference_with_other_weights_is_found_out_in_older_checkpoints_too(runs, tmp_path):
    argv = flags(runs["tokens"], tmp_path / "run", *MOVES)
    rlhf.run(argv)
    last, other = tmp_path / "run" / "checkpoints" / "last.pt", systems.load(runs["tokens"]).model
    with torch.no_grad():
        other.decoder.head[0, 0] += 1
    torch.save(as_before_connectors(torch.load(last, weights_only=True), other, "nothing"), last)
    with pytest.raises(UserError, match="begun against a reference with other weights"):
        rlhf.run([*argv, "--resume"])


def test_images_are_turned_as_in_training(runs, tmp_path):
    """One's own photos are, those of the official files are not."""
    system, path, exif = systems.load(runs["tokens"]), tmp_path / "photo.png", Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 0, 0), (0, 0, 64, 20))
    picture.save(path, exif=exif)
    policy = VQAPolicy(system.model, system.tokenizers, system.processor)
    for upright, shown in ((True, picture.rotate(-90)), (False, picture)):
        assert torch.equal(policy._read(path, upright), torch.from_numpy(system.processor.to_uint8(shown).copy()))
