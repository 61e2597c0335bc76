"""`rlhf.py` as a user meets it: what a run leaves, going on after a kill, and one clear line for bad input."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rlhf
from vqa_scratch.__main__ import PROGRAM
from vqa_scratch.commands.line import call
from vqa_scratch.errors import UserError
from vqa_scratch.models.t5 import T5
from vqa_scratch.rl import mini_news, tasks
from vqa_scratch.rl.options import PRESETS, RLHFOptions, read_command_line
from vqa_scratch.rl.policy import ActorCritic
from vqa_scratch.rl.resume import begin_or_go_on
from vqa_scratch.rl.trial import trial
from vqa_scratch.rl.types import Prompt
from vqa_scratch.storage import LOCK, hold
from vqa_scratch.systems import options as trained
from vqa_scratch.training import threads
from vqa_scratch.training.precision import Precision

ROOT = Path(__file__).parent.parent
MADE = "--sft-steps 4 --reward-steps 4".split()
TINY = "--prompts 4 --samples 2 --max-new-tokens 8 --eval-prompts 6 --eval-samples 2"
TINY += " --frontier-prompts 4 --frontier-samples 4 --precision fp32 --device cpu --iterations 6 --save-every 2"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def flags(out, cache, *more):
    return [*TINY.split(), *MADE, "--out", str(out), "--cache", str(cache), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A whole tiny run: (folder, summary)."""
    out = tmp_path_factory.mktemp("run") / "a"
    return out, rlhf.run(flags(out, cache))


def test_a_run_leaves_what_it_promises(finished):
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    promised = "reward_before reward_after reward_std_before grammar_before grammar_after neutral_before neutral_after"
    promised += " kl finish_before finish_after overlap_before overlap_after seconds rollouts_per_second frontier_share"
    promised += " facts_kept_before facts_kept_after who_kept_before who_kept_after"
    for key in promised.split():
        assert math.isfinite(summary[key]), key
    assert summary["kl"] >= 0 and summary["prompts_held_out"] == 6
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    names = "objective/kl objective/kl_exact objective/kl_coef objective/entropy ppo/mean_non_score_reward"
    names += " ppo/mean_scores ppo/std_scores objective/rlhf_reward ppo/policy/entropy ppo/policy/approxkl"
    names += " ppo/policy/policykl ppo/policy/clipfrac ppo/policy/ratio ppo/loss/policy ppo/loss/value ppo/loss/total"
    names += " ppo/returns/mean ppo/returns/var ppo/val/vpred ppo/val/error ppo/val/clipfrac ppo/val/var_explained"
    names += " tokens/queries_len_mean tokens/responses_len_mean env/reward_mean env/reward_std env/grammar env/neutral"
    names += " ppo/learning_rate time/ppo/total finish distinct_2 rollouts_per_second facts_kept"
    for name in names.split():
        assert all(math.isfinite(row[name]) for row in rows), name
    for picture in ("curves.png", "frontier.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert (out / "samples.html").read_text().count("<article>") == 6
    assert T5.from_pretrained(out / "policy").config.vocab_size > 100
    assert not [p for p in out.rglob("*.tmp")]


def test_the_last_line_looks_inside_a_finished_run(finished, tmp_path, capsys):
    """Its command runs as it stands, on a held-out article that the run has left in a file."""
    out = finished[0]
    title, line = rlhf.what_next_for(Prompt((out / "article.txt").read_text().strip()), RLHFOptions(out=out))
    asked = shlex.split(line)[3:]
    assert title == "next:" and asked[-1] == str(out / "study")
    call(PROGRAM, [*asked[:-1], str(tmp_path / "study")], "python -m vqa_scratch")
    assert (tmp_path / "study" / "report.html").is_file() and "certificate" in capsys.readouterr().out


def test_prompts_of_the_figures_are_never_trained_on(cache):
    options = read_command_line(flags("x", cache))
    task = tasks.summarising_task(options, torch.device("cpu"), torch.float32)
    assert not {p.text for p in task.train} & {p.text for p in task.held_out}


def test_artefacts_are_cached_by_what_made_them(finished, cache):
    folders = [p.name for p in cache.iterdir()]
    recipe = {"seed": 0, "sft_steps": 4, "reward_steps": 4}
    assert folders[0] == f"mini-news-{mini_news.recipe_hash(**recipe)}"
    assert mini_news.recipe_hash(**recipe | {"seed": 1}) != mini_news.recipe_hash(**recipe)
    before = (cache / folders[0] / "tone" / "model.safetensors").stat().st_mtime_ns
    mini_news.prepare(cache, **recipe)
    assert (cache / folders[0] / "tone" / "model.safetensors").stat().st_mtime_ns == before


def test_a_judge_of_facts_is_trained_for_those_who_ask(finished, cache, tmp_path, capsys):
    folder = next(cache.iterdir())
    shutil.rmtree(folder / "facts", ignore_errors=True)
    before = (folder / "tone" / "model.safetensors").stat().st_mtime_ns
    summary = rlhf.run(flags(tmp_path / "run", cache, "--iterations", "1", "--facts-weight", "0.5"))
    assert (folder / "facts" / "model.safetensors").is_file() and not [*folder.glob(".*")]
    assert (folder / "tone" / "model.safetensors").stat().st_mtime_ns == before
    (row,) = logged(tmp_path / "run")
    weighed = row["env/grammar"] + 0.5 * row["env/neutral"] + 0.5 * row["env/faithful"]
    assert row["env/reward_mean"] == pytest.approx(weighed, abs=1e-5) and "faithful_after" in summary
    assert "env/faithful" not in logged(finished[0])[0]
    kept = f"all facts kept by {summary['facts_kept_before']:.1%} -> {summary['facts_kept_after']:.1%}"
    assert kept in capsys.readouterr().out


def logged(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "time/" not in k and "per_second" not in k} for row in rows]


