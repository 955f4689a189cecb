"""The model card of a published model.

Every number in it comes from the published `results.json`: the evaluation and parameter counts.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData
from huggingface_hub import eval_result_entries_to_yaml as to_yaml

from eval.report import loss_figure, percent
from eval.tasks import TASKS
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from training.hub.licences import licence_of, licence_table

TEMPLATE = Path(__file__).parent / "model_card.md.jinja"


def protocol_line(benchmark: dict[str, Any]) -> str:
    """Return a benchmark's protocol in one line."""
    facts = {name.replace("_", " "): value for name, value in benchmark["protocol"].items()}
    return "; ".join(f"{name}: {'none' if value == '' else value}" for name, value in facts.items())


def eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """Return each score with its protocol, for the card's `model-index`."""
    return [
        EvalResult(
            task_type=TASKS[benchmark["task"]].hub_task,
            dataset_type=name,
            dataset_name=name,
            dataset_args=benchmark["protocol"],
            metric_type=metric,
            metric_name=metric,
            metric_value=score["value"],
        )
        for name, benchmark in results["benchmarks"].items()
        for metric, score in benchmark["scores"].items()
    ]


def write_eval_results(folder: Path, results: dict[str, Any]) -> None:
    """Write `.eval_results/*.yaml`, the Hub's newer format: one file for each benchmark."""
    target = folder / ".eval_results"
    target.mkdir()
    for name, benchmark in results["benchmarks"].items():
        entries = [
            EvalResultEntry(
                dataset_id=name,
                task_id=metric,
                value=score["value"],
                notes=protocol_line(benchmark),
            )
            for metric, score in benchmark["scores"].items()
        ]
        (target / f"{name}.yaml").write_text(yaml.safe_dump(to_yaml(entries)), encoding="utf-8")


def card_data(
    model: VLJEPAModel, repo: str, results: dict[str, Any], *, base_model: list[str]
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
        pipeline_tag="visual-question-answering",
        tags=["vl-jepa", "custom_code", "sentence-transformers", "video-text-retrieval"],
        base_model=base_model or None,
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
    trainer_state: Path,
    base_model: list[str],
) -> ModelCard:
    """Write `README.md` with the loss curve, and the results in both of the Hub's formats."""
    if trainer_state.is_file():
        figure = loss_figure(json.loads(trainer_state.read_text(encoding="utf-8"))["log_history"])
        if figure is not None:
            figure.savefig(folder / "loss.png", dpi=110, metadata={"Software": None})
    if results["benchmarks"]:
        write_eval_results(folder, results)
    card = ModelCard.from_template(
        card_data(model, repo, results, base_model=base_model),
        template_path=str(TEMPLATE),
        repo=repo,
        config=model.config,
        counts=results["parameters"],
        results=results,
        recipes=[yaml.safe_dump(recipe, sort_keys=False) for recipe in recipes],
        has_loss_curve=(folder / "loss.png").is_file(),
        crop=processor.video_processor.crop_size["height"],
        frames=processor.video_processor.num_frames,
        licences=licence_table(model.config.backbones),
        built_with_llama=any("meta-llama/" in s for s in model.config.backbones.values()),
        percent=percent,
        protocol_line=protocol_line,
    )
    card.save(folder / "README.md")
    return card
