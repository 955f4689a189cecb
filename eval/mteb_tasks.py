"""Measure a model with the mteb library on entries of a benchmark file:

    python -m eval.mteb_tasks --model DIR --tasks all

An entry of the kind retrieval becomes two tasks of mteb, one per direction, and one of the kind
classification a zero-shot task. No network is used. mteb writes its results into `--output`.

The file is for tasks of your own. mteb's published tasks need no file:
`mteb.evaluate(eval.mteb_model.get_model(DIR), mteb.get_tasks(tasks=["MSRVTTT2V"]))`.
"""

import argparse
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTask, AbsTaskRetrieval, AbsTaskZeroShotClassification
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata

from eval.benchmarks import DATA, load_benchmarks
from eval.candidates import templates_of
from eval.evaluate import at_least_one
from eval.mteb_model import MEDIA, VLJEPAEncoder, get_model
from eval.task import Benchmark, Task, one_row_per_clip, origin_facts
from eval.tasks.retrieval import relevance, texts_of
from processing.rows import Excerpt, media_of

LETTER = {"image": "i", "video": "v"}  # in mteb's categories, such as t2v
SPLIT = "test"


def metadata(task: Task, name: str, **facts: Any) -> TaskMetadata:
    """Return mteb's description of a task on the rows of an entry."""
    origin = origin_facts(task.benchmark.origin, task.all_rows())
    return TaskMetadata(
        name=name,
        description=task.benchmark.description,
        dataset={"path": task.benchmark.name, "revision": origin["rows_sha256"]},
        eval_splits=[SPLIT],
        eval_langs=["eng-Latn"],
        **facts,
    )


def media_column(kind: str, media: list[str | bytes]) -> dict[str, list[dict]]:
    """Return a column of images or videos as `datasets` stores them."""
    return {
        kind: [
            {"bytes": each, "path": None}
            if isinstance(each, bytes)
            else {"bytes": None, "path": each}
            for each in media
        ]
    }


def dataset_of(kind: str, columns: dict[str, list]) -> Dataset:
    """Return columns, one of them images or videos, as a dataset that decodes nothing."""
    return Dataset.from_dict(columns).cast_column(kind, MEDIA[kind])


class Retrieval(AbsTaskRetrieval):
    """One direction of a retrieval entry: texts to media, or media to texts.

    Args:
        task ([`Task`]): the entry and the model whose query its rows ask.
        kind (`str`): `"image"` or `"video"`.
        from_text (`bool`): the queries are texts.
    """

    def __init__(self, task: Task, kind: str, from_text: bool):
        self.task, self.kind, self.from_text = task, kind, from_text
        super().__init__()

    @cached_property
    def metadata(self) -> TaskMetadata:
        """Description of the task; mteb deletes it with the data."""
        category = f"t2{LETTER[self.kind]}" if self.from_text else f"{LETTER[self.kind]}2t"
        return metadata(
            self.task,
            f"{self.task.benchmark.name}_{category}",
            type="Any2AnyRetrieval",
            category=category,
            modalities=["text", self.kind] if self.from_text else [self.kind, "text"],
            main_score="ndcg_at_10",
        )

    def load_data(self, **kwargs: Any) -> None:
        """Read the rows. A text is right for the clips that [`relevance`] gives it."""
        rows = self.task.rows()
        clips = [media_of(row) for row in one_row_per_clip(rows)]
        texts, text_of = texts_of(rows, self.task.benchmark.merge_texts)
        relevant = relevance(rows, clips, text_of)  # (V, T)
        text_ids = [f"text {index}" for index in range(len(texts))]
        clip_ids = [f"{self.kind} {index}" for index in range(len(clips))]
        about_texts = Dataset.from_dict({"id": text_ids, "text": texts})
        about_clips = dataset_of(self.kind, {"id": clip_ids, **media_column(self.kind, clips)})
        if self.from_text:
            queries, corpus, relevant = about_texts, about_clips, relevant.T
        else:
            queries, corpus = about_clips, about_texts
        right = {query: {} for query in queries["id"]}
        for query, document in relevant.nonzero().tolist():
            right[queries["id"][query]][corpus["id"][document]] = 1
        split = RetrievalSplitData(
            queries=queries, corpus=corpus, relevant_docs=right, top_ranked=None
        )
        self.dataset = {"default": {SPLIT: split}}
        self.data_loaded = True