def tensors(out):
    return torch.load(out / "checkpoints" / "last.pt", weights_only=True)["ppo"]["actor"]


def test_killed_and_resumed_equals_uninterrupted(finished, cache, tmp_path):
    """SIGKILL lands somewhere; every line of the log and every weight come out as in the run that was left alone."""
    whole, _ = finished
    out = tmp_path / "killed"
    command = [sys.executable, "rlhf.py", *flags(out, cache)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    deadline = time.monotonic() + 600
    while not (out / "checkpoints" / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "checkpoints" / "last.pt").exists(), process.stdout.read().decode()
    rlhf.run(flags(out, cache, "--resume"))
    assert logged(out) == logged(whole)
    a, b = tensors(out), tensors(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_profiled_run_is_the_same_run(finished, cache, tmp_path, capsys):
    rlhf.run(flags(tmp_path / "run", cache, "--profile", "1"))
    assert f"profile of 1 steps: {tmp_path / 'run' / 'trace.json'}" in capsys.readouterr().out
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert len([event for event in trace if event.get("name") == "iterate" and event["ph"] == "X"]) == 1
    assert logged(tmp_path / "run") == logged(finished[0])


def test_more_iterations_of_a_finished_run(finished, cache, tmp_path, monkeypatch, capsys):
    """+3 to 6 is 9, undisturbed or killed on the way, bit for bit; asked for again on the way, it is refused. What else
    a killed start asked for holds for the next one too."""
    undisturbed, killed = (Path(shutil.copytree(finished[0], tmp_path / name)) for name in ("a", "b"))
    more = ["--resume", "--iterations", "+3"]
    refused("goes with --resume", "--out", str(tmp_path / "new"), "--iterations", "+3")
    refused("holds no run to go on with", "--out", str(tmp_path / "new"), *more)
    assert not (tmp_path / "new").exists()
    capsys.readouterr()
    summary = rlhf.run(["--out", str(undisturbed), *more])
    assert "9 iterations in all; the learning rate" in capsys.readouterr().out and summary["iterations"] == 9
    assert [row["step"] for row in logged(undisturbed)] == list(range(1, 10))

    def until(number):
        def iterate(ppo):
            if ppo.iteration == number:
                raise KeyboardInterrupt
            return whole(ppo)

        monkeypatch.setattr(rlhf, "iterate", iterate)

    whole = rlhf.iterate
    (tmp_path / "link").symlink_to(cache.absolute())
    linked = [*more, "--cache", str(tmp_path / "link")]
    for number, argv in ((7, linked), (7, []), (8, more), (8, ["--resume"])):  # with checkpoints after 8 and 9
        until(number)
        with pytest.raises(KeyboardInterrupt):
            rlhf.run(["--out", str(killed), *(argv or ["--resume"])])
    refused("is not finished: go on with --resume alone", "--out", str(killed), *more)
    until(None)
    rlhf.run(["--out", str(killed), "--resume"])
    assert json.loads((killed / "config.json").read_text())["cache"] == linked[-1]
    assert logged(killed) == logged(undisturbed)
    a, b = (tensors(x) for x in (killed, undisturbed))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
    refused(
        r"--iterations 9, not 6; a resumed run .*; --iterations \+N makes a finished one longer",
        *("--out", str(killed), "--resume", "--iterations", "6"),
    )


@pytest.mark.parametrize("moment", ["before anything is written", "before the first checkpoint"])
def test_killed_before_the_first_checkpoint(finished, cache, tmp_path, monkeypatch, moment):
    """The run begins again with its own options, as train.py's does, or with those given if it had written none."""
    whole, out = finished[0], tmp_path / "run"

    def killed(*args):
        raise KeyboardInterrupt

    def left(path, *args, **kwargs):
        return None if path.name == LOCK else unlink(path, *args, **kwargs)

    unlink = Path.unlink
    first = moment == "before anything is written"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(rlhf, "ActorCritic" if first else "iterate", killed)
        patched.setattr(Path, "unlink", left)  # a killed process leaves the file of its lock
        rlhf.run(flags(out, cache))
    assert (out / LOCK).exists() and (out / "config.json").exists() != first
    rlhf.run([*(flags(out, cache) if first else ["--out", str(out)]), "--resume"])
    assert logged(out) == logged(whole)


def test_one_process_in_a_folder(finished, cache, tmp_path):
    out, _ = finished
    with hold(out):
        refused("another process is writing into", *flags(out, cache, "--resume"))
    with hold(tmp_path):
        refused("another process is writing into", *flags(tmp_path, cache))


def test_a_run_keeps_to_its_prompts(finished, cache, tmp_path):
    out = Path(shutil.copytree(finished[0], tmp_path / "run"))
    last = out / "checkpoints" / "last.pt"
    saved = torch.load(last, weights_only=True)
    saved["prompts"]["held_out"]["samples"] = 7
    torch.save(saved, last)
    refused("was made with: held_out had 7 samples, now 6. A resumed run", *flags(out, cache, "--resume"))


def refused(message, *argv):
    with pytest.raises(UserError, match=message):
        rlhf.run(list(argv))


def test_what_the_options_can_tell_is_said_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    def train(*args, **options):
        raise AssertionError("trained")

    monkeypatch.setattr(mini_news, "prepare", train)
    with pytest.raises(AssertionError, match="trained"):
        rlhf.run(flags(tmp_path / "run", tmp_path, "--critic-warmup", "6"))
    assert "the policy does not learn: --critic-warmup 6 leaves it no iteration" in capsys.readouterr().out
    said = "has no class 'rude'; its classes are"
    refused(said, *flags(tmp_path / "run", tmp_path, "--tone-label", "rude"))
    refused(said, *flags(tmp_path / "run", tmp_path, "--grammar-label", "rude"))


def test_every_preset_has_a_folder_of_its_own():
    """So that a run of one is not in the way of another, of train.py's least of all: vqa reads one of those."""
    made = [read_command_line(["--preset", name]) for name in PRESETS]
    assert [str(options.out) for options in made] == [f"runs/rlhf-{name}" for name in PRESETS]
    of_train = {
        trained.read_command_line(["--preset", name, "--data", "x", "--resume"]).out for name in trained.PRESETS
    }
    assert len(of_train) == len(trained.PRESETS) and not of_train & {options.out for options in made}


def test_runs_are_not_mixed_up(finished, cache, tmp_path):
    out, _ = finished
    refused("already holds a run; add --resume to continue it, or give another --out", *flags(out, cache))
    refused(
        "was started with --kl-coef 0.4, not 0.5; a resumed run keeps the options it",
        *flags(out, cache, "--resume", "--kl-coef", "0.5"),
    )
    refused("holds no run to go on with; begin one without --resume", *flags(tmp_path / "none", cache, "--resume"))
    assert not (tmp_path / "none").exists()
    refused("already holds a run", *flags(out, tmp_path / "unused"))
    assert not (tmp_path / "unused").exists(), "said before the first two steps run"
    other = tmp_path / "train"
    (other / "checkpoints").mkdir(parents=True)
    torch.save({"state": {}}, other / "checkpoints" / "last.pt")
    shutil.copy(out / "config.json", other)
    refused("no checkpoint of rlhf.py", *flags(other, cache, "--resume"))
    (other / "config.json").write_text('{"program": "train.py"}')
    refused("is a run of train.py; give another --out", *flags(other, cache))
    broken = tmp_path / "broken" / "checkpoints"
    broken.mkdir(parents=True)
    shutil.copy(out / "config.json", broken.parent)
    (broken / "last.pt").write_bytes((out / "checkpoints" / "last.pt").read_bytes()[:1000])
    refused("not a whole torch file", *flags(broken.parent, cache, "--resume"))


def test_a_run_with_the_old_names_of_options_goes_on(finished, cache, tmp_path):
    """Of a config.json as the first release wrote it."""
    out = Path(shutil.copytree(finished[0], tmp_path / "run"))
    config = json.loads((out / "config.json").read_text())
    for old, new in (
        ("data_dir", "data"),
        ("checkpoint_every", "save_every"),
        ("no_repeat_ngram", "no_repeat_ngram_size"),
    ):
        config[old] = config.pop(new)
    config |= {"data_dir": "", "reference": "", "articles": "", "freeze": "none"}
    (out / "config.json").write_text(json.dumps(config))
    options, found = begin_or_go_on(read_command_line(flags(out, cache, "--resume", "--save-every", "3")))
    assert found["ppo"]["iteration"] == 6 and options.save_every == 3
    with pytest.raises(UserError, match="was started with --no-repeat-ngram-size 0, not 2; a resumed run keeps"):
        begin_or_go_on(read_command_line(flags(out, cache, "--resume", "--no-repeat-ngram-size", "2")))


def test_going_on_keeps_the_precision_and_tidies_up(cache, tmp_path, monkeypatch, capsys):
    """`auto` is timed, and may come out otherwise when the run goes on: the numbers must not."""
    out = tmp_path / "run"
    argv = flags(out, cache, "--precision", "auto", "--iterations", "2", "--threads", "1", "--critic-warmup", "2")
    seconds = {"fp32": 1.0, "bf16": 1.0}
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(threads, "timed", lambda work, precision: work(precision) or seconds[precision.kind])
    monkeypatch.setattr(rlhf, "formats", lambda name, device: ("fp32", "bf16") if name == "auto" else (name,))
    rlhf.run(argv)
    assert "precision fp32 on 1 thread: a part of a step takes 1.00 s, bf16" in capsys.readouterr().out
    seconds["bf16"] = 0.1
    left = out / "checkpoints" / ".last.pt.1.tmp"  # by a kill in the middle of a checkpoint
    left.write_bytes(b"half")
    summary = rlhf.run([*argv, "--resume"])
    said = capsys.readouterr().out
    assert "precision fp32 on 1 thread\n" in said and not left.exists()
    assert "the policy does not learn: --critic-warmup 2 leaves it no iteration" in said
    assert summary["reward_after"] == summary["reward_before"]


def test_a_trial_changes_nothing(cache):
    """And the models that are frozen are stored in the format that it has found."""
    options = read_command_line(flags("x", cache))
    task = tasks.summarising_task(options, torch.device("cpu"), torch.float32)
    actor = ActorCritic(task.policy)
    weights = {name: tensor.clone() for name, tensor in actor.state_dict().items()}
    state = torch.get_rng_state()
    work = trial(task, actor, options)
    for kind in ("fp32", "bf16"):
        work(Precision(kind, torch.device("cpu")))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in actor.state_dict().items())
    assert all(parameter.grad is None for parameter in actor.parameters())
    assert torch.equal(state, torch.get_rng_state())
    task.stored_in(torch.bfloat16)
    judges = [part.function.model for part in task.reward.parts if hasattr(part.function, "model")]
    for model in (task.reference, *judges):
        linear = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
        assert linear.weight.dtype == torch.bfloat16
    assert len(judges) == 2 and next(actor.parameters()).dtype == torch.float32


def test_one_response_and_articles_that_are_too_long(cache, tmp_path, capsys):
    few = ["--eval-prompts", "1", "--eval-samples", "1", "--frontier-prompts", "1", "--max-prompt-tokens", "9"]
    summary = rlhf.run(flags(tmp_path / "run", cache, "--iterations", "1", *few))
    assert summary["reward_std_before"] == 0.0 and "NaN" not in (tmp_path / "run" / "summary.json").read_text()
    said = capsys.readouterr().out
    assert "4001 of 4001 articles cut to 9 tokens" in said, "4000 to train on, and one for the figures"


def test_a_mac_computes_on_its_cpu(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf, "pick_device", lambda name: torch.device("mps"))
    seen = []

    def stop(options, device, dtype):
        seen.append(device.type)
        raise UserError("seen")

    monkeypatch.setitem(rlhf.TASKS, "mini-news", stop)
    refused("seen", *flags(tmp_path / "x", cache))
    assert seen == ["cpu"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--algorith", "ppo"], "no such flag.*--algorithm"),
        (["--algorithm", "rlo"], "did you mean 'rloo'"),
        (["--algorithm", "rloo", "--samples", "1"], "--samples must be at least 2"),
        (["--kl-coef", "-1"], "--kl-coef must be at least 0, not -1.0"),
        (["--facts-weight", "-1"], "--facts-weight must be at least 0, not -1.0"),
        (["--facts-weight", "1", "--preset", "book"], "--facts-weight means nothing with --preset book"),
        (["--facts-weight", "1", "--reward", "x.py:f"], "--facts-weight means nothing with --reward"),
        (["--prompts", "0"], "--prompts must be at least 1, not 0"),
        (["--sft-steps", "0"], "--sft-steps must be at least 1, not 0"),
        (["--kl-horizon", "-1"], "--kl-horizon must be above 0, not -1.0"),
        (["--grammar-weight", "nan"], "--grammar-weight must be a finite number, not nan"),
        (["--kl-coef", "inf"], "--kl-coef must be a finite number, not inf"),
        (["--dual-clip", "0.5"], "leaves bad tokens no gradient: give more than 1, or 0 for none"),
        (["--max-prompt-tokens", "1"], "--max-prompt-tokens must be at least 2, not 1"),
        (["--articles", "x.csv"], "--articles means nothing with --preset mini-news: it goes with --preset book"),
        (["--preset", "vqa", "--reference", "x"], "with --preset vqa: it goes with --preset mini-news, book or lm"),
        (["--preset", "vqa", "--freeze", "encoder", "--reference", "x"], "it goes with --preset mini-news, book or lm"),
        (["--preset", "book", "--sft-steps", "7"], "--sft-steps means nothing with --preset book"),
        (["--prompts", "6", "--minibatches", "4"], "do not divide"),
        (["--min-new-tokens", "99"], "exceeds --max-new-tokens"),
        (["--lam", "1.5"], "--lam must be at least 0 and at most 1, not 1.5"),
        (["--freeze", "encoder", "--reference", "x"], "leave out --reference"),
        (["--preset", "book"], "needs --articles"),
        (["--preset", "book", "--policy", "/no/such/folder"], "needs --articles|no folder"),
    ],
)
def test_bad_flags_are_one_clear_line(argv, message, tmp_path):
    refused(message, "--out", str(tmp_path / "x"), *argv)


