"""Checks of output paths before a command works, files that are complete or missing, and one
sentence for a disk that is full."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# Faults of the disk or of the path. Network errors are `OSError`s too, without one of these.
FAULTS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOLCK),
}
# `torch.save` and safetensors raise other types, without a number; these are parts of their texts.
TEXTS = ("inline_container.cc", "PytorchStreamWriter", "Parent directory", "os error")


class OutputError(ValueError):
    """An output that cannot be written; the message names it and the cure."""


def check_output_folder(name: str, folder: str | os.PathLike) -> None:
    """Check that a folder can be written to, or that it can be made. Nothing is made.

    Args:
        name: the option or key that names the folder.

    Raises:
        OutputError: it or a parent is a file, or has no write permission.
    """
    path = Path(folder).absolute()
    nearest = next(each for each in (path, *path.parents) if os.path.exists(each))
    if not nearest.is_dir():
        raise OutputError(f"{name}: {nearest} is a file. Give a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{name}: {nearest} has no write permission. Give another folder.")


def check_output_file(name: str, file: Path) -> None:
    """Check that a file can be written. Nothing is made.

    Raises:
        OutputError: it is a folder or is read-only, or see `check_output_folder`.
    """
    if file.is_dir():
        raise OutputError(f"{name}: {file} is a folder. Give a file.")
    if file.exists() and not os.access(file, os.W_OK):
        raise OutputError(f"{name}: {file} has no write permission. Give another file.")
    check_output_folder(name, file.parent)


@contextmanager
def writing(path: str | os.PathLike, kept: str = "") -> Iterator[None]:
    """Report a fault of the disk within the block as `OutputError`.

    Args:
        path: the file or folder that the block writes.
        kept: a sentence on earlier work that is kept.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError):
            is_fault, reason = error.errno in FAULTS, error.strerror
        else:
            is_fault = any(text in str(error) for text in TEXTS)
            reason = str(error).split("\n")[0]
        if not is_fault:
            raise
        raise OutputError(
            f"{path}: it cannot be written ({reason}). Free space there or give another folder."
            + (f" {kept}" if kept else "")
        ) from error


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, and rename it to `path` at the end of the block.

    So `path` is complete or missing, even if the machine stops: the content is flushed to the disk
    first. The other name contains the host and the process, so that two processes never write to
    one file.
    """
    written = path.with_name(f"incomplete-{socket.gethostname()}-{os.getpid()}-{path.name}")
    yield written
    with open(written, "rb") as file:
        os.fsync(file.fileno())
    written.rename(path)


def incomplete_files(folder: Path) -> list[Path]:
    """List the files in `folder` that `complete_file` has not renamed: of a run that was killed,
    or of one that is writing now.

    safetensors writes to `.tmp` and six further characters before it renames that file to the name
    it was given, so a kill may leave such a file, too.
    """
    return sorted([*folder.glob("incomplete-*"), *folder.glob(".tmp??????")])


__all__ = [
    "OutputError",
    "check_output_file",
    "check_output_folder",
    "complete_file",
    "incomplete_files",
    "writing",
]
