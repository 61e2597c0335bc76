"""The time to accuracy: the peer learns and answers, a stopped run goes on, and the figures are closed forms."""

from dataclasses import replace

import pytest
import torch
from vqa_helpers import SIZES, SPEC, small_options

from bench import __main__ as program
from bench import time_to_accuracy
from bench.peer_training import PeerRun
from bench.time_to_accuracy import ADAMW, OURS, PEER, Entry, Race, curve_of, reached, read_sides
from vqa_scratch.commands.line import call
from vqa_scratch.errors import UserError
from vqa_scratch.storage import read_json
from vqa_scratch.systems.options import read_command_line


def test_seconds_are_those_of_steps():
    """10 samples at 5 a second, 20 at 10, then an evaluation, which takes no time, and one between two rows."""
    rows = [
        {"samples": 10, "samples_per_second": 5.0, "loss": 1.0},
        {"samples": 30, "samples_per_second": 10.0, "loss": 1.0},
        {"samples": 30, "val": {"accuracy": 0.4}},
        {"samples": 50, "samples_per_second": 20.0, "loss": 1.0},
        {"samples": 60, "val": {"accuracy": 0.8}},
    ]
    assert curve_of(rows) == [(4.0, 30, 0.4), (5.5, 60, 0.8)]


def test_a_goal_is_reached_between_two_evaluations():
    curve = [(10.0, 100, 0.4), (20.0, 200, 0.8), (30.0, 300, 0.7), (40.0, 400, 0.9)]
    assert reached(curve, 0.2) == (5.0, 50) and reached(curve, 0.8) == (20.0, 200)
    assert reached(curve, 0.85) == pytest.approx((37.5, 375)) and reached(curve, 0.95) is None


def test_the_table_says_how_much_sooner():
    fast, slow = [(100.0, 1000, 0.9), (200.0, 2000, 0.96)], [(1000.0, 1000, 0.9), (4000.0, 2000, 0.96)]
    found = {OURS: (None, {0: fast, 1: fast}), ADAMW: (1e-3, {0: slow, 1: fast}), PEER: (3e-3, {0: slow, 1: slow})}
    sides, ratios = time_to_accuracy.tables(found).split("\n\n")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in sides.splitlines()[2:]]
    assert [row[:2] for row in cells] == [
        ["ours, Muon", "default"],
        ["ours, AdamW", "0.001"],
        ["`transformers`, AdamW", "0.003"],
    ]
    assert cells[2][3:6] == ["1000 (1000 to 1000)", "3500 (3500 to 3500)", "not reached"]
    assert cells[1][3] == "550 (100 to 1000)" and cells[0][-2:] == ["0.960 (0.960 to 0.960)", "10 (10 to 10)"]
    peer, adamw = ([cell.strip() for cell in line.split("|")[1:-1]] for line in ratios.splitlines()[2:])
    assert peer[1:] == ["10.00x", "10.00x", "10x", "19.09x", "not reached"] and adamw[2:4] == ["5.50x", "4x"]
    by_seconds, by_questions = time_to_accuracy.panels(found)
    assert by_seconds["lines"]["ours, AdamW"] == ([550.0, 2100.0], [0.9, 0.96])
    assert by_questions["bands"]["ours, Muon"] == ([1.0, 2.0], [0.9, 0.96], [0.9, 0.96])
    assert time_to_accuracy.tables({PEER: found[PEER]}).count("\n\n") == 0, "without ours there is no ratio"


def test_sides_and_lengths_that_cannot_be():
    assert read_sides("peer, ours,peer") == (PEER, OURS)
    with pytest.raises(UserError, match="^--sides muon: there is no such side; there are ours, adamw, peer$"):
        read_sides("ours,muon")
    with pytest.raises(UserError, match="^give --steps or --minutes, not both$"):
        call(program.PROGRAM, ["time-to-accuracy", "--steps", "3", "--minutes", "1"], "python -m bench")


