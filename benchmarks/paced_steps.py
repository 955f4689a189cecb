"""One process of `benchmarks.train_step --against`: `python benchmarks/paced_steps.py RECIPE`.

It runs `training.train` of the checkout on PYTHONPATH, of whatever revision. It uses nothing but
that command and the name of its progress line. It writes one JSON object per line: first the
CPU-seconds of the start; then, for each line on stdin, those of a step, its numbers of rows and
clips, and the frames of a clip. After the line "count", it writes the numbers of some operators of
the step instead.
"""

import json
import os
import resource
import sys
import time
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training import train as command

results = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # the lines of training are not results

OPERATORS = {
    "values read": ("_local_scalar_dense",),
    "sizes read": ("nonzero", "unique", "_unique", "masked_select"),
    "copies": ("_to_copy", "copy_", "clone"),
}


class Counted(TorchDispatchMode):
    """Counter of the operators that run inside it."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names[name] += 1
        # An index of booleans is turned into positions first.
        if name in ("index", "index_put", "index_put_"):
            self.names["nonzero"] += sum(
                each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
            )
        return function(*args, **(kwargs or {}))

    def counts(self) -> dict[str, int]:
        return {
            kind: sum(count for name, count in self.names.items() if name.startswith(names))
            for kind, names in OPERATORS.items()
        }


def write(**values) -> None:
    print(json.dumps(values), file=results, flush=True)


class Paced(command.ProgressLine):
    """The progress line of training, with a pause before each step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(self.see, with_kwargs=True)
        super().on_train_begin(args, state, control, model=model, **kwargs)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)  # processes that decode
        write(start=time.process_time() + children.ru_utime + children.ru_stime)
        self.wait()

    def see(self, model, args, kwargs) -> None:
        self.rows = len(kwargs["input_ids"])
        self.clips, self.frames = kwargs["pixel_values_videos"].shape[:2]

    def wait(self) -> None:
        self.counted = Counted() if sys.stdin.readline() == "count\n" else None
        if self.counted is not None:
            self.counted.__enter__()
        self.since = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.process_time() - self.since
        if self.counted is None:
            write(seconds=seconds, rows=self.rows, clips=self.clips, frames=self.frames)
        else:
            self.counted.__exit__(None, None, None)
            write(counts=self.counted.counts())
        super().on_step_end(args, state, control, **kwargs)
        self.wait()


command.ProgressLine = Paced
command.main(sys.argv[1:])
