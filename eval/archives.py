"""Archives of a data set: samples of WebDataset, and members that are found by their names.

Members are read in place, by addresses such as `zip://a.mp4::videos.zip`.
"""

import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from processing.columns import ExampleError, Record, read_json
from processing.output import writing
from processing.rows import RowError


class ArchiveError(ValueError):
    """Archive that cannot be read; the message names it."""


def samples_of_shard(path: Path) -> Iterator[Record | ExampleError]:
    """Yield the samples of a WebDataset archive: `__key__`, and by its suffix the address of each
    file, the value of a JSON file, and the text of a txt file.

    Raises:
        ArchiveError: it is damaged, or not a tar file.
    """
    try:
        with tarfile.open(path) as archive:
            files = (member for member in archive if member.isfile())
            for key, members in groupby(files, _key):
                sample = Record(__key__=key)
                try:
                    for member in members:
                        # The library webdataset ignores case in suffixes, too.
                        suffix = os.path.basename(member.name).partition(".")[2].lower()
                        sample[suffix] = _member_value(archive, member, suffix, path)
                except ValueError as error:
                    yield ExampleError(f"{member.name} in {path.name}: {error}")
                    continue
                yield sample
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ArchiveError(f"{path} is no tar file, or damaged: {error}") from error


def _key(member: tarfile.TarInfo) -> str:
    """Return the path of a member without its suffixes, which the files of a sample share."""
    folder, name = os.path.split(member.name)
    return os.path.join(folder, name.partition(".")[0])


def _member_value(
    archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, path: Path
) -> Any:
    """Return the address of a member; of a small file its value.

    Raises: `ValueError` for a file that is neither JSON nor UTF-8.
    """
    if suffix not in ("json", "txt", "cls"):
        return f"tar://{member.name}::{path.resolve()}"
    content = archive.extractfile(member).read()
    return read_json(content) if suffix == "json" else content.decode("utf-8").strip()


class Members:
    """Media in archives, found by their names, or by the end of their paths.

    A zip file and a tar file are read in place. A compressed tar file would be decompressed from
    its beginning for every member, so it is unpacked once.

    Args:
        cache: folder for unpacked archives.
    """

    def __init__(self, archives: list[Path], cache: Path):
        self.archives = archives
        self.by_stem: dict[str, list[tuple[str, str]]] = {}  # to pairs of a path and an address
        for archive in archives:
            for name, address in _members(archive.resolve(), cache):
                self.by_stem.setdefault(_stem(name), []).append((name, address))

    def address(self, wanted: str) -> str:
        """Return the address of a member whose path ends like this, or else whose name does.

        The index of DREAM-1K names `video/1.mp4`, and its archive `DREAM-1K_videos/1.mp4`.

        Raises: `RowError` if no archive has it, or several members have this name.
        """
        any_suffix = wanted.endswith(".*")
        members = self.by_stem.get(_stem(wanted), [])
        found: set[str] = set()
        for path in (wanted, os.path.basename(wanted)):
            ending = "/" + path.removesuffix("*").lstrip("/")
            found = found or {
                address for name, address in members if _ends(f"/{name}", ending, any_suffix)
            }
        names = ", ".join(path.name for path in self.archives[:3])
        if not found:
            raise RowError(f"{wanted} is missing in {names}")
        if len(found) > 1:
            raise RowError(f"{wanted} names {len(found)} members of {names}")
        return found.pop()


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def _ends(name: str, ending: str, any_suffix: bool) -> bool:
    if any_suffix:
        name = os.path.splitext(name)[0] + "."
    return name.endswith(ending)


def _members(archive: Path, cache: Path) -> Iterator[tuple[str, str]]:
    """Yield name and address of each file in an archive.

    Raises: `ArchiveError` for a file that is neither zip nor tar.
    """
    if zipfile.is_zipfile(archive):
        try:
            with zipfile.ZipFile(archive) as members:
                names = [member.filename for member in members.infolist() if not member.is_dir()]
        except zipfile.BadZipFile as error:
            raise ArchiveError(f"{archive} is a damaged zip file: {error}") from error
        yield from ((name, f"zip://{name}::{archive}") for name in names)
        return
    try:
        with tarfile.open(archive, "r:") as members:
            for member in members:
                if member.isfile():
                    yield member.name, f"tar://{member.name}::{archive}"
            return
    except tarfile.ReadError:
        pass
    folder = unpacked(archive, cache)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), str(path)


def unpacked(archive: Path, cache: Path) -> Path:
    """Return the folder with the files of a compressed tar file; unpack it on the first call."""
    stamp = archive.stat()
    folder = cache / f"{archive.name}-{stamp.st_size}-{stamp.st_mtime_ns}"
    if folder.is_dir():
        return folder
    incomplete = cache / f"incomplete-{os.getpid()}-{archive.name}"
    with writing(cache):
        shutil.rmtree(incomplete, ignore_errors=True)
        incomplete.mkdir(parents=True)
        try:
            with tarfile.open(archive) as members:
                members.extractall(incomplete, filter="data")
        except (tarfile.TarError, EOFError) as error:
            shutil.rmtree(incomplete)
            reason = str(error).partition("\n")[0].rstrip(":")  # then a line for each compression
            raise ArchiveError(f"{archive} is no zip or tar file, or damaged: {reason}") from error
        try:
            incomplete.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(incomplete)  # another process was faster
    return folder


__all__ = ["ArchiveError", "Members", "samples_of_shard"]