class ZeroShot(AbsTaskZeroShotClassification):
    """A classification entry: the label nearest to the medium.

    Args:
        task ([`Task`]): the entry and the model whose query its rows ask.
        kind (`str`): `"image"` or `"video"`.

    Raises: `ValueError` for an entry with several templates, since mteb has one text per label.
    """

    def __init__(self, task: Task, kind: str):
        templates = templates_of(task, task.model.config.target_prompts["action"])
        if len(templates) > 1:
            raise ValueError(
                f"{task.benchmark.name}: mteb has one text per label; leave {len(templates) - 1} "
                "of the templates out, or use eval.evaluate"
            )
        self.task, self.kind, self.template = task, kind, templates[0]
        self.input_column_name = kind
        super().__init__()

    @cached_property
    def metadata(self) -> TaskMetadata:
        """Description of the task; mteb deletes it with the data."""
        is_image = self.kind == "image"
        return metadata(
            self.task,
            self.task.benchmark.name,
            type="ZeroShotClassification" if is_image else "VideoZeroshotClassification",
            category=f"{LETTER[self.kind]}2t",
            modalities=[self.kind, "text"],
            main_score="accuracy",
        )

    @property
    def labels(self) -> list[str]:
        """The candidate labels, without the template."""
        given = self.task.benchmark.given_candidates()
        return given or sorted({row["target"] for row in self.task.all_rows()})

    def load_data(self, **kwargs: Any) -> None:
        """Read the rows. Raises: `ValueError` for a target that is not a candidate."""
        rows, index_of = self.task.rows(), {label: at for at, label in enumerate(self.labels)}
        if strange := sorted({row["target"] for row in rows} - index_of.keys()):
            raise ValueError(f"{self.metadata.name}: not among the candidates: {strange[0]}")
        columns = media_column(self.kind, [media_of(row) for row in rows])
        columns["label"] = [index_of[row["target"]] for row in rows]
        self.dataset = DatasetDict({SPLIT: dataset_of(self.kind, columns)})
        self.data_loaded = True

    def get_candidate_labels(self) -> list[str]:
        return [self.template.replace("{}", label) for label in self.labels]


def mteb_tasks(task: Task) -> list[AbsTask]:
    """Return mteb's tasks for one entry.

    Raises: `ValueError` for an entry of another kind, with images and videos, with parts of videos,
        or with several queries: mteb's tasks have none of these.
    """
    benchmark, rows = task.benchmark, task.rows()
    if benchmark.task not in ("retrieval", "classification"):
        raise ValueError(
            f"{benchmark.name}: {benchmark.task} has no task in mteb; use eval.evaluate, or an "
            "entry of the kind retrieval or classification"
        )
    kinds = {kind for row in rows for kind in MEDIA if kind in row}
    if len(kinds) > 1:
        raise ValueError(f"{benchmark.name}: mteb has no pool of images and videos; split the rows")
    if any(isinstance(media_of(row), Excerpt) for row in rows):
        raise ValueError(f"{benchmark.name}: mteb's tasks have whole videos; cut the clips first")
    benchmark.check_one_query(rows)
    kind = kinds.pop()
    if benchmark.task == "classification":
        return [ZeroShot(task, kind)]
    return [Retrieval(task, kind, from_text) for from_text in (True, False)]


def measure(
    encoder: VLJEPAEncoder,
    benchmarks: list[Benchmark],
    output: Path,
    *,
    limit: int | None = None,
    batch_size: int = 32,
) -> dict[str, dict[str, float]]:
    """Run the tasks of the entries through `mteb.evaluate`; return scores by the task's name.

    Args:
        encoder: its prompts and number of frames are set to those of each entry.
        output: folder of mteb's results.
        limit: only the first rows, for a trial.
    """
    scores = {}
    for benchmark in benchmarks:
        task = Task(encoder.model, encoder.processor, benchmark, limit=limit)
        tasks = mteb_tasks(task)
        query = task.rows()[0]["query"]
        encoder.model_prompts = {each.metadata.name: query for each in tasks}
        encoder.num_frames = benchmark.num_frames
        found = mteb.evaluate(
            encoder,
            tasks,
            cache=mteb.ResultCache(output),
            overwrite_strategy="always",
            encode_kwargs={"batch_size": batch_size},
        )
        for each in found.task_results:
            scores[each.task_name] = each.scores[SPLIT][0]
    return scores


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.mteb_tasks", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a model")
    parser.add_argument("--tasks", required=True, nargs="+", help="entries of the file, or: all")
    parser.add_argument("--benchmarks", type=Path, default=Path(__file__).with_name("mteb.yaml"))
    parser.add_argument("--data", type=Path, default=DATA, help="folder of published data")
    parser.add_argument("--output", type=Path, default=Path("runs/mteb"))
    parser.add_argument("--batch-size", type=at_least_one, default=32)
    parser.add_argument("--limit", type=at_least_one, help="only the first LIMIT rows, for a trial")
    args = parser.parse_args(argv)
    benchmarks = load_benchmarks(args.benchmarks, args.tasks, args.data)
    scores = measure(
        get_model(args.model),
        benchmarks,
        args.output,
        limit=args.limit,
        batch_size=args.batch_size,
    )
    for name, found in scores.items():
        kinds = ("accuracy",) if "hit_rate_at_1" not in found else ("hit_rate_at_1", "ndcg_at_10")
        print(f"{name}: " + ", ".join(f"{metric} {found[metric]:.4f}" for metric in kinds))
    print(f"results of mteb: {args.output}")


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
