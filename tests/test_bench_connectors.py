"""The table of connectors: its rows are those there are, its figures those of the runs, and a finished run is kept."""

import random
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vqa_helpers import SPEC, small_options, small_system

from bench import __main__ as program
from bench import connector_runs, connector_speed, connectors, connectors_frozen, language_model, timing
from bench.connector_runs import Job, Plan, Row, Run
from vqa_scratch.commands.line import call
from vqa_scratch.connectors import CONNECTORS
from vqa_scratch.data.text import Tokenizer, train_bpe
from vqa_scratch.errors import UserError
from vqa_scratch.models import released
from vqa_scratch.report.curves import draw_panels
from vqa_scratch.storage import write_json
from vqa_scratch.systems.answering import How
from vqa_scratch.systems.options import read_command_line
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.systems.vqa_models import reads_question


def a_run(accuracy: float, *, seen: int = 1024, holdout: float | None = 0.5, **families: float) -> Run:
    """What a run gave, by hand."""
    summary = {
        "accuracy": accuracy,
        "accuracy_by_family": families or {"color": accuracy, "count": accuracy / 2},
        "holdout_accuracy": holdout,
        "baselines": {"shuffled_images": 0.25},
        "questions_seen": seen,
        "precision": "fp32",
    }
    curve = [(512, accuracy / 4), (seen, accuracy)]
    return Run(summary, curve, {"ratio": 10 * accuracy}, parameters=1_234_567, joining=56_789)


TOKENS, PREFIX = Row("tokens"), Row("prefix")
RUNS = {
    TOKENS: {0: a_run(0.75), 1: a_run(0.5), 2: a_run(0.625)},
    PREFIX: {0: a_run(0.25), 1: a_run(0.625), 2: a_run(0.5, holdout=None)},
}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


# ------------------------------------------------------------------------------------------------ rows and runs


def test_every_connector_has_a_row():
    rows = connector_runs.all_rows()
    assert [row.connector for row in rows if not row.text_encoder] == list(CONNECTORS)
    assert [row.name for row in rows if row.text_encoder] == ["tokens, text encoder"]
    assert len({row.folder for row in rows}) == len(rows)


@pytest.mark.parametrize("row", connector_runs.all_rows(), ids=lambda row: row.folder)
def test_the_text_side_is_equal_in_every_row(row):
    """The flags are those of a run that can be, whose decoder reads the question, and no text encoder but in one."""
    options = read_command_line(["--preset=shapes", *row.flags])
    VQASystem.check(options)
    assert options.question_prompt and options.connector == row.connector
    assert reads_question(options) == row.text_encoder


def test_rows_and_seeds_are_chosen():
    rows = connector_runs.all_rows()
    assert connector_runs.chosen_rows(None, rows) == rows
    assert connector_runs.chosen_rows("prefix, tokens", rows) == [TOKENS, Row("tokens", True), PREFIX]
    with pytest.raises(UserError, match="^--only glue: there is no such row; there are tokens, mean, prefix"):
        connector_runs.chosen_rows("tokens,glue", rows)
    assert connector_runs.read_seeds("4, 2") == (4, 2)
    for text in ("", "1,1", "one", "-1"):
        with pytest.raises(UserError, match="^--seeds are different numbers with commas between them"):
            connector_runs.read_seeds(text)


def test_what_goes_with_frozen():
    with pytest.raises(UserError, match="^--tower-steps goes with --frozen"):
        call(program.PROGRAM, ["connectors", "--tower-steps", "3"], "python -m bench")


