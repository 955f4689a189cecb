"""Annotation files whose layout no mapping of columns can describe, as examples.

Each function reads the files of one data set. An entry names it with `form`.
"""

from collections.abc import Iterator
from pathlib import Path

from eval.egoexo4d import video_of
from processing.annotations import read_annotations, unique_json
from processing.columns import ColumnError, ExampleError

FORMS = ("json", "jsonl", "csv", "tsv", "keyed lines", "groups", "crosstask", "egoexo4d keysteps")


def read_form(form: str, paths: list[Path], records: str, header: list[str] | None) -> Iterator:
    """Yield the examples of annotation files; each has `file`, the file's name without suffix.

    Broken ones are yielded as [`ExampleError`].

    Args:
        form: one of `FORMS`.
        records, header: see [`read_annotations`].

    Raises:
        ColumnError: a file is not of this form.
    """
    match form:
        case "crosstask":
            yield from crosstask(paths)
        case "egoexo4d keysteps":
            yield from egoexo4d_keysteps(paths)
        case _:
            for path in paths:
                if path.is_dir():
                    raise ColumnError(f"{path} is a folder, not a file of the form {form}")
                for example in _read(form, path, records, header):
                    if not isinstance(example, dict):
                        raise ColumnError(f"{path}: an example is {example!r:.80}, not an object")
                    yield example if "file" in example else type(example)(example, file=path.stem)


def _read(form: str, path: Path, records: str, header: list[str] | None) -> Iterator:
    if form == "keyed lines":
        return keyed_lines(path)
    if form == "groups":
        return groups(path)
    return read_annotations(path, form, records=records, header=header)


def keyed_lines(path: Path) -> Iterator[dict]:
    """Yield `{key, value}` of each line: the first word, and the rest.

    ImageNet's LOC_synset_mapping.txt: "n01440764 tench, Tinca tinca".
    """
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            key, _, value = line.strip().partition(" ")
            yield {"key": key, "value": value.strip()}


def groups(path: Path) -> Iterator[dict]:
    """Yield `{group, key, value}` of a JSON object of objects.

    WorldPrediction-WM.json: `{dataset: {uid: {states, candidates, ground_truth}}}`.
    """
    try:
        content = unique_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ColumnError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict) or not all(
        isinstance(each, dict) for each in content.values()
    ):
        raise ColumnError(f"{path} is not an object of objects")
    for group, members in content.items():
        for key, value in members.items():
            yield {"group": group, "key": key, "value": value}


def crosstask(paths: list[Path]) -> Iterator[dict]:
    """Yield the videos of CrossTask: `task`, `video`, `url`, `title`, and `segments` of `step`,
    `start` and `end`.

    Args:
        paths: a file of tasks such as tasks_primary.txt, a list of videos such as videos_val.csv,
            and the folder of annotations, `{task}_{video}.csv` with a step's number from 1.

    A video without its file of steps gives an [`ExampleError`] in place of an example.

    Raises:
        ColumnError: a step's number exceeds the steps of its task.
    """
    if len(paths) != 3:
        raise ColumnError("crosstask needs tasks_primary.txt, videos_val.csv and annotations")
    tasks_file, videos_file, folder = paths
    tasks = {task["id"]: task for task in crosstask_tasks(tasks_file)}
    for video in read_annotations(videos_file, "csv", header=["task", "video", "url"]):
        if video["task"] not in tasks:
            continue  # a related task, which has no steps
        task = tasks[video["task"]]
        steps_file = folder / f"{video['task']}_{video['video']}.csv"
        if not steps_file.is_file():
            yield ExampleError(f"the steps of a video are missing: {steps_file}")
            continue
        segments = []
        for row in read_annotations(steps_file, "csv", header=["step", "start", "end"]):
            number = row["step"].strip()
            if not number.isdecimal() or not 1 <= int(number) <= len(task["steps"]):
                raise ColumnError(
                    f"{steps_file}: step {number!r} is not from 1 to {len(task['steps'])}, the "
                    f"steps of {task['title']!r}"
                )
            step = task["steps"][int(number) - 1]
            segments.append({"step": step, "start": row["start"], "end": row["end"]})
        yield {**video, "title": task["title"], "steps": task["steps"], "segments": segments}


def crosstask_tasks(path: Path) -> Iterator[dict]:
    """Yield `id`, `title`, `url` and `steps` of the blocks of five lines in tasks_primary.txt.

    Raises:
        ColumnError: a block has another number of lines or of steps.
    """
    blocks = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").strip().split("\n\n")
    for block in filter(str.strip, blocks):
        lines = [line.strip() for line in block.strip().split("\n")]
        if len(lines) != 5:
            raise ColumnError(
                f"{path}: the block of {lines[0]!r} has {len(lines)} lines, not id, title, url, "
                "number of steps, steps"
            )
        name, title, url, count, steps = lines
        steps = [step.strip() for step in steps.split(",")]
        if count != str(len(steps)):
            raise ColumnError(f"{path}: {title!r} states {count} steps and lists {len(steps)}")
        yield {"id": name, "title": title, "url": url, "steps": steps}


def egoexo4d_keysteps(paths: list[Path]) -> Iterator[dict]:
    """Yield the takes of a keystep file: `take_uid`, `take_name`, `video` and `segments`.

    `video` is the path of the camera wearer's video in the folder of takes.json: the downscaled
    one if it exists, else the original.

    Args:
        paths: annotations/keystep_val.json, and takes.json in the folder of the downloads.

    A take that is not in takes.json gives an [`ExampleError`] in place of an example.
    """
    if len(paths) != 2:
        raise ColumnError("egoexo4d keysteps needs annotations/keystep_val.json and takes.json")
    keysteps_file, takes_file = paths
    downloads = takes_file.parent
    takes = {take["take_uid"]: take for take in read_annotations(takes_file, "json")}
    for each in read_annotations(keysteps_file, "json", records="annotations"):
        take = takes.get(each["key"])
        if take is None:
            yield ExampleError(f"{takes_file} has no take {each['key']!r}")
        elif (video := ego_path(take, downloads)) is None:
            yield ExampleError(f"take {take['take_name']!r} has no camera with an rgb stream")
        else:
            facts = {"take_uid": each["key"], "take_name": take["take_name"], "video": video}
            yield {**facts, "segments": each["value"]["segments"]}


def ego_path(take: dict, downloads: Path) -> str | None:
    """Return the path of a take's ego video; that of the original if none was downloaded; `None`
    if the take has no such camera."""
    found = video_of(take, downloads)
    if found is not None:
        return str(found.relative_to(downloads))
    for streams in take["frame_aligned_videos"].values():
        if "rgb" in streams:
            return str(Path(take["root_dir"], streams["rgb"]["relative_path"]))
    return None


__all__ = ["FORMS", "read_form"]
