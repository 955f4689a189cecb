"""Writer of streams into a feature store; `processing/stream_store.py` documents the format.

Shapes: B windows of a batch, N visual tokens, Dx visual width.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch

from eval.annotated_streams import read_streams
from eval.benchmarks import load_benchmarks
from eval.tasks.selective_decoding import StreamingBenchmark
from modeling_vljepa import StreamEncoder, VLJEPAModel
from processing import MediaError, VLJEPAProcessor, Window
from processing.feature_store import FeatureError
from processing.media import name_of
from processing.stream_store import part_path, stream_name
from training.data.feature_writer import SHARD_BYTES, as_written, put

Settings = tuple[int, int, float | None]  # frames and stride of the windows, frames per second


def streams_of(path: Path, names: list[str], num_frames: int) -> list[tuple[str, Settings]]:
    """Return the distinct streams of the named benchmarks, with the settings of their windows.

    Args:
        path: the file of the benchmarks.
        num_frames: frames of a window where a benchmark does not give them.
    Raises:
        FeatureError: a benchmark has no streams.
    """
    found = {}
    for benchmark in load_benchmarks(path, names):
        if not isinstance(benchmark, StreamingBenchmark):
            raise FeatureError(
                f"--streams: {benchmark.name} has no streams. Leave it out; clips are those of the "
                "recipe's data.sources."
            )
        settings = benchmark.num_frames or num_frames, benchmark.stride, benchmark.fps
        for rows in (benchmark.rows, benchmark.validation_rows):
            found |= {(stream.video, settings): None for stream in read_streams(rows)[0]}
    return list(found)


def encode(
    windows: Iterable[Window], encoder: StreamEncoder, batch_size: int, bf16: bool
) -> Iterator[tuple[list[tuple[float, float]], torch.Tensor]]:
    """Yield the times and the visual tokens `(B, N, Dx)` of windows, batch by batch."""
    windows, device = iter(windows), encoder.model.device.type
    while batch := list(islice(windows, batch_size)):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            tokens = encoder.encode(batch)
        yield [(window.start_time, window.end_time) for window in batch], tokens.cpu()


@torch.inference_mode()
def write_stream(
    folder: Path,
    video: str,
    settings: Settings,
    facts: dict,
    model: VLJEPAModel,
    processor: VLJEPAProcessor,
    *,
    dtype: str,
    batch_size: int,
    bf16: bool,
    part_bytes: int = SHARD_BYTES,
) -> int:
    """Encode all windows of a stream and write them, unless they are there; return their number.

    Args:
        facts: `made_with` of the model and the processor.
        dtype: dtype in which features are stored.
        bf16: compute in bf16.
        part_bytes: size above which a part is written.
    """
    window, stride, fps = settings
    name = stream_name(video, window=window, stride=stride, fps=fps)
    facts = {"made_with": facts | {"num_frames": window}, "dtype": dtype}
    path = folder / f"{name}.json"
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if {key: stored[key] for key in facts} == facts:
            return len(stored["times"])
        path.unlink()  # it would state the parts that are written now
    times, counts, errors, waiting, broken, error = [], [], [], [], 0, ""

    def write_part() -> None:
        part = {key: torch.cat([each[key] for each in waiting]) for key in waiting[0]}
        errors.append(part.pop("errors"))
        put(part_path(folder, name, len(counts)), part)
        counts.append(len(part["features"]))
        waiting.clear()

    encoder = StreamEncoder(model, processor)
    try:
        with processor.watch(video, window=window, stride=stride, fps=fps) as windows:
            for seconds, tokens in encode(windows, encoder, batch_size, bf16):
                if not tokens.isfinite().all():
                    raise FeatureError(
                        f"{video}: the X-Encoder's output is NaN or infinite. Try "
                        "training.precision=fp32."
                    )
                times += seconds
                waiting.append(as_written(tokens, dtype))
                if sum(each["features"].nbytes for each in waiting) >= part_bytes:
                    write_part()
            broken = windows.report.broken
    except MediaError as reason:
        error = str(reason).removeprefix(f"{name_of(video)}: ")
    if waiting:
        write_part()
    every = torch.cat(errors) if errors else torch.zeros(1)
    facts |= {
        "window": window,
        "stride": stride,
        "fps": fps,
        "times": times,
        "parts": counts,
        "broken": broken,
        "error": error,
        "relative_error": {"mean": every.mean().item(), "max": every.max().item()},
    }
    put(path, json.dumps(facts))
    return len(times)


__all__ = ["Settings", "streams_of", "write_stream"]
