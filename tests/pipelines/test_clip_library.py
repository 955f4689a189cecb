"""A library of clips: searches, and builds that are killed, meet each other or a full disk."""

import errno
import os
import random
import shutil
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from threading import RLock

import datasets
import numpy as np
import pytest
import torch
import tqdm.auto

from modeling_vljepa.pipelines import clip_library, library_writer
from modeling_vljepa.pipelines.clip_library import ClipLibrary
from modeling_vljepa.pipelines.library_writer import EmbeddingLog, only_writer
from modeling_vljepa.pipelines.pipeline_vljepa import VLJEPARetrievalPipeline
from tests.full_disk import message_on_a_full_disk
from tests.tiny import tiny_model, tiny_processor

DIM, COUNT = 16, 40
PROBE = torch.nn.functional.normalize(torch.ones(2, DIM))


def embedding_of(number: int) -> torch.Tensor:
    """Return a unit vector that depends on the number alone."""
    return torch.from_numpy(
        np.random.default_rng(number).standard_normal(DIM, dtype=np.float32)
    ).div(4)


@cache
def tiny_pair() -> dict:
    return {"model": tiny_model(), "processor": tiny_processor()}


class Numbers(VLJEPARetrievalPipeline):
    """Retrieval pipeline whose clips are text files with a number; "x" cannot be read.

    Attributes:
        read (`list[str]`): clips that were read.
        at (`dict[int, Callable]`): called before a clip is embedded.
    """

    def __init__(self, at: dict[int, Callable[[], None]] | None = None, probe=PROBE):
        super().__init__(**tiny_pair())
        self.read, self.at, self.own_probe = [], at or {}, probe

    def preprocess(self, sample, query="", allow_urls=False):
        self.read.append(sample["video"])
        return {"number": int(Path(sample["video"]).read_text())}

    def forward(self, items):
        for item in items:
            self.at.get(item["number"], lambda: None)()
        return [embedding_of(item["number"]) for item in items]

    def probe(self):
        return self.own_probe


@pytest.fixture
def clips(tmp_path) -> list[str]:
    """Paths of 40 clips, one of which cannot be read."""
    folder = tmp_path / "clips"
    folder.mkdir()
    paths = [folder / f"{number:02d}.txt" for number in range(COUNT)]
    for number, path in enumerate(paths):
        path.write_text("x" if number == 7 else str(number))
    return [str(path) for path in paths]


