"""Scenes pasted into canvases of other sizes keep their questions, and the table says what the models did."""

import numpy as np
import pytest
from click.testing import CliRunner

from bench import resolution, suite
from bench.__main__ import PROGRAM
from vqa_scratch.data.scenes import FAMILY_OF_TYPE


def test_a_pasted_scene_is_the_same_scene_elsewhere():
    """Its objects' pixels are all there, nothing else is; an answer to "where" is that of the canvas."""
    drawn, samples = resolution.draw(12, 0)
    rng, places = np.random.default_rng(0), set()
    for size in (*resolution.TRAINED, *resolution.NEVER):
        for number, scene in enumerate(scene for scene in drawn if scene.fits(size)):
            canvas, rows = scene.paste(size, rng)
            assert canvas.shape == (16 * size[0], 16 * size[1], 3) and len(rows) == resolution.QUESTIONS
            ground = np.array(np.bincount(scene.pixels[..., 2].ravel()).argmax())
            objects = [pixels[(pixels != ground).any(-1)] for pixels in (scene.pixels, canvas)]
            assert np.array_equal(*objects) and len(objects[0]) > 50, number
            moved = [np.argwhere((pixels != ground).any(-1)).min(0) for pixels in (scene.pixels, canvas)]
            assert not ((moved[1] - moved[0]) % 16).any(), "whole cells"
            for row, about in zip(rows, scene.about, strict=True):
                assert (FAMILY_OF_TYPE[samples[row].question_type] == "where") == (about >= 0)
                if about >= 0:
                    thing = scene.scene[about]
                    y, x = (thing.y, thing.x) + moved[1] - moved[0]
                    down, right = 2 * y >= canvas.shape[0], 2 * x >= canvas.shape[1]
                    assert samples[row].answer == f"{('top', 'bottom')[int(down)]} {('left', 'right')[int(right)]}"
                    places.add(samples[row].answer)
    assert len(places) == 4


def test_a_scene_that_is_too_wide_is_left_out():
    drawn, _ = resolution.draw(30, 1)
    assert 0 < sum(scene.fits((3, 3)) for scene in drawn) < 30 and all(scene.fits((4, 4)) for scene in drawn)


@pytest.mark.parametrize("steps", [3])
def test_the_table(steps, monkeypatch):
    monkeypatch.setattr(resolution, "TESTED", 40)
    argv = ["resolution", "--steps", str(steps), "--width", "16", "--layers", "1", "--scenes", "400"]
    result = CliRunner().invoke(PROGRAM, argv, catch_exceptions=False)
    figures = suite.figures("resolution", result.stdout)
    assert [figure.case for figure in figures] == [
        f"with newlines, {size}, never trained" for size in ("64 x 96", "96 x 64", "80 x 80")
    ]
    assert result.stdout.count("without newlines") == 4 and f"{steps * 192:,} questions" in result.stdout
