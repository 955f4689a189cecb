"""Work on a disk that is full."""

import resource
import signal
from collections.abc import Callable
from multiprocessing import get_context

import torch


def message_on_a_full_disk(
    work: Callable[[], object], size: int, errors: type[Exception] | tuple[type[Exception], ...]
) -> str:
    """Return the message of the error that `work` raises if no file may exceed `size` bytes.

    Other errors than `errors` are not caught. Without an error, the message is empty.
    """
    fork = get_context("fork")  # a process of its own, because the limit stays
    messages = fork.SimpleQueue()

    def run() -> None:
        torch.set_num_threads(1)  # a forked process does not have its parent's threads
        # Without the signal's handler, the system would end the process.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            work()
        except errors as error:
            messages.put(str(error))
        else:
            messages.put("")

    process = fork.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 0
    return messages.get()
