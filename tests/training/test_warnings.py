"""The commands print no warning, because there is nothing that a user could do about it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from modeling_vljepa import LORA_TARGET_MODULES
from tests.tiny import TEXTS, tiny_model, tiny_recipe, tiny_rows, tiny_settings, write_rows
from training.arguments import ModelArguments, ProcessorArguments
from training.model.adapters import add_adapters
from training.model.recipe_model import new_model

ROOT = Path(__file__).parents[2]
PROGRESS = re.compile(r"\d+%\||\d+ ?(it|file|text|examples)? \[|(it|file|text|examples)/s")
# Lines of stderr that are expected: a pattern, and the reason.
EXPECTED = {
    "mtime may not be reliable": "the checkpoints of this run are written within one second",
}

SCRIPT = """
import sys
from eval.evaluate import main as evaluate
from training.publish import main as publish
from training.train import main as train
from training.train_decoder import main as train_decoder
recipe, decoder, benchmarks, out = sys.argv[1:]
train([recipe])
lora = ["model.config={}", "model.lora={r: 2}", f"training.output_dir={out}/lora"]
train([recipe, f"model.checkpoint={out}/first", *lora])
train_decoder([decoder])
evaluate(["--model", f"{out}/decoder", "--tasks", "all", "--benchmarks", benchmarks])
publish(["--model", f"{out}/decoder", "--repo", "me/tiny", "--dry-run"])
"""


def unexpected(stderr: str) -> list[str]:
    """Return the lines that are neither empty, progress bars nor expected."""
    lines = [line for line in re.split("[\r\n]+", stderr) if line.strip()]
    known = [PROGRESS, *map(re.compile, EXPECTED)]
    return [line for line in lines if not any(pattern.search(line) for pattern in known)]


def test_unexpected_finds_a_warning_among_progress_bars():
    """The positive control of the test below."""
    bars = "media:   5%|5 | 1/20 [00:00<00:02,  8.87file/s]\r\nReading clips: 0 examples [00:00]\n"
    warning = "file.py:3: FutureWarning: x is deprecated"
    assert unexpected(f"{bars}{warning}\n  x()\n\n") == [warning, "  x()"]


def test_new_model_has_the_special_tokens_of_its_tokenizer():
    """Otherwise Trainer changes them and warns."""
    arguments = ModelArguments(config=tiny_settings(), vocab_size=300)
    model, processor = new_model(arguments, ProcessorArguments(image_size=32), ["a b c"], seed=0)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(processor.tokenizer, name)
        assert token is not None and vars(model.config.predictor_config)[name] == token


def test_adapted_model_hides_the_warning_of_peft(recwarn):
    get_peft_model(tiny_model(), LoraConfig(target_modules=LORA_TARGET_MODULES))
    message = "`is_gradient_checkpointing` is deprecated"
    assert any(message in str(warning.message) for warning in recwarn)  # positive control
    recwarn.clear()
    add_adapters(tiny_model(), {"r": 2})
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.long
def test_commands_print_no_warning(tmp_path):
    """From training to publication, in one process, with Python's own choice of warnings."""
    rows = tiny_rows(tmp_path)
    checkpoints = {"output_dir": f"{tmp_path}/first", "save_strategy": "steps", "save_steps": 2}
    recipe = tiny_recipe(rows, **checkpoints)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    decoder = {
        "model": {
            "checkpoint": f"{tmp_path}/first",
            "config": {"decoder_config": {**sizes, **heads}, "decoder_prefix_tokens": 2},
        },
        "data": {"sources": [{"rows": str(rows)}], "validation": [{"rows": str(rows)}]},
        "training": {
            "output_dir": f"{tmp_path}/decoder",
            **{"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
            **{"precision": "fp32", "use_cpu": True, "report_to": "none"},
        },
    }
    one_query = write_rows(
        tmp_path / "captions.jsonl",
        [{"video": "wide.mp4", "target": text} for text in TEXTS[:2]],
    )
    shared = {"rows": str(one_query), "description": "a test", "query": ""}
    benchmarks = {
        "questions": {"task": "vqa", "rows": str(rows), "description": "a test"}
        | {"train_rows": str(rows)},
        "clips": {"task": "retrieval", **shared},
        "captions": {"task": "captioning", "train_rows": str(one_query), **shared},
    }
    for name, content in (("decoder", decoder), ("benchmarks", benchmarks)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    files = [str(recipe), f"{tmp_path}/decoder.yaml", f"{tmp_path}/benchmarks.yaml", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONWARNINGS", None)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *files],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert unexpected(run.stderr) == []
