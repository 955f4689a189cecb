"""Compare two evaluations item by item: `python -m eval.compare A B`.

A and B are folders that `eval.evaluate` wrote, or the folders of their models. For each metric the
command prints the scores of A and B, the mean difference B - A over the items, its 95 % interval,
and a p value. Clusters of items are resampled, as for the interval of one score; the p value flips
the signs of the clusters' differences. Neither is corrected for the number of metrics.

Several seeds: `--a runs/x/0/eval runs/x/1/eval --b runs/y/0/eval runs/y/1/eval`. Each item's scores
are averaged over the seeds first. The interval is about other items for these very models: it does
not contain the variance over seeds, so the table shows each seed's score.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from eval.intervals import FLIPS, RESAMPLES, difference_interval, sign_flip_p
from eval.items import FILE, Column, read_items
from eval.report import aligned, percent
from processing.output import check_output_file, writing

# Facts of a protocol that follow from the scores
OUTCOMES = {"interval", "clusters", "mean_cosine_to_the_true_text"}


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, read from its folder.

    Attributes:
        folder (`Path`): with `results.json` and `items.jsonl`.
        benchmarks (`dict[str, dict]`): those of `results.json`.
        columns (`dict[tuple[str, str], Column]`): by benchmark and metric.
    """

    folder: Path
    benchmarks: dict[str, dict]
    columns: dict[tuple[str, str], Column]


@dataclass(frozen=True)
class Comparison:
    """One metric of A and B.

    Attributes:
        benchmark, metric (`str`)
        type (`str`, *optional*): question type; `None` for all items.
        a, b, difference (`float`): means over the items, and over seeds; the difference is b - a.
        low, high, interval (`float`, `float`, `str`): 95 % interval of the difference, its kind.
        p (`float`): see [`sign_flip_p`].
        items, clusters (`int`): number of both.
        a_seeds, b_seeds (`list[float]`): mean of each evaluation.
    """

    benchmark: str
    metric: str
    type: str | None
    a: float
    b: float
    difference: float
    low: float
    high: float
    interval: str
    p: float
    items: int
    clusters: int
    a_seeds: list[float]
    b_seeds: list[float]


