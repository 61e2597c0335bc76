"""Files appear whole or not at all, and others may read them as far as the user's mask allows."""

import multiprocessing
import os
import stat
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vqa_scratch.data.mapped import mapped_array
from vqa_scratch.data.shapes import ShapesSpec, ensure_shapes
from vqa_scratch.errors import UserError
from vqa_scratch.storage import remove_unfinished, write_text, write_whole


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_users_mask_decides_who_may_read(tmp_path, mask):
    """safetensors writes files that only their owner may read, and mkdtemp such folders."""
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "model.safetensors", lambda path: save_file({"w": torch.ones(2)}, path))
        data = ensure_shapes(tmp_path, ShapesSpec(train=1, val=1, test=1, holdout=1), progress=False)
        assert os.umask(mask) == mask, "the mask itself stays"
    finally:
        os.umask(before)
    assert mode(tmp_path / "model.safetensors") == 0o666 & ~mask
    assert mode(data) == 0o777 & ~mask


def test_an_error_keeps_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_text(path, "old")

    def fail(unfinished):
        unfinished.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*summary.json: No space left on device"):
        write_whole(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file(tmp_path):
    """As on two machines that share a disk and give their processes the same number; the last one's file stands."""
    path = tmp_path / "config.json"

    def slow(unfinished):
        unfinished.write_text("the first half")
        write_text(path, "another writer's")
        with open(unfinished, "a") as file:
            file.write(", the second half")

    write_whole(path, slow)
    assert path.read_text() == "the first half, the second half" and list(tmp_path.iterdir()) == [path]


def slow_array(path) -> None:
    """A writer that is killed, or waits until it is told to go on, in the middle of its array."""

    def blocks():
        yield np.zeros((1, 2), np.uint8)
        (path.parent / "in the middle").touch()
        while not (path.parent / "go on").exists():
            time.sleep(0.01)
        yield np.ones((1, 2), np.uint8)

    mapped_array(path, (2, 2), np.uint8, blocks, "--no-image-cache")


def begun(context, path):
    process = context.Process(target=slow_array, args=(path,))
    process.start()
    while not (path.parent / "in the middle").exists():
        time.sleep(0.01)
    (path.parent / "in the middle").unlink()
    return process


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    context, path = multiprocessing.get_context("spawn"), tmp_path / "images-1 [2].npy"
    killed = begun(context, path)
    killed.kill()
    killed.join()
    (left,) = tmp_path.glob(".*.tmp")
    living = begun(context, path)
    (own,) = tmp_path.glob(".*.tmp")
    assert own != left, "the next writer of the same file tidies up"
    mapped_array(path, (2, 2), np.uint8, lambda: [np.full((2, 2), 7, np.uint8)], "")
    remove_unfinished(tmp_path)
    assert own.exists()
    (tmp_path / "go on").touch()
    living.join()
    assert living.exitcode == 0 and np.load(path).tolist() == [[0, 0], [1, 1]]
    assert not list(tmp_path.glob(".*.tmp"))


def test_half_a_data_set_is_removed_by_the_next(tmp_path):
    spec = ShapesSpec(train=1, val=1, test=1, holdout=1)
    folder = ensure_shapes(tmp_path, spec, progress=False)
    left = tmp_path / f".{folder.name}.0123456789ab.tmp"
    folder.rename(left)
    assert ensure_shapes(tmp_path, spec, progress=False) == folder and not left.exists()
