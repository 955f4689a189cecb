"""Write a library of clips: a killed build continues, and two processes never write one library.

    library.lock          locked by the process that writes the library
    library.incomplete/   removed when the library is complete
      embeddings.arrow    the embeddings so far: a schema, then one record batch per write
      library/            the complete library, before it is renamed
    library/

Commands write through `processing.output`. Files of this folder ship to the Hub without it.
"""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers.utils import is_datasets_available

if is_datasets_available():
    import pyarrow as pa  # datasets requires pyarrow and filelock
    from datasets import Dataset, Features, List, Value
    from filelock import FileLock, Timeout

MAX_DRIFT = 1e-3  # in cosine: a model rounded to bf16 stays below, another model is far above
# One write for this number of clips, or after these seconds. A killed build loses the clips that it
# embedded since the last write.
CLIPS_PER_WRITE, SECONDS_PER_WRITE = 256, 30


def same_model(probe: torch.Tensor, other: torch.Tensor) -> bool:
    """Return True if both probes `(2, D)` are those of one model, rounded or not."""
    if probe.shape != other.shape:
        return False
    # Not `1 - cosine > MAX_DRIFT`, which is false for NaN.
    return bool(((probe * other).sum(dim=1) >= 1 - MAX_DRIFT).all())


# -- the folder ------------------------------------------------------------------------------


KEPT = "The embeddings are kept; the same call continues."


