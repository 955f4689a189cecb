"""The model card of a published model.

Every number in it is measured. Scores and parameter counts come from the published `results.json`,
training time from the run, and the answers of the example from the published model.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData
from huggingface_hub import eval_result_entries_to_yaml as to_yaml
from matplotlib.figure import Figure

from eval.report import loss_figure, percent
from eval.tasks import TASKS
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from training.hub.examples import PICTURE, Examples, picture
from training.hub.licences import licence_of, licence_table
from training.hub.training_facts import data_table, duration, run_table, training_data

TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
# `custom_code` adds `trust_remote_code=True` to the Hub's snippets. The rest are tasks.
TAGS = [
    *("vl-jepa", "custom_code", "sentence-transformers", "video-text-to-text"),
    *("video-text-retrieval", "zero-shot-video-classification", "zero-shot-image-classification"),
]


def protocol_line(benchmark: dict[str, Any]) -> str:
    """Return a benchmark's protocol in one line."""
    facts = {name.replace("_", " "): value for name, value in benchmark["protocol"].items()}
    return "; ".join(f"{name}: {'none' if value == '' else value}" for name, value in facts.items())


def stage_of(recipe: dict[str, Any]) -> str:
    """Return a stage's name: that of its output folder, as in the table of runs."""
    return html.escape(Path(recipe["training"]["output_dir"]).name)


def hub_task(benchmark: dict[str, Any]) -> str:
    """Return the Hub's name of a benchmark's task, which depends on the kind of its media."""
    is_image = benchmark["protocol"].get("frames") == "1"
    return TASKS[benchmark["task"]].hub_tasks["image" if is_image else "video"]


def commit_of(benchmark: dict[str, Any]) -> str | None:
    """Return the commit of a benchmark's data on the Hub, or None if it is not stated."""
    revision = benchmark["protocol"].get("source_revision", "")
    return revision if re.fullmatch("[0-9a-f]{40}", revision) else None


def baselines_of(benchmark: dict[str, Any]) -> list[str]:
    """Return the names of the baselines of any score: not every score has all of them."""
    scores = benchmark["scores"].values()
    return list(dict.fromkeys(name for score in scores for name in score["baselines"]))


def main_metric(benchmark: dict[str, Any]) -> str:
    """Return the metric that the paper states, or the first one."""
    stated = (benchmark["paper"] or {}).get("metric")
    return stated if stated in benchmark["scores"] else next(iter(benchmark["scores"]))


def eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """Return each score with its protocol, for the card's `model-index`."""
    return [
        EvalResult(
            task_type=hub_task(benchmark),
            task_name=benchmark["task"].replace("_", " "),
            dataset_type=benchmark["protocol"].get("source_dataset", name),
            dataset_name=benchmark["title"],
            dataset_config=benchmark["protocol"].get("source_config"),
            dataset_split=benchmark["protocol"].get("source_split"),
            dataset_revision=commit_of(benchmark),
            dataset_args=benchmark["protocol"],
            metric_type=metric,
            metric_name=metric,
            metric_value=score["value"],
        )
        for name, benchmark in results["benchmarks"].items()
        for metric, score in benchmark["scores"].items()
    ]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, with equal bytes for equal figures."""
    figure.savefig(path, dpi=110, metadata={"Software": None})


def write_eval_results(folder: Path, repo: str, results: dict[str, Any]) -> None:
    """Write `.eval_results/*.yaml`, the Hub's newer format: the main score of each benchmark.

    An entry needs the Hub id of the data and the id of a task in their `eval.yaml`, and the Hub
    shows it if the data are registered as a benchmark (huggingface.co/docs/hub/eval-results). So
    scores on data that are not on the Hub are in `model-index` only. The ids of tasks cannot be
    known without the Hub: the configuration's name is used, as the Hub's own examples do.
    """
    for name, benchmark in results["benchmarks"].items():
        protocol, metric = benchmark["protocol"], main_metric(benchmark)
        if "source_dataset" not in protocol:
            continue
        entry = EvalResultEntry(
            dataset_id=protocol["source_dataset"],
            task_id=protocol.get("source_config", "default"),
            dataset_revision=commit_of(benchmark),
            value=benchmark["scores"][metric]["value"],
            source_url=f"https://huggingface.co/{repo}/blob/main/results.json",
            source_name="results.json",
            notes=f"{benchmark['title']}; {metric}; {protocol_line(benchmark)}",
        )
        path = folder / ".eval_results" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(to_yaml([entry])), encoding="utf-8")


def card_data(
    model: VLJEPAModel,
    repo: str,
    results: dict[str, Any],
    *,
    base_model: list[str],
    datasets: list[str],
) -> ModelCardData:
    """Return the card's metadata."""
    licences = {licence_of(source).name for source in model.config.backbones.values()}
    restricted = sorted(licences - {"apache-2.0", "mit"})
    measured = eval_results(results)
    return ModelCardData(
        language="en",
        license="apache-2.0" if not restricted else "other",
        license_name=None if not restricted else ", ".join(restricted),
        library_name="transformers",
        # The Hub's code snippet calls `pipeline` with this task, so it must be one that works here.
        pipeline_tag="visual-question-answering",
        tags=TAGS,
        base_model=base_model or None,
        datasets=datasets or None,
        model_name=repo.split("/")[-1] if measured else None,  # `eval_results` require it
        eval_results=measured or None,
    )


