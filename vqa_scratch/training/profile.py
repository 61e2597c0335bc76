"""Profiles a few steps of a run (`--profile`): a trace for Perfetto or chrome://tracing, and the heaviest operators."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from vqa_scratch.storage import write_whole

T = TypeVar("T")
SKIPPED, HEAVIEST = 3, 5  # calls before the first that is profiled, which are slower than the others; operators named


@contextmanager
def profiling(step: Callable[..., T], number: int | None, path: Path, on_disk: bool) -> Iterator[Callable[..., T]]:
    """`step`, of which `number` calls are profiled after the first few and written to `path`; if None, `step` itself.

    A block that ends earlier leaves a trace of what there was. With `on_disk=False`, on other ranks, nothing is done.
    """
    if number is None or not on_disk:
        yield step
        return
    on_gpu = torch.cuda.is_available()
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
    calls, running = 0, False

    def stop() -> None:
        nonlocal running
        if on_gpu:
            torch.cuda.synchronize()
        profiler.stop()
        running = False
        write_whole(path, lambda unfinished: profiler.export_chrome_trace(str(unfinished)))
        print(f"profile of {calls - SKIPPED} steps: {path}, to be opened in ui.perfetto.dev or chrome://tracing")
        print(f"heaviest operators: {', '.join(heaviest(profiler, on_gpu))}")

    def profiled(*args: Any, **options: Any) -> T:
        nonlocal calls, running
        if calls == SKIPPED:
            profiler.start()
            running = True
        with record_function(getattr(step, "__name__", "step")):
            result = step(*args, **options)
        calls += 1
        if calls == SKIPPED + number:
            stop()
        return result

    try:
        yield profiled
    finally:
        if running:
            stop()
    if calls <= SKIPPED:
        print(f"no profile: it begins after {SKIPPED} steps, and there were {calls}")


def heaviest(profiler: profile, on_gpu: bool) -> list[str]:
    """The operators that took most time themselves, on the GPU if there is one, each with its share: "aten::mm 31%"."""
    operators = [e for e in profiler.key_averages() if e.device_type == DeviceType.CPU and not e.is_user_annotation]
    times = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in operators}
    total = max(sum(times.values()), 1)
    return [
        f"{name} {times[name] / total:.0%}" for name in sorted(times, key=times.__getitem__, reverse=True)[:HEAVIEST]
    ]
