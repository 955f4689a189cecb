"""Segmentation of 10,000 embeddings: `python -m benchmarks.segmentation`.

Offline: Ward's distance on a chain, ours and scikit-learn's, with a number of segments and with a
threshold. `ours` and `scikit-learn` find boundaries only; `segments` also makes the segments.
Online: milliseconds per step, and the memory of the process after each tenth of 100,000 steps. The
streams change their mean every fifty steps and have noise.
"""

import argparse
from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import diags
from sklearn.cluster import AgglomerativeClustering

from benchmarks.measure import Cost, cost, cpu_seconds, in_own_process, status
from modeling_vljepa.pipelines.segmentation import OnlineSegmenter, WardSegmenter, as_unit

EVERY = 50  # steps with the same mean


def stream(count: int, width: int) -> np.ndarray:
    """Return unit vectors `(count, width)`, float32."""
    random = np.random.default_rng(0)
    means = random.standard_normal((-(-count // EVERY), width), np.float32)
    embeds = np.repeat(means, EVERY, axis=0)[:count]
    embeds += 0.5 * random.standard_normal((count, width), np.float32)
    return embeds / np.linalg.norm(embeds, axis=1, keepdims=True)


def ours(embeds: np.ndarray, settings: dict) -> list[int]:
    return WardSegmenter(**settings).boundaries(as_unit(embeds))


def segments(embeds: np.ndarray, settings: dict) -> list[int]:
    """Return boundaries through the public call, which also makes the segments."""
    return [each.start for each in WardSegmenter(**settings).segment(embeds)[1:]]


def scikit_learn(embeds: np.ndarray, settings: dict) -> list[int]:
    ones = np.ones(len(embeds) - 1)
    chain = diags([ones, ones], [-1, 1], format="csr")
    found = AgglomerativeClustering(
        settings.get("num_segments"),
        distance_threshold=settings.get("threshold"),
        linkage="ward",
        connectivity=chain,
    ).fit(embeds)
    return (np.flatnonzero(np.diff(found.labels_)) + 1).tolist()


FUNCTIONS = {"ours": ours, "scikit-learn": scikit_learn, "segments": segments}


def offline(name: str, count: int, width: int, settings: dict) -> Cost:
    """Return the least CPU time of three runs; `value` is the starts of segments."""
    embeds = stream(count, width)
    function = FUNCTIONS[name]
    function(embeds[:100], {"num_segments": 2})  # imports are not part of the measurement
    found = [cost(lambda: function(embeds, settings)) for _ in range(3)]
    return replace(found[0], cpu_seconds=min(each.cpu_seconds for each in found))


def online(steps: int, width: int) -> Cost:
    """Run the online segmenter; `value` is the number of segments and the memory over time.

    The memory is in bytes, after each tenth of the steps.
    """
    embeds = torch.from_numpy(stream(2000, width))  # repeated, so that they take constant memory
    detector = OnlineSegmenter(decodes_per_second=1.0)
    closed, memory, since = 0, [], cpu_seconds()
    for step in range(steps):
        closed += len(detector.push(embeds[step % len(embeds)], step / 10))
        if (step + 1) % (steps // 10) == 0:
            memory.append(status("VmRSS"))
    return Cost(cpu_seconds() - since, 0, (closed + len(detector.close()), memory))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.segmentation", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="embeddings, offline")
    parser.add_argument("--threshold", type=float, default=0.64, help="Ward distance")
    parser.add_argument("--steps", type=int, default=100_000, help="embeddings, online")
    parser.add_argument("--width", type=int, default=1536)
    args = parser.parse_args()
    print(f"{args.count} embeddings of {args.width} dimensions, 1 thread")
    for settings in ({"num_segments": args.count // EVERY}, {"threshold": args.threshold}):
        print(*(f"{name} {value}" for name, value in settings.items()))
        found = {
            name: in_own_process(offline, name, args.count, args.width, settings, threads=1)
            for name in FUNCTIONS
        }
        for name, one in found.items():
            print(
                f"  {name:<14}{one.cpu_seconds:>6.2f} CPU-seconds{one.peak_bytes / 2**20:>6.0f} "
                f"MiB{len(one.value) + 1:>7} segments"
            )
        common = set(found["ours"].value) & set(found["scikit-learn"].value)
        print(f"  {len(common)} boundaries in common")
    one = in_own_process(online, args.steps, args.width, threads=1)
    closed, memory = one.value
    growth = (memory[-1] - memory[0]) / 2**20
    print(
        f"online: {1000 * one.cpu_seconds / args.steps:.3f} ms per step over {args.steps} steps, "
        f"{closed} segments; from the first tenth to the last, the process grew by "
        f"{growth:.2f} MiB"
    )


if __name__ == "__main__":
    main()
