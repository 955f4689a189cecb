"""Several processes that embed one evaluation: each its share, and process 0 scores.

    accelerate launch --num_processes 2 -m eval.evaluate …
    torchrun --nproc_per_node 2 -m eval.evaluate …

Process 0 decides what to embed. The others wait for a share, embed it and return the embeddings, so
that a kind of benchmark has to know nothing of processes.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

PATIENCE = timedelta(days=30)  # process 0 may score for longer than the default of 30 minutes


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Team:
    """The processes of one evaluation; by default this one alone.

    Attributes:
        rank (`int`): number of this process.
        size (`int`): number of processes.
        device (`torch.device`): device of this process; the GPU if there is one, by default.
        group (`dist.ProcessGroup`, *optional*): what the processes send objects through.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=default_device)
    group: dist.ProcessGroup | None = None

    @classmethod
    def join(cls) -> "Team":
        """Return the processes that a launcher started, or this one alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        state = PartialState(cpu=not torch.cuda.is_available())
        # gloo sends Python objects from the CPU; NCCL would occupy the GPU while it waits.
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, state.device, group)

    def leave(self) -> None:
        """Close the connections, after the last share."""
        if self.size > 1:
            dist.destroy_process_group()

    # -- process 0 -------------------------------------------------------------------------

    def share(self, jobs: list[Any]) -> Any:
        """Send each process its job, and return that of process 0."""
        if self.size == 1:
            return jobs[0]
        own = [None]
        dist.scatter_object_list(own, jobs, group=self.group)
        return own[0]

    def collect(self, result: Any) -> list[Any]:
        """Return the results of all processes, that of process 0 first."""
        if self.size == 1:
            return [result]
        results = [None] * self.size
        dist.gather_object(result, results, group=self.group)
        return results

    def end(self) -> None:
        """Let the other processes end: there is nothing left to embed."""
        self.share([None] * self.size)

    # -- the other processes ---------------------------------------------------------------

    def serve(self, work: Callable[[Any], Any]) -> None:
        """Do the jobs that process 0 sends, until it ends.

        Args:
            work: does a job and returns its result.
        """
        while True:
            received = [None]
            try:
                dist.scatter_object_list(received, None, group=self.group)
            except RuntimeError:  # process 0 stopped with an error, which it reports
                return
            if received[0] is None:
                return
            result = work(received[0])
            try:
                dist.gather_object(result, None, group=self.group)
            except RuntimeError:
                return


__all__ = ["Team"]
