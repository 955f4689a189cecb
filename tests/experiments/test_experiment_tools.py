"""Small commands that prepare experiments or measure their cost."""

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import cost, sample_rows, small_language_model
from processing import read_rows
from tests.tiny import tiny_rows


def test_sample_rows_are_evenly_spaced_and_find_their_media(tmp_path):
    rows = tmp_path / "babyai" / "test.jsonl"
    rows.parent.mkdir()
    given = [{"image": f"pictures/{index}.png", "target": str(index)} for index in range(10)]
    rows.write_text("".join(json.dumps(each) + "\n" for each in given))
    output = tmp_path / "samples" / "few"
    sample_rows.main([str(rows), "--count", "4", "--output", str(output)])
    found = [json.loads(each) for each in (output / "babyai_test.jsonl").read_text().splitlines()]
    assert [each["target"] for each in found] == ["0", "2", "5", "7"]
    path = os.path.normpath(output / found[1]["image"])
    assert path == str(rows.parent / "pictures" / "2.png")
    assert json.loads((output / "counts.json").read_text()) == {"babyai_test.jsonl": 4}
    sample_rows.main([str(rows), "--count", "99", "--output", str(tmp_path / "all")])
    assert len((tmp_path / "all" / "babyai_test.jsonl").read_text().splitlines()) == 10


def test_small_language_model_has_its_layers_and_reads_the_texts(tmp_path):
    rows = tiny_rows(tmp_path)
    for name in ("lm", "again"):
        options = ["--rows", str(rows), "--layers", "3", "--width", "64", "--vocab-size", "280"]
        small_language_model.main(["--output", str(tmp_path / name), *options, "--seed", "1"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (3, 64)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.08, rel=0.05)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    text = read_rows(rows)[0][0]["target"]
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < model.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_cost_is_the_median_time_without_the_first_call(monkeypatch):
    clock = iter([1, 1.002, 2, 2.004, 3, 3.003])
    monkeypatch.setattr(cost.time, "process_time", lambda: next(clock))
    calls = []
    assert cost.milliseconds(lambda: calls.append(1), 3) == 3.0
    assert len(calls) == 4
