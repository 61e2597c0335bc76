"""Runs each side in its own process, one at a time, so that each has its own peak memory."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.timing import peak_memory_gb
from vqa_scratch.errors import UserError


def serve(build: Callable[..., Any], arguments: tuple, threads: int, pipe: Connection) -> None:
    """The process of one side: build it, then do what the pipe asks until it says stop.

    A request is a method's name with its arguments; the answer is ("done", seconds, its value) or ("failed", why).
    """
    try:
        torch.set_num_threads(threads)
        side = build(*arguments)
        pipe.send(("done", 0.0, None))
        while (request := pipe.recv()) is not None:
            name, given, options = request
            work = peak_memory_gb if name == "peak_memory_gb" else getattr(side, name)
            start = time.perf_counter()
            value = work(*given, **options)
            pipe.send(("done", time.perf_counter() - start, value))
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


class Contestant:
    """One side's process, waiting for its turn."""

    def __init__(self, side: str, build: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        given = (build, arguments, torch.get_num_threads(), theirs)
        self.process = context.Process(target=serve, args=given, daemon=True)
        self.side = side
        self.process.start()
        theirs.close()

    def answer(self) -> tuple[float, Any]:
        """(seconds, value) of the request before. Raises UserError if it failed or the process is gone."""
        try:
            kind, *rest = self.pipe.recv()
        except EOFError:
            raise UserError(f"the process of {self.side} ended without an answer: out of memory?") from None
        if kind == "failed":
            raise UserError(f"{self.side}: {rest[0]}")
        return rest[0], rest[1]

    def ask(self, name: str, *arguments: Any, **options: Any) -> tuple[float, Any]:
        self.pipe.send((name, arguments, options))
        return self.answer()

    def stop(self) -> None:
        if self.process.is_alive():
            self.pipe.send(None)
            self.process.join(10)
            self.process.kill()


@contextmanager
def contestants(sides: Mapping[str, tuple]) -> Iterator[list[Contestant]]:
    """The processes, ready; stopped at the end whatever happens. A side is (what builds it, its arguments)."""
    running: list[Contestant] = []
    try:
        for side, built in sides.items():
            running.append(Contestant(side, *built))
            running[-1].answer()  # one builds after the other
        yield running
    finally:
        for contestant in running:
            contestant.stop()
