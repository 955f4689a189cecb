"""A model built from small real backbones is still pretrained in each part."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from eval.backbones import main as ask
from eval.backbones import neighbours, perplexity, put_back, randomise
from tests import sources
from training.init_checkpoint import main as build

ROOT = Path(__file__).parents[2]
FETCHED = ROOT / "data" / "backbones"
GGUF = FETCHED / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_init_checkpoint_keeps_each_part_of_a_small_real_model_pretrained(tmp_path):
    rows = ROOT / "data" / "demo" / "easy_vqa" / "test_vqa.jsonl"
    if not GGUF.exists() or not rows.exists():
        pytest.skip("needs `python -m training.demo_data.backbones` (270 MB) and `make data`")
    folders = {"--vision": FETCHED / "dinov2-s", "--predictor": GGUF, "--text": FETCHED / "minilm"}
    arguments = [word for option, path in folders.items() for word in (option, str(path))]
    build([*arguments, "--pad-token", "<|endoftext|>", "--output", str(tmp_path / "small")])
    picture = tmp_path / "backbones.png"
    words = ["--model", str(tmp_path / "small"), "--language-model", str(GGUF)]
    found = ask([*words, "--rows", str(rows), "--output", str(picture)])
    assert picture.stat().st_size > 20_000
    same, control = found["shape"]
    assert same > control + 0.3
    known, lost = found["perplexity"]
    assert known < 40 < 1000 < lost
    paired, control = found["paraphrase"]
    assert paired == 1 and control < 0.5


def test_put_back_gives_the_language_models_perplexity(tmp_path):
    """With random layers, the perplexity is another (the positive control)."""
    folders = {
        "--vision": sources.vision(tmp_path / "vision"),
        "--predictor": sources.language_model(tmp_path / "predictor"),
        "--text": sources.sentence_transformer(tmp_path / "text", "bert"),
    }
    arguments = [word for option, path in folders.items() for word in (option, str(path))]
    build([*arguments, "--layers", "3", "--output", str(tmp_path / "out")])
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    whole = AutoModelForCausalLM.from_pretrained(folders["--predictor"]).eval()
    ids = torch.randint(3, 250, (1, 30), generator=torch.Generator().manual_seed(0))
    expected = perplexity(whole, ids)
    # The two files hold the weights at other addresses, so MKL may round another last bit.
    assert perplexity(put_back(model, whole), ids) == pytest.approx(expected, rel=1e-5)
    model.predictor.backbone.layers = randomise(model.predictor.backbone.layers)
    assert perplexity(put_back(model, whole), ids) != pytest.approx(expected, rel=1e-3)


def test_neighbours_exclude_the_row_itself():
    embeds = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 2.0], [0.1, 1.0]])
    assert neighbours(embeds).tolist() == [1, 0, 3, 2]