@pytest.mark.parametrize("length", [{"steps": 48}, {"steps": 1, "minutes": 0.5}])
def test_runs_have_the_flags_of_train_py(tmp_path, monkeypatch, length):
    """The same for all sides but the optimizer, and the peer's text encoder; runs of another length lie elsewhere."""
    monkeypatch.setattr(Race, "data", lambda race, seed: tmp_path / f"data{seed}")
    race = Race(**length, out=tmp_path, precision="fp32")
    found = {}
    for entry in (Entry(OURS, None, 1), Entry(ADAMW, 1e-3, 1), Entry(PEER, 1e-3, 1)):
        job = entry.job(race)
        assert job.folder == tmp_path / race.name / (OURS if entry.rate is None else f"{entry.side}-0.001") / "seed1"
        found[entry.side] = read_command_line(job.flags)
    read_by = {"text_encoder": True, "question_loss": False}
    assert found[PEER] == replace(found[ADAMW], **read_by)
    assert (found[ADAMW].optimizer, found[ADAMW].learning_rate) == ("adamw", 1e-3)
    assert found[OURS].optimizer == "muon" and found[OURS].question_prompt and found[OURS].seed == 1
    assert (found[OURS].steps, found[OURS].minutes) == (None if "minutes" in length else 48, length.get("minutes"))
    assert found[OURS].eval_every == found[OURS].log_every == (50 if "minutes" in length else 2)


def peer(data, folder, **changes) -> PeerRun:
    values = {"steps": 4, "eval_every": 2, "question_prompt": True, "warmup_steps": 0}
    return PeerRun(folder, small_options(data, folder / "run", **values | changes), 3e-3, "fp32")


def test_the_peer_goes_on_where_it_stopped(data, tmp_path):
    """To the weights and the curve of a run that was left alone; a loss falls on the way."""
    whole, part = peer(data, tmp_path / "whole"), peer(data, tmp_path / "part")
    batch = whole.system.batch(whole.system.epoch(0)[0])
    before = float(whole.model(*whole.inputs(batch), batch.decoder_input_ids, batch.labels).detach())
    curve = whole.train()
    assert [questions for _, questions, _ in curve] == [curve[0][1], curve[1][1]] and len(curve) == 2
    assert float(whole.model(*whole.inputs(batch), batch.decoder_input_ids, batch.labels).detach()) < before
    step = part.take_step

    def stopping(batch):
        if part.step == 3:
            raise KeyboardInterrupt
        return step(batch)

    part.take_step = stopping
    with pytest.raises(KeyboardInterrupt):
        part.train()
    again = peer(data, tmp_path / "part")
    assert again.step == 2 and [point[1:] for point in again.train()] == [point[1:] for point in curve]
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@torch.no_grad()
def test_the_peer_answers_as_without_padding(data, tmp_path):
    """A batch of prompts of several lengths, against one question at a time, token by token."""
    run = peer(data, tmp_path, steps=1)
    for parameter in run.model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    run.model.eval()
    split, words = run.system.splits["val"], run.system.tokenizers
    rows = split.questions.in_order(8, 8)[0]
    states, mask = run.model.memory(*run.inputs(split.questions.batch(rows, split.images)))
    answers = run.greedy(*split.questions.prompt_batch(rows), states, mask)
    for row, answer in zip(rows, answers, strict=True):
        batch = split.questions.batch(rows[rows == row], split.images)
        pixels, ids, real = run.inputs(batch)
        read = [*words.prompt(split.questions.samples[row].question), words.start_id]
        begins = len(read)
        while len(read) - begins < words.max_answer_tokens and (len(read) == begins or read[-1] != words.end_id):
            alone, seen = run.model.memory(pixels, ids, real)
            out = run.model.decoder(torch.tensor([read]), encoder_hidden_states=alone, encoder_attention_mask=seen)
            read.append(int(out.logits[0, -1].argmax()))
        wanted = [token for token in read[begins:] if token != words.end_id]
        assert answer == words.decoder.decode(wanted).strip()
    assert len(set(answers)) > 1 and 0 <= run.accuracy() <= 1


@pytest.mark.slow
def test_the_whole_table_at_small_sizes(tmp_path, capsys):
    """Each run is kept in a file, and the same command again runs nothing."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("log_every", "samples", "precision")}
    more = tuple(f"--{name.replace('_', '-')}={value}" for name, value in sizes.items())
    where = {"out": tmp_path / "runs", "cache": tmp_path / "cache", "spec": SPEC}
    race = Race(2, (0,), precision="fp32", more=more, **where)
    text = time_to_accuracy.run(race, "it", write=False)
    assert all(title in text for title in time_to_accuracy.TITLES.values()) and text.count("**Provisional**") == 1
    assert capsys.readouterr().err.count("training") == 1 + 3 + 3 and (tmp_path / "runs").rglob("*.png")
    kept = sorted((tmp_path / "runs").rglob("seed0.json"))
    assert len(kept) == 7 and all(read_json(file)[-1][1] > 0 for file in kept)
    assert time_to_accuracy.run(race, "it", write=False).splitlines()[4:9] == text.splitlines()[4:9]
    assert "training" not in capsys.readouterr().err