# -- reading -------------------------------------------------------------------------------


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation from its folder, its `results.json`, or the folder of its model.

    Raises: `FileNotFoundError` and `ValueError` that name the file and the cure.
    """
    folder = path.parent if path.name == "results.json" else path
    if not (folder / "results.json").is_file() and (folder / "eval" / "results.json").is_file():
        folder = folder / "eval"
    for name in ("results.json", FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}. Run eval.evaluate into this folder.")
    file = folder / "results.json"
    try:
        benchmarks = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
        scores = {
            (name, metric): score["value"]
            for name, benchmark in benchmarks.items()
            for metric, score in benchmark["scores"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not written by eval.evaluate ({error!r}).") from error
    columns = {key: column for key, column in read_items(folder / FILE).items() if key in scores}
    for key, column in columns.items():
        found, value = np.mean(list(column.values.values())), scores[key]
        if not np.isclose(found, value, rtol=0, atol=1e-6):
            raise ValueError(
                f"{folder}: {FILE} and results.json are of two evaluations: {' '.join(key)} is "
                f"{found:.4f} and {value:.4f}. Run eval.evaluate again."
            )
    return Evaluation(folder, benchmarks, columns)


def shared_metrics(evaluations: list[Evaluation], tasks: list[str] | None) -> list[tuple[str, str]]:
    """Return benchmark and metric of each score that all evaluations have items of; print the
    others.

    Args:
        tasks: only these benchmarks.

    Raises: `ValueError` if they share no score, or no score of one of `tasks`.
    """
    shared = [
        key for key in evaluations[0].columns if all(key in each.columns for each in evaluations)
    ]
    if tasks is not None:
        if unknown := [name for name in tasks if name not in {key[0] for key in shared}]:
            raise ValueError(f"--tasks: not in all evaluations: {', '.join(unknown)}")
        shared = [key for key in shared if key[0] in tasks]
    if not shared:
        lists = "; ".join(f"{each.folder}: {', '.join(each.benchmarks)}" for each in evaluations)
        raise ValueError(f"no score is in all evaluations. Their benchmarks: {lists}.")
    for each in evaluations:
        measured = [
            (name, metric)
            for name, benchmark in each.benchmarks.items()
            for metric in benchmark["scores"]
            if tasks is None or name in tasks
        ]
        if left := [" ".join(key) for key in measured if key not in shared]:
            print(
                "left out, not in all evaluations or no mean over items: "
                f"{', '.join(left)} of {each.folder}"
            )
    return shared


def common_items(evaluations: list[Evaluation], key: tuple[str, str], *, common: bool) -> list[str]:
    """Return the items that all evaluations have of a metric, in the order of the first.

    Args:
        common: evaluations may have other items, too.

    Raises: `ValueError` for different items without `common`, or if no item is shared.
    """
    first, *others = evaluations
    names = first.columns[key].values
    for other in others:
        theirs = other.columns[key].values
        missing, new = len(names.keys() - theirs.keys()), len(theirs.keys() - names.keys())
        if (missing or new) and not common:
            raise ValueError(
                f"{key[0]}, {key[1]}: different items. {missing} of the {len(names)} in "
                f"{first.folder} are missing in {other.folder}, and {new} of its {len(theirs)} "
                "are new. Evaluate both on the same rows, or compare the shared ones with --common."
            )
    shared = [name for name in names if all(name in other.columns[key].values for other in others)]
    if not shared:
        folders = ", ".join(str(each.folder) for each in evaluations)
        raise ValueError(f"{key[0]}, {key[1]}: no item is in all of {folders}.")
    return shared


def protocol_differences(evaluations: list[Evaluation], benchmark: str) -> dict[str, list]:
    """Return the facts of a benchmark's protocols that are not equal, one value per evaluation."""
    protocols = [each.benchmarks[benchmark]["protocol"] for each in evaluations]
    facts = dict.fromkeys(fact for protocol in protocols for fact in protocol)
    found = {fact: [protocol.get(fact) for protocol in protocols] for fact in facts}
    return {
        fact: values
        for fact, values in found.items()
        if fact not in OUTCOMES and any(value != values[0] for value in values)
    }


def check_candidates(
    evaluations: list[Evaluation], benchmark: str, differences: dict[str, list]
) -> None:
    """Raise `ValueError` if the models chose among different answers or labels."""
    if "candidates_sha256" in differences:
        counts = [each.benchmarks[benchmark]["protocol"]["candidates"] for each in evaluations]
        raise ValueError(
            f"{benchmark}: different candidate answers, {', '.join(map(str, counts))} of them. "
            "Evaluate with the same candidates, or compare anyway with --common."
        )


# -- comparing -----------------------------------------------------------------------------


def paired(
    a: np.ndarray, b: np.ndarray, clusters: np.ndarray, key: tuple[str, str], kind: str | None
) -> Comparison:
    """Compare a metric of the seeds A `(Sa, n)` with that of the seeds B `(Sb, n)`."""
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)  # (n,)
    differences = mean_b - mean_a
    found = difference_interval(differences, clusters, max(mean_a.max(), mean_b.max()))
    return Comparison(
        *key,
        kind,
        a=float(mean_a.mean()),
        b=float(mean_b.mean()),
        difference=float(differences.mean()),
        low=found.low,
        high=found.high,
        interval=found.kind,
        p=sign_flip_p(differences, clusters),
        items=len(differences),
        clusters=found.clusters,
        a_seeds=a.mean(axis=1).tolist(),
        b_seeds=b.mean(axis=1).tolist(),
    )


