"""Small commands that prepare experiments or measure their cost."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import cost, read_gguf, sample_rows, small_language_model
from processing import read_rows
from tests.tiny import tiny_rows
from training.arguments import RecipeError

ROOT = Path(__file__).parents[2]


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


def test_sample_rows_keep_addresses_and_characters_that_are_no_ends_of_lines(tmp_path):
    given = [
        {"image": "https://host/a.png", "target": "a\u2028b"},
        {"image": "zip://p.png::/data/p.zip", "target": "c\u0085d\u2029"},
        {"video": "hf://datasets/a/b/c.mp4", "target": "e"},
    ]
    lines = [json.dumps(each, ensure_ascii=False) for each in given]
    rows = tmp_path / "in" / "test.jsonl"
    rows.parent.mkdir()
    rows.write_bytes("\n\r\n".join(lines).encode("utf-8-sig"))  # blank lines are no rows
    sample_rows.main([str(rows), "--output", str(tmp_path / "out")])
    found = (tmp_path / "out" / "in_test.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(each) for each in found if each] == given


def test_sample_rows_refuse_two_files_of_one_name(tmp_path):
    paths = [tmp_path / folder / "x" / "test.jsonl" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text('{"image": "a.png", "target": "a"}\n')
    message = f"^{paths[0]} and {paths[1]}: the sample of each would be x_test.jsonl; give them"
    with pytest.raises(ValueError, match=message):
        sample_rows.main([*map(str, paths), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[1]", r"not a JSON object but a list; correct"),
        (b'{"image": ', r"not valid JSON \(.*\); correct"),
        (b'{"image": "\xff"}', r"not UTF-8; correct"),
    ],
)
def test_sample_rows_name_a_line_that_is_no_row(tmp_path, line, reason):
    good = tmp_path / "good" / "test.jsonl"
    bad = tmp_path / "bad" / "test.jsonl"
    for path, last in ((good, b'{"image": "b.png"}'), (bad, line)):
        path.parent.mkdir()
        path.write_bytes(b'{"image": "a.png", "target": "a"}\n\n' + last)
    with pytest.raises(ValueError, match=f"^{bad}:3: {reason} or remove the line.$"):
        sample_rows.main([str(good), str(bad), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


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


@pytest.mark.slow
def test_read_gguf_writes_what_transformers_reads(tmp_path):
    path = ROOT / "data/backbones/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip("needs `python -m training.demo_data.backbones` (270 MB)")
    read_gguf.main([str(path), "--output", str(tmp_path / "lm")])
    given = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    expected = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float32)
    found = model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, found[name]), name
    text = "A <|im_start|> red ball, 2 boxes\n and naïve café"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(**given)(text)["input_ids"]


def test_read_gguf_refuses_another_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        read_gguf.main([str(tmp_path / "model.safetensors"), "--output", str(tmp_path / "lm")])
    assert "model.safetensors is not a .gguf file" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="source: cannot load"):
        read_gguf.main([str(tmp_path / "none.gguf"), "--output", str(tmp_path / "lm")])
    assert not (tmp_path / "lm").exists()


def test_cost_is_the_median_time_without_the_first_call(monkeypatch):
    clock = iter([1, 1.002, 2, 2.004, 3, 3.003])
    monkeypatch.setattr(cost.time, "process_time", lambda: next(clock))
    calls = []
    assert cost.milliseconds(lambda: calls.append(1), 3) == 3.0
    assert len(calls) == 4
