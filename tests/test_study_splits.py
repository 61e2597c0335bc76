"""`study` over a split: figures and files, against answers, boxes and weights taken from the run and data by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_helpers import by_hand, command, make_run

from vqa_scratch import systems
from vqa_scratch.data.descriptions import read_drawn, scenes_file
from vqa_scratch.data.vqa_v2 import read_vqa
from vqa_scratch.systems.scoring import score


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    return make_run(data, tmp_path_factory.mktemp("splits") / "run", question_prompt=True)


def figures(run: Path, out: Path, *flags: object) -> dict:
    command("study", run, "--out", out, *flags)
    return json.loads((out / "figures.json").read_text())


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return image.format == "PNG" and image.width > 200


def test_pointing(run, data, tmp_path, capsys):
    """Over the questions that name one object; the areas are those of the boxes in the scenes file."""
    found = figures(run, tmp_path, "--pointing", data, "--split", "val")
    drawn, areas = read_drawn(scenes_file(data, "val")), []
    for sample in read_vqa(data, "val").samples:
        scene, about = drawn[sample.image_id]
        if len(about[sample.question_id]) == 1:
            left, top, right, bottom = scene[about[sample.question_id][0]].box
            width, height = Image.open(sample.image_path).size
            areas.append((right - left) * (bottom - top) / (width * height))
    assert found["run"] == run.name and found["split"] == "val"
    methods = found["pointing"]
    assert {"cross", "rollout", "relevancy"} < set(methods) and sum("best head" in name for name in methods) == 1
    for figure in methods.values():
        assert figure["questions"] == len(areas) and 0 <= figure["hit"] <= 1
        assert figure["area"] == pytest.approx(np.mean(areas), rel=1e-5)  # summed in fp32
        assert figure["ratio"] == figure["mass"] / figure["area"]
    ratios = [figure["ratio"] for figure in methods.values()]
    assert ratios == sorted(ratios, reverse=True), "best first"
    table = capsys.readouterr().out
    assert all(f"{name:32s} {figure['mass']:14.1%}" in table for name, figure in methods.items())
    assert f"over {len(areas)} questions that name one object" in table


def test_faithfulness(run, data, tmp_path):
    """With nothing removed, or all tokens added, the answers are as probable as a plain loop finds them."""
    found = figures(run, tmp_path, "--faithfulness", data, "--split", "val", "--questions", 5)["faithfulness"]
    samples = read_vqa(data, "val").samples
    chosen = [samples[i * len(samples) // 5] for i in range(5)]
    mean = np.mean([by_hand(run, sample.image_path, sample.question)[1] for sample in chosen])
    assert set(found) == {"cross", "rollout", "relevancy", "random"}
    for curves in found.values():
        assert curves["fractions"][0] == 0 and curves["fractions"][-1] == 1
        assert curves["deletion"][0] == pytest.approx(mean, rel=1e-4, abs=0)  # fp32; 8 random tokens: 1e-13
        assert curves["insertion"][-1] == pytest.approx(mean, rel=1e-4, abs=0)
        for kind in ("deletion", "insertion"):
            values = np.array(curves[kind])
            assert curves[f"{kind}_area"] == pytest.approx(np.mean(values[1:] + values[:-1]) / 2, abs=0)
    assert is_picture(tmp_path / "faithfulness.png")


def test_ablation(run, data, tmp_path, capsys):
    """On data whose answers are the run's own all are right; a silenced head is one whose output weights are zero."""
    samples = read_vqa(data, "val").samples
    said = {number: answer.text for number, answer in systems.load(run).answer(samples).items()}
    rows = [
        {"image": str(s.image_path), "question": s.question, "answer": said[s.question_id]}
        for s in samples
        if said[s.question_id].strip()
    ]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ("--ablation", own, "--split", "all", "--heads", "decoder.0.*", "--questions", len(rows))
    found = figures(run, tmp_path / "out", *flags)["ablation"]
    assert found["accuracy"] == 1 and len({head["score"] for head in found["heads"]}) > 1
    again = read_vqa(own, "all").samples
    for head in found["heads"]:
        system = systems.load(run)
        block = system.model.decoder.blocks[0]
        module = block.cross if head["name"].endswith("cross") else block.attn
        size = module.out.weight.shape[1] // module.heads
        with torch.no_grad():
            module.out.weight[:, head["head"] * size : (head["head"] + 1) * size] = 0
        assert head["score"] == score(again, system.answer(again)).accuracy
        assert head["drop"] == pytest.approx(1 - head["score"])
    drops = [head["drop"] for head in found["heads"]]
    assert drops == sorted(drops, reverse=True) and {head["name"] for head in found["heads"]} >= {"decoder.0.cross"}
    table = (tmp_path / "out" / "ablation.md").read_text().splitlines()
    assert table[2] == "| none | 1.0000 | |"
    rows = [f"| {h['name']} {h['head']} | {h['score']:.4f} | {h['drop']:+.4f} |" for h in found["heads"]]
    assert table[3:] == rows and is_picture(tmp_path / "out" / "ablation.png")
    worst = found["heads"][0]
    assert f"without {worst['name']} head {worst['head']}: {worst['score']:.4f}" in capsys.readouterr().out