@contextmanager
def writing(folder: Path, kept: str = "") -> Iterator[None]:
    """Report a fault of the disk within the block as `ValueError`.

    Args:
        kept: a sentence on earlier work that is kept.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"output_dir: {folder} cannot be written ({error.strerror or error}). Free space there "
            "or give another folder." + (f" {kept}" if kept else "")
        ) from error


def incomplete_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.incomplete")


def check_new(folder: Path) -> None:
    """Raise `ValueError` for a folder that exists; remove the rest of its completed build."""
    if os.path.lexists(folder):
        if (folder / "library.json").is_file():
            shutil.rmtree(incomplete_folder(folder), ignore_errors=True)
        raise ValueError(f"output_dir: {folder} already exists. Give a new folder.")


@contextmanager
def only_writer(folder: str | os.PathLike) -> Iterator[Path]:
    """Make and yield the incomplete folder of a library, and lock it against other processes.

    The system releases the lock when this process ends, also if it is killed.

    Raises:
        ValueError: the folder exists or cannot be written, or another process is writing it.
    """
    folder = Path(folder).absolute()
    incomplete, lock_file = incomplete_folder(folder), folder.with_name(f"{folder.name}.lock")
    lock = FileLock(lock_file, blocking=False)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"output_dir: another process is writing {folder}. Wait until it ends, or give "
                "another folder."
            ) from error
    try:
        check_new(folder)
        with writing(folder):
            incomplete.mkdir(exist_ok=True)
        yield incomplete
    finally:
        with suppress(OSError):
            incomplete.rmdir()  # fails if there is work to continue with
        if not os.path.exists(incomplete):  # `Path.exists` raises for a name that is too long
            # Before the release: another process could lock the file that is removed here.
            with suppress(OSError):  # Windows keeps open files
                lock_file.unlink()
        lock.release()


def complete(incomplete: Path, folder: Path) -> None:
    """Rename the library in `incomplete` to `folder`, once all of its content is on the disk."""
    written = incomplete / "library"
    for path in written.iterdir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    written.rename(folder)
    shutil.rmtree(incomplete, ignore_errors=True)


# -- embeddings ------------------------------------------------------------------------------


def columns_of(dim: int) -> "Features":
    """Return the columns of a library. FAISS needs embeddings of one fixed length."""
    return Features({"video": Value("string"), "embedding": List(Value("float32"), length=dim)})


def as_arrow(videos: list[str], embeds: torch.Tensor) -> dict[str, "pa.Array"]:
    """Return n clips and their embeddings `(n, D)` as columns.

    `datasets` would make a Python object of every number.
    """
    numbers = pa.array(embeds.detach().float().cpu().reshape(-1).numpy())
    return {
        "video": pa.array(videos, pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(numbers, embeds.shape[1]),
    }


class EmbeddingLog:
    """Embeddings of a library that is being built, on the disk, to which more are appended.

    Args:
        incomplete: folder of `only_writer`; an earlier build may have left a log there.
        query: query under which every clip is embedded.
        probe (`torch.Tensor` of shape `(2, D)`): `VLJEPARetrievalPipeline.probe` of the model.

    Attributes:
        count (`int`): clips on the disk.
    """

    def __init__(self, incomplete: Path, query: str, probe: torch.Tensor):
        self.path = incomplete / "embeddings.arrow"
        facts = json.dumps({"query": query, "probe": probe.tolist()})
        schema = columns_of(probe.shape[1]).arrow_schema
        self.schema = schema.with_metadata({**schema.metadata, "library": facts})
        self.query, self.probe = query, probe
        self.count = 0
        self.waiting: list[tuple[str, torch.Tensor]] = []
        self.written = time.monotonic()

    def resume(self, videos: list[str]) -> list[str]:
        """Keep the embeddings of an earlier build; return the clips that it has not embedded.

        Raises:
            ValueError: it had another query or model, a clip that is not among `videos`, or an
                earlier version of a clip.
        """
        if not self.path.is_file():
            return videos
        then = self.path.stat().st_mtime_ns
        embedded, end = self.read()
        missing, left = [], Counter(embedded)
        for video in videos:
            if not left[video]:
                missing.append(video)
                continue
            left[video] -= 1
            # Not the time of the content, which `cp -p` and `mv` take along.
            if os.path.exists(video) and os.stat(video).st_ctime_ns > then:
                raise self.refused(f"an earlier version of {video}")
        for video in left.elements():
            raise self.refused(f"other clips, such as {video}")
        # Only now: it sets the time with which those of the clips are compared.
        with writing(self.path.parent):
            os.truncate(self.path, end)
        self.count = len(embedded)
        return missing

    def read(self) -> tuple[list[str], int]:
        """Return the clips of an earlier build, and the bytes of its complete record batches.

        A killed build or a full disk leaves an incomplete record batch at the end, or an incomplete
        schema.
        """
        embedded, end = [], 0
        with pa.OSFile(str(self.path)) as file, suppress(pa.ArrowInvalid, OSError):
            reader = pa.ipc.open_stream(file)
            facts = json.loads(reader.schema.metadata[b"library"])
            if facts["query"] != self.query:
                raise self.refused(f"another query, {facts['query']!r}")
            if not same_model(self.probe, torch.tensor(facts["probe"])):
                raise self.refused("another model")
            end = file.tell()
            for batch in reader:
                embedded += batch["video"].to_pylist()
                end = file.tell()
        return embedded, end

    def refused(self, difference: str) -> ValueError:
        return ValueError(
            f"output_dir: {self.path.parent} was begun with {difference}. Delete it, or give "
            "another output_dir."
        )

    def add(self, videos: list[str], embeds: list[torch.Tensor]) -> None:
        """Append clips and their embeddings `(D,)`; they are written with those that follow."""
        self.waiting += zip(videos, embeds, strict=True)
        late = time.monotonic() - self.written > SECONDS_PER_WRITE
        if late or len(self.waiting) >= CLIPS_PER_WRITE:
            self.write()

    def write(self) -> None:
        """Write the clips that wait."""
        if not self.waiting:
            return
        videos, embeds = zip(*self.waiting, strict=True)
        columns = as_arrow(list(videos), torch.stack(embeds))
        batch = pa.RecordBatch.from_arrays([*columns.values()], schema=self.schema)
        with writing(self.path.parent, KEPT), self.path.open("ab") as file:
            if not file.tell():
                file.write(self.schema.serialize())
            file.write(batch.serialize())
            file.flush()
            os.fsync(file.fileno())
        self.count += len(videos)
        self.waiting, self.written = [], time.monotonic()

    def dataset(self) -> "Dataset":
        """Return all clips, memory-mapped.

        Raises:
            ValueError: no clip is embedded.
        """
        self.write()
        if not self.count:
            raise ValueError("videos: none could be read; no library was written.")
        return Dataset.from_file(str(self.path))


__all__ = [
    "KEPT",
    "EmbeddingLog",
    "as_arrow",
    "columns_of",
    "complete",
    "incomplete_folder",
    "only_writer",
    "same_model",
    "writing",
]