def test_errors_reach_the_user_as_one_line_and_code_2(tmp_path):
    process = subprocess.run(
        [sys.executable, "rlhf.py", "--preset", "book", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert [line for line in process.stderr.splitlines() if line] == [
        "error: --preset book needs --articles, a CSV, JSONL or text file"
    ]


@pytest.fixture(scope="module")
def book(finished, cache, tmp_path_factory):
    """Flags of the book preset on local folders: the tiny models of mini-news stand in for the real ones."""
    folder = mini_news.prepare(cache, seed=0, sft_steps=4, reward_steps=4)
    data = tmp_path_factory.mktemp("data") / "news.csv"
    rows = [
        f"The council in Alden will close the harbour {i}." + " The mayor of Zeal will sell it." * 9 for i in range(14)
    ]
    data.write_text("text\n" + "\n".join(rows) + '\n" "\n')
    argv = f"--preset book --policy {folder}/summariser --grammar-model {folder}/grammar --tone-model {folder}/tone"
    argv += f" --grammar-label acceptable --tone-label neutral --articles {data} {TINY} --max-prompt-tokens 32"
    return argv.split(), data, folder


def test_book_runs_from_local_folders_and_counts_what_it_cuts(book, tmp_path, capsys):
    summary = rlhf.run([*book[0], "--out", str(tmp_path), "--freeze", "encoder", "--iterations", "2"])
    assert summary["kl"] >= 0 and "overlap_before" not in summary  # no reference summaries given
    said = capsys.readouterr().out
    unknown = [
        said,
        json.dumps(summary),
        (tmp_path / "metrics.jsonl").read_text(),
        (tmp_path / "samples.html").read_text(),
    ]
    assert not any("facts" in text for text in unknown), "of articles whose facts nobody knows"
    assert "14 of 14 articles cut to 32 tokens" in said
    assert f"1 empty articles left out, the first at {book[1]}, line 16" in said


def test_book_names_what_is_wrong_with_its_input(book, tmp_path):
    argv, data, folder = book
    out = ["--out", str(tmp_path)]
    refused("no class 'LABEL_1'; its classes are negative, neutral, positive", *argv, *out, "--tone-label", "LABEL_1")
    refused("no column 'body'; the columns are text", *argv, *out, "--column", "body")
    refused("14 articles are too few", *argv, *out, "--prompts", "12")
    refused("none.csv not found", *argv, *out, "--articles", str(tmp_path / "none.csv"))
    refused("a classifier is one of bert, distilbert, roberta", *argv, *out, "--tone-model", f"{folder}/summariser")
    refused("not a t5", *argv, *out, "--policy", f"{folder}/tone")


def test_an_own_reward_takes_the_place_of_the_judges(book, tmp_path, capsys):
    """A Python function, and a class of a classifier's folder."""
    argv, data, folder = book
    base = f"--preset book --policy {folder}/summariser --articles {data} {TINY} --iterations 1".split()
    code = tmp_path / "mine.py"
    code.write_text("def words(samples):\n    return [-len(text.split()) for text in samples.texts]\nnumber = 3\n")
    summary = rlhf.run([*base, "--out", str(tmp_path / "a"), "--reward", f"{code}:words"])
    row = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[0])
    assert summary["reward_before"] < 0 and row["env/words"] == pytest.approx(row["env/reward_mean"])
    label = ["--reward", f"{folder}/tone", "--reward-label", "neutral"]
    rlhf.run([*base, "--out", str(tmp_path / "b"), *label])
    out = ["--out", str(tmp_path / "c")]
    refused("has no function 'number'", *base, *out, "--reward", f"{code}:number")
    refused("there is no file", *base, *out, "--reward", "none.py:words")
    refused("name one with --reward-label", *base, *out, "--reward", f"{folder}/tone")
    refused("--reward-label names a class", *base, *out, "--reward-label", "neutral")
    refused("--tone-label", *base, *out, *label, "--tone-label", "neutral")


def test_what_is_cheap_to_check_is_checked_first(book, tmp_path):
    """A wrong path or a folder that takes no files is told before models are looked for, and before any are trained."""
    argv, data, _ = book
    nowhere = [*argv, "--policy", "/no/such/folder", "--out", str(tmp_path / "run")]
    wrong = ((tmp_path / "none.csv", "none.csv not found"), (tmp_path, "articles come from"), (data, "no folder"))
    for articles, message in wrong:
        refused(message, *nowhere, "--articles", str(articles))
    refused("14 articles are too few", *nowhere, "--prompts", "12")

    taken = tmp_path / "file"
    taken.write_text("")
    for out, cache, *more in (
        (taken / "run", tmp_path / "cache"),
        (tmp_path / "run", taken / "cache"),
        (tmp_path / "run", tmp_path / "cache", "--reference", "/no/such/folder"),
    ):
        refused("cannot write into the folder|no folder", *flags(out, cache, *more))
        assert sorted(tmp_path.iterdir()) == [taken], "nothing was trained"


def test_reference_of_another_vocabulary_is_refused(book, tmp_path):
    import dataclasses

    argv, _, folder = book
    model = T5.from_pretrained(folder / "summariser")
    T5(dataclasses.replace(model.config, vocab_size=99)).save_pretrained(tmp_path / "other")
    refused(
        "the reference has vocab_size 99, the policy",
        *argv,
        "--out",
        str(tmp_path),
        "--reference",
        str(tmp_path / "other"),
    )


def test_random_weights_serve_to_measure_speed(tmp_path, monkeypatch):
    """`--init random` with the sizes shrunk: the path is that of the book's sizes."""
    small = {"dim": 16, "heads": 2, "layers": 1, "hidden": 16}
    t5, bert = tasks.T5Config, tasks.BertConfig
    monkeypatch.setattr(
        tasks, "T5Config", lambda: t5(dim=16, head_dim=8, hidden=16, encoder_layers=1, decoder_layers=1, heads=2)
    )
    monkeypatch.setattr(tasks, "BertConfig", lambda **sizes: bert(**sizes | small))
    argv = f"--preset book --init random {TINY} --iterations 1 --prompts 2 --eval-prompts 4 --out {tmp_path}"
    assert rlhf.run(argv.split())["reward_before"] is not None
