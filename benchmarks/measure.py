"""Peak memory and CPU time of a call, in its own process."""

import ctypes
import resource
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Cost:
    """Cost and value of a call.

    Attributes:
        cpu_seconds: user and system time, over all threads.
        peak_bytes: peak of resident memory during the call, minus the memory before it.
        value: the return value.
    """

    cpu_seconds: float
    peak_bytes: int
    value: Any


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def status(field: str) -> int:
    """Return a field of /proc/self/status in bytes, such as VmRSS or VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: run this benchmark on Linux")


class PeakMemory:
    """Peak of resident memory since this object was made, minus the memory at that time."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak so far
        self.before = status("VmRSS")

    def read(self) -> int:
        # Linux adds up the pages of threads late, so the peak can be some pages below the start.
        return max(0, status("VmHWM") - self.before)


def cost(call: Callable[[], Any]) -> Cost:
    """Run `call` in this process and measure it."""
    peak, since = PeakMemory(), cpu_seconds()
    value = call()
    return Cost(cpu_seconds() - since, peak.read(), value)


def return_freed_memory() -> None:
    """Return freed memory to the system; from now on, blocks of 1 MiB and more at once.

    Resident memory is then memory in use. It costs time, so times are measured before. The setting
    cannot be undone, so only processes of `in_own_process` change it.
    """
    if parent_process() is None:
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)


def work(function: Callable[..., Cost], arguments: tuple, threads: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    queue.put(function(*arguments))


def in_own_process(function: Callable[..., Cost], *arguments: Any, threads: int) -> Cost:
    """Return `function(*arguments)` of a new process: its allocator has retained no memory."""
    context = get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(function, arguments, threads, queue))
    process.start()
    # A process with an unread result does not end, so joining it alone would wait forever.
    while process.is_alive() and queue.empty():
        process.join(0.2)
    if queue.empty():
        raise RuntimeError(
            f"{function.__name__}{arguments} ended with exit code {process.exitcode}"
        )
    found = queue.get()
    process.join()
    return found
