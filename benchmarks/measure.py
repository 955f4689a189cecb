"""Peak memory and CPU time of one thing in a process of its own."""

import resource
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Cost:
    """What a call took.

    Attributes:
        cpu_seconds: of user and system, over all threads.
        peak_bytes: the most memory held during the call, beyond what was held before it.
        value: what it returned.
    """

    cpu_seconds: float
    peak_bytes: int
    value: Any


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def status(field: str) -> int:
    """A line of /proc/self/status in bytes, such as VmRSS and VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field} here: this benchmark needs Linux")


def cost(call: Callable[[], Any]) -> Cost:
    """Run `call` here. The peak begins anew, so what was freed before does not count."""
    Path("/proc/self/clear_refs").write_text("5")
    held, since = status("VmRSS"), cpu_seconds()
    value = call()
    return Cost(cpu_seconds() - since, status("VmHWM") - held, value)


def work(function: Callable[..., Cost], arguments: tuple, threads: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    queue.put(function(*arguments))


def in_own_process(function: Callable[..., Cost], *arguments: Any, threads: int) -> Cost:
    """`function(*arguments)` in a fresh process, whose allocator has no past."""
    context = get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(function, arguments, threads, queue))
    process.start()
    while process.is_alive() and queue.empty():
        process.join(0.2)
    if queue.empty():
        raise RuntimeError(f"{function.__name__}{arguments} ended with {process.exitcode}")
    found = queue.get()
    process.join()
    return found