def test_a_finished_run_is_kept_and_a_stopped_one_goes_on(tmp_path, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        assert options["env"]["OMP_NUM_THREADS"] == "3"
        write_json(job.folder / "summary.json", {})
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    job = Job(tmp_path / "prefix" / "seed0", ["--connector=prefix"])
    connector_runs.train(job, 3)
    connector_runs.train(job, 3)
    assert len(commands) == 1 and "--resume" not in commands[0]
    assert {"--connector=prefix", f"--out={job.folder}"} <= set(commands[0])
    (job.folder / "summary.json").unlink()
    write_json(job.folder / "config.json", {})
    connector_runs.train(job, 3)
    assert commands[1][-1] == "--resume"


def test_a_run_that_fails_says_why(tmp_path):
    """And those after it are not begun."""
    jobs = [Job(tmp_path / name, ["--preset=shapes", "--connector=glue"]) for name in ("seed0", "seed1", "seed2")]
    with pytest.raises(UserError, match="seed0 is not finished; .*seed0.log ends with: .*glue"):
        connector_runs.train_all(jobs, 1)
    assert not (tmp_path / "seed2.log").exists()


def test_runs_of_other_lengths_lie_elsewhere(tmp_path, monkeypatch):
    """So that none is taken for another; all of one seed read the same data."""
    monkeypatch.setattr(Plan, "data", lambda plan, seed: tmp_path / f"data{seed}")
    folders = set()
    for steps, images in ((10, None), (20, None), (20, 5)):
        plan = Plan(steps, (0, 1), test_images=images, out=tmp_path, precision="fp32")
        jobs = connector_runs.jobs_of(plan, [TOKENS, PREFIX])
        folders |= {job.folder for job in jobs.values()}
        for (_, seed), job in jobs.items():
            assert {f"--steps={steps}", f"--seed={seed}", f"--data={tmp_path / f'data{seed}'}"} <= set(job.flags)
    assert len(folders) == 12


def test_runs_that_saw_different_questions_are_not_compared():
    connector_runs.check_alike(RUNS)
    other = {TOKENS: {0: a_run(0.5)}, PREFIX: {0: a_run(0.5, seen=2048)}}
    with pytest.raises(UserError, match="of seed 0 saw different questions: 1,024 in fp32 and 2,048 in fp32"):
        connector_runs.check_alike(other)


# ------------------------------------------------------------------------------------------------ tables


def test_the_table_has_medians_and_ranges():
    head, _, tokens, prefix = cells(connectors.learned(RUNS))
    by_name = dict(zip(head, tokens, strict=True))
    assert by_name["connector"] == "`tokens`" and by_name["accuracy"] == "0.625 (0.500 to 0.750)"
    assert by_name["pointing"] == "6.25 (5.00 to 7.50)" and by_name["images shuffled"] == "0.250 (0.250 to 0.250)"
    assert by_name["color"] == "0.625" and by_name["count"] == "0.312"  # families have their median alone
    assert (by_name["parameters"], by_name["joining"]) == ("1.23 M", "0.06 M")
    assert dict(zip(head, prefix, strict=True))["hold-out"] == "0.500 (0.500 to 0.500)"
    one = cells(connectors.learned({TOKENS: {0: a_run(0.75, holdout=None, shape=0.1, odd=0.2)}}))
    assert one[2][1:3] == ["0.750", "none"] and one[0][5:7] == ["shape", "odd"]


def test_where_seeds_disagree_is_said():
    """Prefix is ahead on seed 1 alone."""
    (line,) = connectors.disagreements(RUNS)
    assert line == ("tokens is ahead of prefix on seed 0 and 2 (by up to 0.500), behind on seed 1 (by up to 0.125)")
    assert not connectors.disagreements({TOKENS: RUNS[TOKENS], PREFIX: dict.fromkeys(range(3), a_run(0.5))})


def test_the_picture_has_medians_and_bands(tmp_path):
    panel = connectors.curves(RUNS, "a title")
    assert panel["lines"]["tokens"] == ([0.512, 1.024], [0.625 / 4, 0.625])
    assert panel["bands"]["tokens"] == ([0.512, 1.024], [0.125, 0.5], [0.1875, 0.75])
    draw_panels(tmp_path / "with.png", [panel])
    draw_panels(tmp_path / "without.png", [panel | {"bands": {}}])
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_a_table_of_fewer_seeds_or_rows_is_provisional():
    assert connectors.provisional(Plan(1), True) == ""
    assert connectors.provisional(Plan(1, (0,)), False) == "**Provisional**: 1 of 3 seeds and not all rows. "


def test_findings_are_held_against_the_runs():
    """Cross-attention ahead while frozen and behind when all trains is what finding 2 says; finding 4 wants both."""
    low, high = {0: a_run(0.25), 1: a_run(0.5)}, {0: a_run(0.5), 1: a_run(0.625)}
    runs = {"frozen": {TOKENS: high, PREFIX: low}, "trained": {TOKENS: low, PREFIX: high}}
    (line,) = connectors_frozen.findings(runs)
    assert line == (
        "Finding 2, `tokens` minus `prefix`: frozen +0.188 (+0.125 to +0.250), trained -0.188 (-0.250 to -0.125). "
        "It holds on 2 of 2 seeds"
    )
    queries = {state: {Row("qformer"): of[TOKENS], PREFIX: of[PREFIX]} for state, of in runs.items()}
    (line,) = connectors_frozen.findings(queries)
    assert line.startswith("Finding 4, `qformer` minus `prefix`") and line.endswith("It holds on 0 of 2 seeds")


# ------------------------------------------------------------------------------------------------ costs


@pytest.mark.parametrize("kind", ["tokens", "prefix"])
def test_cache_bytes_in_closed_form(data, tmp_path, kind):
    """Keys and values of the image and the prompt: those of a memory, 64 places and a class token, once an image, those
    of a prefix, which are the places, once a row."""
    choices = {"connector": kind, "question_prompt": True, "text_encoder": False}
    system = small_system(small_options(data, tmp_path / "run", **choices))
    split, line = system.splits["val"], 2 * 32 * 4  # bytes of a token's key and value, in one layer of width 32
    for each in (1, 5):
        rows = np.array(split.questions.of_image[0][:each])
        batch, prompt = split.questions.batch(rows, split.images), int(split.questions.prompts.lengths[rows].max())
        with connector_speed.caches_of(system.model.decoder) as caches, system.evaluating():
            system.respond(split.questions, rows, batch, How())
        (cache,) = caches
        tokens = 65 if kind == "tokens" else 64 * each
        assert connector_speed.bytes_held(cache) == line * (tokens + prompt * each)
    assert "new_cache" not in vars(system.model.decoder)


def test_the_table_of_costs():
    spreads = {1: timing.Spread.of([100.0]), 8: timing.Spread.of([200.0, 300.0, 400.0])}
    cost = connector_speed.Cost(spreads, spreads, {1: 2048.0, 8: 512.0}, 0)
    costs = {"a": cost, "b": cost._replace(differing=2)}
    text = connector_speed.table(costs)
    row = ["a", "100 (100 to 100)", "300 (250 to 350)", "100.00 (100.00 to 100.00)", "300.00 (250.00 to 350.00)"]
    assert cells(text)[2] == [*row, "2.0", "0.5"]
    assert text.endswith("- Asked beside others, rounding changes 2 of 8 answers of b.")


def test_too_few_questions_to_time(data):
    samples = connector_speed.read_vqa(data, "val").samples
    assert len(connector_speed.by_image(samples, 5)) == 40
    with pytest.raises(UserError, match="5 images have 8 questions, 7 are needed"):
        connector_speed.by_image(samples, 7)


# ------------------------------------------------------------------------------------------------ towers


def test_a_language_model_learns_and_opens_as_a_decoder(data, tmp_path, monkeypatch):
    """It knows unseen texts better than chance; with cross-attention it has new layers, and reads words as before."""
    monkeypatch.setattr(language_model, "ROWS", 8)
    sizes = {"width": 32, "heads": 2, "layers": 1}
    figures = language_model.train_language_model(tmp_path, data, 40, 0, "fp32", **sizes)
    assert set(figures) == {"described", "blind"} and max(figures.values()) <= 1
    words, rng = Tokenizer.from_pretrained(tmp_path), random.Random(0)
    rows = [language_model.ids_of(scene, words, rng) for scene in language_model.read(data, "val", 0).values()]
    ids = torch.tensor(rows)
    plain, crossed = (released.decoder(tmp_path, cross_attention=cross) for cross in (False, True))
    with torch.no_grad():
        logits = plain(ids[:, :-1].clamp(min=0))
        assert torch.equal(logits, crossed(ids[:, :-1].clamp(min=0)))
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())  # of 6.2 by chance
    assert nats < 4.5 and plain.config.max_positions == language_model.ROOM


