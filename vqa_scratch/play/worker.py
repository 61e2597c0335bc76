"""One thread for each model: requests wait in a queue, so none is lost, and none blocks the loop that serves them."""

import asyncio
import json
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from vqa_scratch.errors import UserError


class Gone(BaseException):
    """Whoever asked has gone; no error, and not to be caught as one."""


class Job:
    """A request: the model's thread runs `work`, a generator of JSON values, and the server's loop gets the `lines`,
    None after the last. Newer requests come between the values of work in pieces."""

    def __init__(self, work: Callable[["Job"], Iterator[Any]], *, in_pieces: bool = False) -> None:
        self.work, self.in_pieces, self.cancelled = work(self), in_pieces, False
        self.loop, self.lines = asyncio.get_running_loop(), asyncio.Queue[str | None]()

    def send(self, value: Any) -> None:
        """From the model's thread: a line, JSON unless it is text, or None. Raises Gone if nobody waits for it."""
        if self.cancelled:
            raise Gone
        if not isinstance(value, str | None):
            value = json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n"
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.lines.put_nowait, value)

    def stop(self) -> None:
        """From the server's loop: nobody waits for it any more."""
        self.cancelled = True
        self.lines.put_nowait(None)

    def step(self) -> bool:
        """All lines, or the next one of work in pieces. Returns whether more is left."""
        try:
            for value in self.work:
                self.send(value)
                if self.in_pieces:
                    return True
        except UserError as error:
            self.send({"error": str(error)})
        except Exception:  # a fault of ours: the page gets a line, the terminal all of it
            traceback.print_exc()
            self.send({"error": "the server failed at this request; its terminal says how"})
        self.send(None)
        return False


class Worker:
    """The thread of one model. Newer requests come before work in pieces, and otherwise each in its turn."""

    def __init__(self) -> None:
        self.waiting, self.in_pieces = deque[Job](), deque[Job]()
        self.closed, self.changed = False, threading.Condition()
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    def add(self, job: Job) -> None:
        """Put a request into the queue."""
        with self.changed:
            (self.in_pieces if job.in_pieces else self.waiting).append(job)
            self.changed.notify()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.waiting or self.in_pieces)
                if self.closed:
                    return
                job = (self.waiting or self.in_pieces).popleft()
            with suppress(Gone):
                if not job.cancelled and job.step():
                    self.add(job)

    def close(self) -> None:
        """End the thread after the piece at hand; wait a second for it."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join(1)
