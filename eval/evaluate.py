"""Measure a model: `python -m eval.evaluate --model DIR --tasks babyai_vqa easy_vqa`.

The command prints a table for each kind of benchmark, and writes `results.json`, `report.html`, and
`items.jsonl` with scores and predictions of every item, which `eval.compare` reads.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from eval.benchmarks import load_benchmarks, measurable
from eval.embed import ABLATIONS
from eval.items import FILE, write_items
from eval.models import load_model
from eval.report import text_tables, write_report
from eval.results import TaskResult
from eval.task import Task
from eval.tasks import TASKS
from processing.feature_store import FeatureError, FeatureStore
from processing.output import check_output_folder, writing
from processing.stream_store import StreamStore


def at_least_one(text: str) -> int:
    """Parse the value of an option that must be a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text}; give 1 or more")
    return int(text)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.evaluate", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a model")
    parser.add_argument("--tasks", required=True, nargs="+", help="benchmark names, or: all")
    parser.add_argument(
        "--benchmarks", type=Path, default=Path(__file__).with_name("benchmarks.yaml")
    )
    parser.add_argument(
        "--ablation", choices=ABLATIONS, default="none", help="hide the pixels, or swap the queries"
    )
    parser.add_argument(
        "--output", type=Path, help="default: MODEL/eval, for an ablation MODEL/eval_ABLATION"
    )
    parser.add_argument("--batch-size", type=at_least_one, default=64)
    parser.add_argument("--limit", type=at_least_one, help="only the first LIMIT rows, for a trial")
    parser.add_argument(
        "--features",
        type=Path,
        help="a store of training.cache_features that contains every file or stream",
    )
    args = parser.parse_args(argv)
    if args.features is not None and args.ablation == "grey":
        parser.error("--ablation grey hides pixels, and --features has none: leave one out")
    if args.output is None:
        suffix = "" if args.ablation == "none" else f"_{args.ablation}"
        if not Path(args.model).is_dir():
            parser.error(
                f"{args.model} is not a folder; if it is a Hub id, name the folder for the results "
                "with --output"
            )
        args.output = Path(args.model) / f"eval{suffix}"
    return args


def write_results(
    path: Path,
    model_name: str,
    results: list[TaskResult],
    features: FeatureStore | StreamStore | None = None,
) -> None:
    """Write the scores and everything that they depend on.

    Times and absolute paths are left out, so that equal runs write equal files.
    """
    packages = ("av", "numpy", "pillow", "torch", "transformers")
    stored = {} if features is None else {"features": features.precision()}
    content = {
        "model": model_name,
        **stored,
        "versions": {package: version(package) for package in packages},
        "benchmarks": {result.name: result.as_json() for result in results},
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)

    # 1. the benchmarks and the folder: checked before the model is loaded
    check_output_folder("--output", args.output)
    benchmarks = load_benchmarks(args.benchmarks, args.tasks)

    # 2. the model, with its decoder if it has one, and its processor
    model, processor = load_model(args.model)
    benchmarks = measurable(benchmarks, args.tasks, model.config.decoder_config is not None)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model_name = Path(args.model).resolve().name

    # 3. one benchmark after the other; results are written after each, so none is lost
    results, features = [], None
    for benchmark in benchmarks:
        print(f"{benchmark.name}: {benchmark.description}")
        if args.features is not None:
            features = TASKS[benchmark.task].features.open(
                args.features,
                model.base_model,
                processor.video_processor,
                num_frames=benchmark.num_frames,
            )
        task = Task(
            model,
            processor,
            benchmark,
            batch_size=args.batch_size,
            ablation=args.ablation,
            limit=args.limit,
            features=features,
        )
        result = TASKS[benchmark.task].evaluate(task)
        if result.skipped:
            print(f"{len(result.skipped)} rows left out:", *result.skipped[:20], sep="\n  ")
        results.append(result)
        with writing(args.output):
            args.output.mkdir(parents=True, exist_ok=True)
            write_items(args.output / FILE, result.name, result.items, append=len(results) > 1)
            write_results(args.output / "results.json", model_name, results, features)

    # 4. tables and report
    print(text_tables(results))
    trainer_state = Path(args.model) / "trainer_state.json"
    with writing(args.output, "results.json is complete."):
        write_report(args.output / "report.html", model_name, results, trainer_state)
    print(f"\n{args.output / 'results.json'}\n{args.output / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except (FeatureError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
