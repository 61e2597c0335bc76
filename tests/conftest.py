"""Shared fixtures. Importing the shim first lets `transformers` import beside a CPU-only torch."""

import os
import sys
from pathlib import Path

import pytest
import torch

import tests.torchvision_shim  # noqa: F401

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # each process its share of the cores, with its children
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    torch.set_num_threads(threads)
os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # so no run chooses another number
if not torch.cuda.is_available():  # read when a kernel is defined, so before anything imports one
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same seed and leaves the default dtype as it found it."""
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef) -> None:
    """What the tests of a file share (a random model) is drawn from the same seed, whichever of them asks first."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small data set of drawn scenes in the official formats, one for all tests of a file."""
    from vqa_helpers import small_data  # here, because it imports kernels, and they read TRITON_INTERPRET

    return small_data(tmp_path_factory.mktemp("data"))


def pytest_sessionfinish() -> None:
    """The browser that the tests of a worker shared."""
    if browser := sys.modules.get("browser"):
        browser.close()