@pytest.fixture(autouse=True)
def frequent_writes(monkeypatch):
    monkeypatch.setattr(library_writer, "CLIPS_PER_WRITE", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process does not have its parent's threads
    yield
    torch.set_num_threads(threads)


def stop() -> None:
    raise KeyboardInterrupt


def build(folder: Path, clips: list[str], pipe: Numbers | None = None, **options) -> ClipLibrary:
    return (pipe or Numbers()).build_library(clips, folder, query="what ?", **options)


def check_whole(folder: Path, clips: list[str]) -> None:
    """Check that `datasets` reads every clip once, with its own embedding."""
    found = datasets.load_from_disk(str(folder))
    rows = {row["video"]: row["embedding"] for row in found}
    assert len(found) == len(rows) and sorted(rows) == sorted(set(clips) - {clips[7]})
    for video, embedding in rows.items():
        assert embedding == pytest.approx(embedding_of(int(Path(video).stem)).tolist(), abs=1e-6)
    assert [each["video"] for each in ClipLibrary.load(folder).unreadable] == [clips[7]]
    assert sorted(path.name for path in folder.parent.glob(f"{folder.name}*")) == [folder.name]


# -- searching -------------------------------------------------------------------------------


def library_of(embeds: torch.Tensor) -> ClipLibrary:
    videos = [f"{number}.mp4" for number in range(len(embeds))]
    probe = torch.nn.functional.normalize(torch.ones(2, embeds.shape[1]))
    return ClipLibrary.from_embeddings(videos, embeds, query="q", probe=probe, unreadable=[])


@pytest.mark.parametrize("count", [1, 7, 2500])
@pytest.mark.parametrize("top_k", [1, 10, 3000])
def test_library_nearest_equals_one_product_and_top_k(monkeypatch, tmp_path, count, top_k):
    monkeypatch.setattr(clip_library, "TEXTS_AT_ONCE", 2)
    generator = torch.Generator().manual_seed(count)
    embeds = torch.nn.functional.normalize(torch.randn(count, 24, generator=generator))
    texts = torch.nn.functional.normalize(torch.randn(3, 24, generator=generator))
    expected = (texts @ embeds.T).topk(min(top_k, count))
    library_of(embeds).save(tmp_path / "library")
    loaded = ClipLibrary.load(tmp_path / "library")
    for row, found in enumerate(loaded.nearest(texts, top_k)):
        assert [each["video"] for each in found] == [
            f"{index}.mp4" for index in expected.indices[row].tolist()
        ]
        assert [each["score"] for each in found] == pytest.approx(
            expected.values[row].tolist(), abs=1e-6
        )


def test_library_nearest_searches_the_rows_that_were_selected():
    library = library_of(torch.eye(6))
    some = ClipLibrary(library.dataset.select([5, 1]), "q", library.probe, [])
    [found] = some.nearest(torch.eye(6)[1:2], 6)
    assert found == [{"video": "1.mp4", "score": 1.0}, {"video": "5.mp4", "score": 0.0}]


def test_library_nearest_reads_no_embedding_of_its_hits(monkeypatch):
    read = []
    getitem = datasets.Dataset.__getitem__

    def note(self, key):
        read.append((self.column_names, key))
        return getitem(self, key)

    monkeypatch.setattr(datasets.Dataset, "__getitem__", note)
    library_of(torch.eye(6)).nearest(torch.eye(6)[1:2], 3)
    columns = [names for names, key in read if isinstance(key, list)]
    assert columns == [["video"]]


def test_library_repr_is_one_line(tmp_path):
    library = library_of(torch.eye(6))
    assert repr(library) == "ClipLibrary(6 clips, 6 dimensions, query 'q', in memory)"
    library.save(tmp_path / "library")
    loaded = ClipLibrary.load(tmp_path / "library")
    assert repr(loaded).endswith(f", query 'q', {tmp_path / 'library'})")
    long = ClipLibrary(library.dataset, "what\nhappens " * 40, library.probe, [])
    assert "\n" not in repr(long) and len(repr(long)) < 130


# -- interrupted builds ----------------------------------------------------------------------


def test_build_library_continues_an_interrupted_build(tmp_path, clips):
    folder = tmp_path / "library"
    with pytest.raises(KeyboardInterrupt):
        build(folder, clips, Numbers({20: stop}))
    with pytest.raises(ValueError, match="library is incomplete. Call build_library again with th"):
        ClipLibrary.load(folder)
    # More clips, in another order; the unreadable one is read again.
    (tmp_path / "clips" / "40.txt").write_text("40")
    more = [str(tmp_path / "clips" / "40.txt"), *reversed(clips)]
    pipe = Numbers()
    made = build(folder, more, pipe, batch_size=2)
    assert sorted(pipe.read) == sorted([clips[7], *clips[19:], more[0]])  # 18 = 6 writes of 3
    assert len(made.dataset) == COUNT and made.query == "what ?"
    check_whole(folder, [*clips, more[0]])


def test_build_library_embeds_a_clip_that_is_given_twice_twice(tmp_path, clips):
    twice = [clips[0], clips[1], clips[0], clips[2]]
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "library", twice, Numbers({2: stop}))
    made = build(tmp_path / "library", twice)
    assert made.dataset["video"][:] == twice


@pytest.mark.parametrize("difference", ["query", "model", "clips", "clip", "moved clip"])
def test_build_library_rejects_an_incomplete_library_of_something_else(tmp_path, clips, difference):
    folder = tmp_path / "library"
    with pytest.raises(KeyboardInterrupt):
        build(folder, clips, Numbers({20: stop}))
    other, pipe, query, message = clips, Numbers(), "what ?", ""
    if difference == "query":
        query, message = "who ?", "another query, 'what \\?'"
    elif difference == "model":
        pipe, message = Numbers(probe=-PROBE), "another model"
    elif difference == "clips":
        other, message = clips[1:], f"other clips, such as {clips[0]}"
    else:
        message = f"an earlier version of {clips[3]}"
        changed = Path(clips[3]) if difference == "clip" else tmp_path / "old"
        changed.write_text("99")
        if difference == "moved clip":
            os.utime(changed, (0, 0))
            changed.rename(clips[3])
    for _ in range(2):  # a refused call changes nothing
        with pytest.raises(
            ValueError, match=f"library.incomplete was begun with {message}. Delete it, or give an"
        ):
            pipe.build_library(other, folder, query=query)
    assert not folder.exists()
    if difference in ("query", "model", "clips"):
        build(folder, clips)
        check_whole(folder, clips)


