"""One process of `benchmarks.train_step --against`: `python benchmarks/paced_steps.py RECIPE`.

It runs `training.train` of the checkout on PYTHONPATH, of whatever revision. It uses nothing but
that command and the name of its progress line. Before each step it waits for a line on stdin; after
each step it writes the step's CPU-seconds and the number of frames as JSON.
"""

import json
import os
import sys
import time

from training import train as command

results = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # the lines of training are not results


class Paced(command.ProgressLine):
    """The progress line of training, with a pause after each step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(self.see, with_kwargs=True)
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.wait()

    def see(self, model, args, kwargs) -> None:
        self.frames = kwargs["pixel_values_videos"].shape[1]

    def wait(self) -> None:
        sys.stdin.readline()
        self.since = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.process_time() - self.since
        print(json.dumps({"seconds": seconds, "frames": self.frames}), file=results, flush=True)
        super().on_step_end(args, state, control, **kwargs)
        self.wait()


command.ProgressLine = Paced
command.main(sys.argv[1:])