def write_card(
    folder: Path,
    *,
    repo: str,
    model: VLJEPAModel,
    processor: VLJEPAProcessor,
    results: dict[str, Any],
    recipes: list[dict],
    runs: list[dict],
    trainer_state: Path,
    base_model: list[str],
    code_url: str | None = None,
    examples: Examples | None = None,
) -> ModelCard:
    """Write `README.md` with its pictures, and the results in both of the Hub's formats.

    Args:
        recipes, runs: the recipes and the runs of training, in order.
        base_model: Hub ids of the models that this one is made from.
        code_url: address of the repository of the training code.
        examples: the clip in the repository with its answers, and the rows of the picture.
    """
    if trainer_state.is_file():
        figure = loss_figure(json.loads(trainer_state.read_text(encoding="utf-8"))["log_history"])
        if figure is not None:
            save_figure(figure, folder / "loss.png")
    if examples is not None:
        save_figure(picture(examples.shown), folder / PICTURE)
    write_eval_results(folder, repo, results)
    data = training_data(recipes)
    hub_ids = sorted({each.hub_id for each in data if each.hub_id is not None})
    card = ModelCard.from_template(
        card_data(model, repo, results, base_model=base_model, datasets=hub_ids),
        template_path=str(TEMPLATE),
        repo=repo,
        config=model.config,
        counts=results["parameters"],
        results=results,
        recipes=[(stage_of(recipe), yaml.safe_dump(recipe, sort_keys=False)) for recipe in recipes],
        run_table=run_table(runs) if runs else None,
        total_time=duration(sum(run["seconds"] for run in runs)),
        data_table=data_table(data) if data else None,
        has_unknown_data=any(each.licence is None for each in data),
        has_loss_curve=(folder / "loss.png").is_file(),
        crop=processor.video_processor.crop_size["height"],
        frames=processor.video_processor.num_frames,
        licences=licence_table(model.config.backbones),
        built_with_llama=any("meta-llama/" in s for s in model.config.backbones.values()),
        code_url=code_url,
        examples=examples,
        kind="video" if examples is None else examples.first.kind,
        literal=repr,
        count="{:,}".format,
        picture=PICTURE,
        percent=percent,
        protocol_line=protocol_line,
        baselines_of=baselines_of,
        main_metric=main_metric,
        on_hub=[
            each["title"]
            for each in results["benchmarks"].values()
            if "source_dataset" in each["protocol"]
        ],
    )
    card.save(folder / "README.md")
    return card