def compare_metric(
    a: list[Evaluation], b: list[Evaluation], key: tuple[str, str], *, common: bool
) -> Iterator[Comparison]:
    """Yield the comparison of a metric, and that of each question type."""
    names = common_items([*a, *b], key, common=common)
    first = a[0].columns[key]
    clusters = np.array([first.clusters[name] for name in names])
    seeds_a, seeds_b = (
        np.array([[each.columns[key].values[name] for name in names] for each in side])
        for side in (a, b)
    )
    yield paired(seeds_a, seeds_b, clusters, key, None)
    types = np.array([first.types.get(name, "") for name in names])
    for kind in sorted(set(first.types.values())):
        part = types == kind
        if part.any():
            yield paired(seeds_a[:, part], seeds_b[:, part], clusters[part], key, kind)


def table(comparisons: list[Comparison]) -> str:
    """Return the comparisons as a table, in percent; a CIDEr of 1.2 is shown as 120, as usual."""

    def mean(value: float, seeds: list[float]) -> str:
        return percent(value) + (f" ({', '.join(map(percent, seeds))})" if len(seeds) > 1 else "")

    rows = [["benchmark", "metric", "A", "B", "B - A", "95 % interval", "p", "items", "clusters"]]
    for each in comparisons:
        rows.append(
            [
                each.benchmark if each.type is None else "",
                each.metric if each.type is None else f"  {each.type}",
                mean(each.a, each.a_seeds),
                mean(each.b, each.b_seeds),
                f"{100 * each.difference:+.1f}",
                f"{100 * each.low:+.1f} to {100 * each.high:+.1f}",
                f"{each.p:.4f}",
                str(each.items),
                str(each.clusters),
            ]
        )
    return aligned(rows)


# -- the command ---------------------------------------------------------------------------


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pair", nargs="*", type=Path, metavar="FOLDER", help="A and B")
    parser.add_argument("--a", nargs="+", type=Path, metavar="FOLDER", help="the seeds of A")
    parser.add_argument("--b", nargs="+", type=Path, metavar="FOLDER", help="the seeds of B")
    parser.add_argument("--tasks", nargs="+", help="only these benchmarks")
    parser.add_argument(
        "--common", action="store_true", help="compare the items that all evaluations have"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE, too")
    args = parser.parse_args(argv)
    if args.pair and not (args.a or args.b) and len(args.pair) == 2:
        args.a, args.b = args.pair[:1], args.pair[1:]
    elif args.pair or not (args.a and args.b):
        parser.error("give two folders, A and B, or the seeds of each with --a and --b")
    return args


def main(argv: list[str] | None = None) -> list[Comparison]:
    args = arguments(argv)
    if args.json is not None:
        check_output_file("--json", args.json)

    # 1. the evaluations and their shared scores
    a, b = ([read_evaluation(path) for path in side] for side in (args.a, args.b))
    keys = shared_metrics([*a, *b], args.tasks)

    # 2. one benchmark's protocols after the other: scores of other candidates are not comparable
    differences = {}
    for benchmark in dict.fromkeys(benchmark for benchmark, _ in keys):
        differences[benchmark] = protocol_differences([*a, *b], benchmark)
        if not args.common:
            check_candidates([*a, *b], benchmark, differences[benchmark])

    # 3. the comparisons
    comparisons = [found for key in keys for found in compare_metric(a, b, key, common=args.common)]
    print(table(comparisons))
    print(
        f"\nin %; {RESAMPLES} resamples of clusters, p from flips of the clusters' signs (at most "
        f"{FLIPS}, two-sided)"
    )
    if args.common:
        print("shared items only: ranks and CIDEr were measured among all items of each evaluation")
    for benchmark, facts in differences.items():
        for fact, values in facts.items():
            print(f"{benchmark}: other {fact.replace('_', ' ')}: {' | '.join(map(str, values))}")
    if args.json is not None:
        content = {
            "a": [str(each.folder) for each in a],
            "b": [str(each.folder) for each in b],
            "common": args.common,
            "resamples": RESAMPLES,
            "flips": FLIPS,
            "protocol_differences": differences,
            "comparisons": [asdict(each) for each in comparisons],
        }
        with writing(args.json):
            args.json.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(content, indent=2, ensure_ascii=False)
            args.json.write_text(text + "\n", encoding="utf-8")
    return comparisons


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