def test_the_answer_comes_after_the_question(data):
    """A row is a description or none, then questions, each with BOS, answer and EOS, cut to one length."""
    scenes, rng = language_model.read(data, "val", 0), random.Random(0)
    words = train_bpe([f" {s.question} {s.answer}" for _, some in scenes.values() for s in some], 400)
    scene = next(iter(scenes.values()))
    texts = [words.decode([i for i in language_model.ids_of(scene, words, rng) if i >= 0], skip_special_tokens=False)
             for _ in range(20)]  # fmt: skip
    first = {text.split("?")[0].strip() + "?" for text in texts}
    asked = {sample.question for sample in scene[1]}
    assert first & asked and first - asked, "some begin with a question, others with a description"
    pairs = {f"{sample.question}<s> {sample.answer}</s>" for sample in scene[1]}
    assert all(sum(pair in text for pair in pairs) >= 3 for text in texts)
    assert len(language_model.ids_of(scene, words, rng)) == language_model.LENGTH + 1


# ------------------------------------------------------------------------------------------------ all of it


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_the_whole_table_at_small_sizes(tmp_path, monkeypatch, capsys, frozen):
    """Every row trained, measured and drawn; asked again, nothing is trained."""
    monkeypatch.setattr(connector_speed, "QUESTIONS", 16)
    monkeypatch.setattr(connector_speed, "ASKED", 2)
    monkeypatch.setattr(language_model, "ROWS", 8)
    more = ("--questions-per-step=32", "--eval-questions=40", "--samples=2")
    more += () if frozen else ("--width=32", "--heads=2", "--decoder-layers=1")
    tower = ("--width=32", "--heads=2", "--image-layers=1", "--text-layers=1", "--projection=8")
    tower += ("--pairs-per-step=8", "--eval-images=4")
    where = {"out": tmp_path / "runs", "cache": tmp_path / "cache", "spec": SPEC}
    plan = Plan(2, (0,), precision="fp32", rounds=1, pointed=2, more=more, tower=tower, **where)
    sizes = {"width": 32, "heads": 2, "layers": 1}
    make = (lambda: connectors_frozen.run(plan, 2, "it", sizes)) if frozen else (lambda: connectors.run(plan, "it"))
    text, panels = make()
    rows = connector_runs.all_rows()
    able = [row for row in rows if not frozen or not (row.text_encoder or connectors_frozen.reads_pixels(row))]
    found = [line.split("|")[1].split(",")[0].strip() for line in text.splitlines() if line.startswith("| `")]
    assert found == [f"`{row.connector}`" for row in able]
    assert len(panels) == 1 + frozen and text.count("**Provisional**") == 1
    assert "training" in capsys.readouterr().err
    assert make()[0].splitlines()[0] == text.splitlines()[0]
    assert "training" not in capsys.readouterr().err
