"""Measure a model: `python -m eval.evaluate --model DIR --tasks babyai_vqa easy_vqa`.

The command prints a table for each kind of benchmark, and writes `results.json`, `report.html`, and
`items.jsonl` with scores and predictions of every item, which `eval.compare` reads. Its items are
named by hashes; with `--predictions`, `predictions.jsonl` has their clips and texts, too.

Embeddings are stored in `embeddings/` while they are computed: after a kill, the same command
continues, and a second run embeds nothing. Several processes share the work:

    accelerate launch --num_processes 2 -m eval.evaluate --model DIR --tasks all
"""

import argparse
import json
import platform
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from transformers.utils.logging import disable_progress_bar

from eval.benchmarks import DATA, load_benchmarks, measurable
from eval.embed import ABLATIONS, work
from eval.embedding_store import EmbeddingStore, facts_of, weights_digest
from eval.items import FILE, PREDICTIONS, write_items, write_predictions
from eval.likelihood import LIKELIHOODS
from eval.models import Model, abilities, hub_commit, load_model
from eval.report import text_tables, write_report
from eval.results import TaskResult
from eval.tables import MissingDataError
from eval.task import Benchmark, Task
from eval.tasks import TASKS
from eval.team import Team
from modeling_vljepa import VLJEPATokenModel
from processing import VLJEPAProcessor
from processing.feature_store import FeatureError, FeatureStore
from processing.output import check_output_folder, complete_file, writing
from processing.stream_store import StreamStore

# Packages whose versions can change a score
PACKAGES = ("av", "datasets", "numpy", "pillow", "tokenizers", "torch", "transformers")


