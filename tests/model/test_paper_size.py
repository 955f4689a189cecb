"""The paper's model at full size, from random checkpoints in the formats of the real ones."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from modeling_vljepa import VLJEPAConfig
from tests.sources import tokenizer_of
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.long  # 6 GB on disk, 3 GB in memory

ROOT = Path(__file__).parents[2]
LIMIT = 12 * 2**30  # bytes


def write_checkpoint(folder: Path, config: PreTrainedConfig, **options: object) -> Path:
    """Write a bf16 model of full size with uniform random weights."""
    with torch.device("meta"):
        model = AutoModel.from_config(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(tensor.shape, dtype=torch.bfloat16).uniform_(
            -0.05, 0.05, generator=generator
        )
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=weights, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Path]:
    """Map each tensor's name to its file."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def read(files: dict[str, Path], name: str) -> torch.Tensor:
    with safe_open(files[name], "pt") as file:
        return file.get_tensor(name)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    paper = VLJEPAConfig()
    llama = AutoConfig.for_model(**{**paper.predictor_config.to_dict(), "num_hidden_layers": 16})
    return {
        "vision": write_checkpoint(folder / "vision", paper.vision_config),
        "predictor": write_checkpoint(folder / "predictor", llama, max_shard_size="1GB"),
        "text": write_checkpoint(folder / "text", paper.text_config),
    }


def test_init_checkpoint_builds_the_papers_model_in_little_memory_bit_by_bit(parts, tmp_path):
    output = tmp_path / "out"
    arguments = [word for part, path in parts.items() for word in (f"--{part}", str(path))]
    command = [sys.executable, "-m", "training.init_checkpoint", *arguments]
    run = subprocess.run(
        [*command, "--output", str(output), "--max-shard-size", "1GB"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(run.stdout, f"peak memory {peak / 2**30:.2f} GiB")
    assert peak < LIMIT

    # The paper's 304M, 490M and 300M, with the parts of each.
    lines = {line[:16].strip(): line[16:].split() for line in run.stdout.splitlines()}
    counts = {name: float(words[0][:-1]) for name, words in lines.items() if words[0][-1:] == "M"}
    assert counts["X-Encoder"] == 303.9
    assert counts["layers"] == 486.6
    assert counts["Predictor"] == pytest.approx(491.8, abs=0.1)
    assert counts["token table"] == 262.7
    assert counts["Y-Encoder"] == 302.9
    sums = ("X-Encoder", "Predictor", "token table", "Y-Encoder", "Y projection")
    assert counts["all"] == pytest.approx(sum(counts[name] for name in sums), abs=0.2)

    assert len(list(output.glob("model-*-of-*.safetensors"))) == 3
    stored = tensors(output)
    compared = 0
    for module, part in (
        ("x_encoder", "vision"),
        ("predictor", "predictor"),
        ("y_encoder", "text"),
    ):
        source = tensors(parts[part])
        for name in source:
            target = name
            if part == "vision" and name.startswith("predictor."):
                continue
            if name.startswith("layers.") and part == "predictor":
                index, rest = name.removeprefix("layers.").split(".", 1)
                if int(index) < 8:  # the Predictor takes the last 8 of 16 layers
                    continue
                target = f"layers.{int(index) - 8}.{rest}"
            result = read(stored, f"{module}.backbone.{target}")
            assert result.dtype == torch.bfloat16
            assert torch.equal(result, read(source, name)), name
            compared += 1
    new = {"predictor.visual_projection", "predictor_head.projection", "y_head.projection"}
    assert len(stored) == compared + 2 * len(new) + 1  # weights, biases, temperature

    config = json.loads((output / "config.json").read_text())
    assert config["embedding_dim"] == 1536 and config["predictor_config"]["is_causal"] is False
    assert tokenizer_of(output).pad_token == "<pad>"