def test_embedding_log_reads_all_complete_batches_of_a_file_cut_anywhere(tmp_path, clips):
    log = EmbeddingLog(tmp_path, "what ?", PROBE)
    sizes = [0]
    for start in range(0, 9, 3):
        log.add(clips[start : start + 3], [embedding_of(start + each) for each in range(3)])
        sizes.append(log.path.stat().st_size)
    content = log.path.read_bytes()
    assert len(content) == sizes[-1]
    cuts = {*range(0, len(content), 31), *sizes, *(size - 1 for size in sizes[1:])}
    for cut in sorted(cuts):
        log.path.write_bytes(content[:cut])
        whole = sum(size <= cut for size in sizes) - 1
        resumed = EmbeddingLog(tmp_path, "what ?", PROBE)
        assert resumed.resume(clips) == clips[3 * whole :]
        assert (resumed.count, resumed.path.exists()) == (3 * whole, True)
        if whole:
            assert resumed.dataset()["video"][:] == clips[: 3 * whole]


def test_build_library_leaves_nothing_if_no_clip_is_read(tmp_path, clips):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="none could be read; no library was written"):
        build(tmp_path / "empty" / "library", clips[7:8])
    with pytest.raises(ValueError, match=r"videos\[1\] is a int: give a path"):
        build(tmp_path / "empty" / "library", [clips[0], 5])
    with pytest.raises(ValueError, match=r"videos\[0\] holds half a character"):
        build(tmp_path / "empty" / "library", [os.fsdecode(b"caf\xe9.mp4")])
    assert list((tmp_path / "empty").iterdir()) == []


def test_build_library_checks_its_folder_before_it_reads_a_clip(tmp_path, clips):
    pipe = Numbers()
    (tmp_path / "file").touch()
    (tmp_path / "there").mkdir()
    for folder, message in (
        ("file/library", "file/library cannot be written .*(Not a dir|File exists)"),
        ("file", "file already exists"),
        ("there", "there already exists. Give a new folder"),
        ("a" * 250, "cannot be written .*File name too long"),
    ):
        with pytest.raises(ValueError, match=f"^output_dir: .*{message}"):
            build(tmp_path / folder, clips, pipe)
    assert pipe.read == []
    with pytest.raises(ValueError, match="there has no library.json. Give a folder that build_li"):
        ClipLibrary.load(tmp_path / "there")


@pytest.mark.parametrize("at", ["save", "rename"])
def test_build_library_keeps_the_embeddings_if_the_library_cannot_be_saved(
    tmp_path, clips, monkeypatch, at
):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        owner, name = (datasets.Dataset, "save_to_disk") if at == "save" else (Path, "rename")
        patch.setattr(owner, name, fail)
        with pytest.raises(ValueError, match="No space left on device.*Free space.*are kept"):
            build(tmp_path / "library", clips)
    assert os.listdir(tmp_path / "library.incomplete") == ["embeddings.arrow"]
    pipe = Numbers()
    build(tmp_path / "library", clips, pipe)
    assert pipe.read == [clips[7]]
    check_whole(tmp_path / "library", clips)


def test_library_save_writes_all_or_nothing(tmp_path, monkeypatch):
    library = library_of(torch.eye(6))
    library.save(tmp_path / "library")
    with pytest.raises(ValueError, match="output_dir: .*library already exists"):
        library.save(tmp_path / "library")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: stop())
        with pytest.raises(KeyboardInterrupt):
            library.save(tmp_path / "other")
    assert os.listdir(tmp_path) == ["library"]


# -- several processes, killed processes, a full disk ----------------------------------------


def own_progress_lock() -> None:
    """Give this process a lock for progress bars of its own.

    tqdm's is shared by a process and its copies. A copy that is killed with the lock, or made while
    another thread has it, leaves others waiting for ever.
    """
    for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):
        bar.set_lock(RLock())