def at_least_one(text: str) -> int:
    """Parse the value of an option that must be a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text}; give 1 or more")
    return int(text)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.evaluate", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a model")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--tasks", required=True, nargs="+", help="benchmark names, or: all")
    parser.add_argument(
        "--benchmarks",
        type=Path,
        default=Path(__file__).with_name("benchmarks.yaml"),
        help="file, or folder of files, of entries; eval/paper has those of the paper",
    )
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder of published data; default: data"
    )
    parser.add_argument(
        "--ablation", choices=ABLATIONS, default="none", help="hide the pixels, or swap the queries"
    )
    parser.add_argument(
        "--output", type=Path, help="default: MODEL/eval, for an ablation MODEL/eval_ABLATION"
    )
    parser.add_argument("--batch-size", type=at_least_one, default=64)
    parser.add_argument(
        "--limit",
        type=at_least_one,
        help="only the first LIMIT rows of each benchmark, those of --validation, too; for a trial",
    )
    parser.add_argument(
        "--features",
        type=Path,
        help="a store of training.cache_features that contains every file or stream; those of "
        "--validation, too",
    )
    parser.add_argument(
        "--predictions",
        action="store_true",
        help=f"also write {PREDICTIONS}: clip, texts, prediction and scores of every item",
    )
    parser.add_argument(
        "--embeddings",
        type=Path,
        metavar="DIR",
        help="where embeddings are stored and found again; default: OUTPUT/embeddings",
    )
    parser.add_argument(
        "--likelihood",
        choices=LIKELIHOODS,
        help="of a model that predicts tokens: rank texts by their likelihood in this form",
    )
    parser.add_argument(
        "--validation",
        nargs="+",
        metavar="NAME",
        help="benchmarks of validation data, on which the form is chosen for each kind; TEST=NAME "
        "chooses that of the benchmark TEST alone, such as one with other candidates; of equally "
        f"good forms, the first of {', '.join(LIKELIHOODS)} is chosen",
    )
    parser.add_argument(
        "--validation-benchmarks",
        type=Path,
        default=Path(__file__).with_name("validation.yaml"),
        help="file of the entries of --validation",
    )
    args = parser.parse_args(argv)
    if args.likelihood is not None and args.validation is not None:
        parser.error("--validation chooses the form of the likelihood: leave --likelihood out")
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
    if args.embeddings is None:
        args.embeddings = args.output / "embeddings"
    return args


def model_facts(args: argparse.Namespace, weights: str) -> dict[str, Any]:
    """Return the model's revision on the Hub, a hash of its weights, and the seeds of its training.

    The revision is None for a folder, and the seeds are None without `recipes.yaml`. A stage whose
    recipe states no seed has None, too.
    """
    recipes, seeds = Path(args.model) / "recipes.yaml", None
    if recipes.is_file():
        stages = [each["training"] for each in yaml.safe_load(recipes.read_text(encoding="utf-8"))]
        seeds = {Path(stage["output_dir"]).name: stage.get("seed") for stage in stages}
    return {
        "revision": hub_commit(args.model, args.revision),
        "weights": weights,
        "training_seeds": seeds,
    }


def write_results(
    path: Path,
    model_name: str,
    results: list[TaskResult],
    features: FeatureStore | StreamStore | None = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write the scores and everything that they depend on.

    Times, absolute paths and the number of processes are left out, so that equal runs write equal
    files.

    Args:
        facts: see [`model_facts`].
    """
    stored = {} if features is None else {"features": features.precision()}
    versions = {"python": platform.python_version()}
    content = {
        "model": model_name,
        **(facts or {}),
        **stored,
        "versions": versions | {package: version(package) for package in PACKAGES},
        "benchmarks": {result.name: result.as_json() for result in results},
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    with complete_file(path) as written:  # a kill leaves the results of the benchmarks before
        written.write_text(text + "\n", encoding="utf-8")


def open_features(
    args: argparse.Namespace, benchmark: Benchmark, model: Model, processor: VLJEPAProcessor
) -> FeatureStore | StreamStore | None:
    """Open the store of `--features` for a benchmark; return `None` without one."""
    if args.features is None:
        return None
    return TASKS[benchmark.task].features.open(
        args.features,
        model.base_model,
        processor.video_processor,
        num_frames=benchmark.num_frames,
    )


def chosen_likelihoods(
    args: argparse.Namespace,
    model: Model,
    processor: VLJEPAProcessor,
    store: EmbeddingStore,
    tests: list[Benchmark],
) -> dict[str, tuple[str, str]]:
    """Return the form of each test benchmark's likelihood, and why it is this one.

    Of the three forms, the one with the highest first score of the validation benchmarks that are
    given for this test, or else for its kind.

    Raises:
        ValueError: a name of `--validation` has no test of its kind, or has the rows of a test.
    """
    words = [word.rpartition("=") for word in args.validation]
    known = load_benchmarks(args.validation_benchmarks, [name for *_, name in words], args.data)
    by_name = {benchmark.name: benchmark for benchmark in known}
    given: dict[tuple[str, str], list[Benchmark]] = {}  # by kind and test, "" for all of a kind
    for test, equals, name in words:
        kind = by_name[name].task
        if not any(kind == one.task and test in ("", one.name) for one in tests):
            raise ValueError(
                f"--validation {test}{equals}{name} is of the kind {kind}, and --tasks has no such "
                f"benchmark{test and f' named {test}'}. It has: {', '.join(t.name for t in tests)}"
            )
        rows = by_name[name].rows
        for one in tests:
            if rows is not None and one.rows is not None and rows.samefile(one.rows):
                raise ValueError(
                    f"--validation {name} has the rows of the test {one.name} ({rows}): choose the "
                    "form of the likelihood on other rows"
                )
        given.setdefault((kind, test), []).append(by_name[name])
    forms = {key: best_form(args, model, processor, store, own) for key, own in given.items()}
    found = {}
    for test in tests:
        chosen = forms.get((test.task, test.name)) or forms.get((test.task, ""))
        if chosen is not None:
            found[test.name] = chosen
            print(f"{test.name}: likelihood {', '.join(chosen)}")
    return found


def best_form(
    args: argparse.Namespace,
    model: Model,
    processor: VLJEPAProcessor,
    store: EmbeddingStore,
    benchmarks: list[Benchmark],
) -> tuple[str, str]:
    """Return the form with the highest mean of the benchmarks' first scores, and all means.

    Of equal means, that of the first form counts.
    """
    means = {}
    for form in LIKELIHOODS:
        scores = []
        for benchmark in benchmarks:
            task = Task(
                model,
                processor,
                benchmark,
                batch_size=args.batch_size,
                limit=args.limit,
                features=open_features(args, benchmark, model, processor),
                store=store,
                likelihood=form,
            )
            scores.append(next(iter(TASKS[benchmark.task].evaluate(task).scores.values())).value)
        means[form] = sum(scores) / len(scores)
    names = ", ".join(benchmark.name for benchmark in benchmarks)
    listed = ", ".join(f"{form} {mean:.4f}" for form, mean in means.items())
    return max(means, key=means.get), f"validation on {names}: {listed}"


def check_likelihood(args: argparse.Namespace, model: Model) -> None:
    """Raise `ValueError` if likelihoods are asked for of a model that has none."""
    for option in ("likelihood", "validation"):
        if vars(args)[option] is not None and not isinstance(model, VLJEPATokenModel):
            raise ValueError(
                f"--{option}: this model predicts embeddings, which have no likelihood; leave it "
                "out, or give a model of training.token_baseline"
            )


def measure(args: argparse.Namespace, team: Team) -> None:
    """Measure all benchmarks and write the results, in process 0."""
    # 1. the benchmarks and the folders: checked before the model is loaded
    check_output_folder("--output", args.output)
    check_output_folder("--embeddings", args.embeddings)
    benchmarks = load_benchmarks(args.benchmarks, args.tasks, args.data)

    # 2. the model, with its decoder if it has one, and its processor
    model, processor = load_model(args.model, args.revision)
    check_likelihood(args, model)
    benchmarks = measurable(
        benchmarks, args.tasks, model.config.decoder_config is not None, **abilities(model)
    )
    model.to(team.device)
    model_name = Path(args.model).resolve().name
    weights = weights_digest(model.base_model)
    known = facts_of(model.base_model, processor, weights)
    store = EmbeddingStore.open(args.embeddings, known, team)
    if store.embeds:
        print(f"{store.writer.folder}: {len(store.embeds)} embeddings are read")
    facts = model_facts(args, weights)
    forms = {}
    if args.validation is not None:
        forms = chosen_likelihoods(args, model, processor, store, benchmarks)

    # 3. one benchmark after the other; results are written after each, so none is lost
    results, features = [], None
    for benchmark in benchmarks:
        print(f"{benchmark.name}: {benchmark.description}")
        features = open_features(args, benchmark, model, processor)
        likelihood, reason = forms.get(benchmark.name, (args.likelihood, None))
        task = Task(
            model,
            processor,
            benchmark,
            likelihood=likelihood,
            likelihood_from=reason,
            batch_size=args.batch_size,
            ablation=args.ablation,
            limit=args.limit,
            features=features,
            store=store,
        )
        try:
            result = TASKS[benchmark.task].evaluate(task)
        except MissingDataError as error:
            if args.tasks != ["all"]:
                raise
            print(f"left out, for its data are missing: {error}")
            continue
        if result.skipped:
            print(f"{len(result.skipped)} rows left out:", *result.skipped[:20], sep="\n  ")
        results.append(result)
        with writing(args.output):
            args.output.mkdir(parents=True, exist_ok=True)
            first = len(results) == 1
            write_items(args.output / FILE, result.name, result.items, append=not first)
            if args.predictions:
                path = args.output / PREDICTIONS
                write_predictions(path, result.name, result.items, append=not first)
            else:  # that of an earlier run would not belong to these results
                (args.output / PREDICTIONS).unlink(missing_ok=True)
            write_results(args.output / "results.json", model_name, results, features, facts)
    team.end()
    if not results:
        raise MissingDataError(f"{args.benchmarks}: the data of no benchmark could be read")

    # 4. tables and report
    print(text_tables(results))
    trainer_state = Path(args.model) / "trainer_state.json"
    with writing(args.output, "results.json is complete."):
        write_report(args.output / "report.html", model_name, results, trainer_state)
    print(f"\n{args.output / 'results.json'}\n{args.output / 'report.html'}")


def embed_shares(args: argparse.Namespace, team: Team) -> None:
    """Embed what process 0 asks for, in every other process."""
    disable_progress_bar()  # process 0 shows that of the weights, too
    model, processor = load_model(args.model, args.revision)
    model.to(team.device)
    team.serve(partial(work, model.base_model, processor))


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    team = Team.join()
    if team.rank == 0:
        measure(args, team)
    else:
        embed_shares(args, team)
    team.leave()


if __name__ == "__main__":
    try:
        main()
    except (FeatureError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