def outcome(folder: Path, clips: list[str], pipe: Numbers, results) -> None:
    own_progress_lock()
    try:
        results.put(len(build(folder, clips, pipe).dataset))
    except ValueError as error:
        results.put(str(error))


def test_build_library_rejects_a_second_process_while_one_is_building(tmp_path, clips):
    fork, folder = get_context("fork"), tmp_path / "library"
    reached, go_on, results = fork.Event(), fork.Event(), fork.SimpleQueue()
    pipe = Numbers({20: lambda: (reached.set(), go_on.wait(600))})
    first = fork.Process(target=outcome, args=(folder, clips, pipe, results))
    first.start()
    assert reached.wait(600)
    with pytest.raises(ValueError, match="another process is writing .*library. Wait until it end"):
        build(folder, clips)
    go_on.set()
    first.join()
    assert results.get() == COUNT - 1
    check_whole(folder, clips)


def two_builds(folder: Path, clips: list[str]) -> None:
    """Start two builds at once: one builds, and the other builds or is refused."""
    fork = get_context("fork")
    results = fork.SimpleQueue()
    builds = [
        fork.Process(target=outcome, args=(folder, clips, Numbers(), results)) for _ in range(2)
    ]
    for each in builds:
        each.start()
    for each in builds:
        each.join()
    found = sorted((results.get() for _ in builds), key=str)
    assert found[0] == COUNT - 1, found
    assert "another process is writing" in found[1] or "already exists" in found[1]
    check_whole(folder, clips)


def build_to_be_killed(folder: Path, clips: list[str], pipe: Numbers) -> None:
    own_progress_lock()
    build(folder, clips, pipe)


def killed_builds(folder: Path, clips: list[str], kills: int) -> None:
    """Kill builds at random moments, check the folder after each, and complete the library."""
    fork, moments = get_context("fork"), random.Random(0)
    slowly = dict.fromkeys(range(COUNT), lambda: time.sleep(0.002))
    for _ in range(kills):
        run = fork.Process(target=build_to_be_killed, args=(folder, clips, Numbers(slowly)))
        run.start()
        time.sleep(moments.uniform(0, 0.12))
        run.kill()
        run.join()
        if folder.exists():
            assert len(ClipLibrary.load(folder).dataset) == COUNT - 1
            shutil.rmtree(folder)
        else:
            with pytest.raises(ValueError, match="is incomplete. Call build|has no library.json"):
                ClipLibrary.load(folder)
    build(folder, clips)
    check_whole(folder, clips)


def test_build_library_of_two_processes_is_written_by_one(tmp_path, clips):
    two_builds(tmp_path / "library", clips)


def test_build_library_killed_four_times_continues_to_the_same_library(tmp_path, clips):
    killed_builds(tmp_path / "library", clips, 4)


@pytest.mark.slow
def test_build_library_of_two_processes_is_written_by_one_in_ten_rounds(tmp_path, clips):
    for number in range(10):
        two_builds(tmp_path / f"library{number}", clips)


@pytest.mark.slow
def test_build_library_killed_twenty_times_continues_to_the_same_library(tmp_path, clips):
    killed_builds(tmp_path / "library", clips, 20)


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        pytest.param(500, False, id="within the schema"),
        pytest.param(3000, True, id="within the embeddings"),
        pytest.param(8800, True, id="within the library"),
    ],
)
def test_build_library_reports_a_full_disk_and_continues(tmp_path, clips, size, kept):
    folder = tmp_path / "library"
    message = message_on_a_full_disk(lambda: build(folder, clips, Numbers()), size, ValueError)
    assert message.startswith("output_dir: ") and "\n" not in message
    assert "cannot be written (" in message and message.endswith("the same call continues.")
    assert not folder.exists()
    pipe = Numbers()
    build(folder, clips, pipe)
    assert (len(pipe.read) < COUNT) == kept
    check_whole(folder, clips)


def test_only_writer_removes_the_rest_of_a_completed_build(tmp_path, clips):
    """The process was killed between the rename and the removal."""
    library_of(torch.eye(6)).save(tmp_path / "library")
    (tmp_path / "library.incomplete").mkdir()
    (tmp_path / "library.incomplete" / "embeddings.arrow").touch()
    with pytest.raises(ValueError, match="already exists"), only_writer(tmp_path / "library"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["clips", "library"]
