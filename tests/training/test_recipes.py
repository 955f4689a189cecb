"""The recipes for the paper's model, the launch files, and the guide docs/training.md."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import StateDictType
from torch.distributed.run import get_args_parser
from transformers import AutoModel, AutoProcessor

from modeling_vljepa import VLJEPAConfig
from tests.tiny import tiny_model, tiny_recipe, tiny_rows
from training.arguments import (
    DataArguments,
    EvaluationArguments,
    Recipe,
    VLJEPATrainingArguments,
    read_recipe,
)
from training.model.recipe_model import check_config
from training.tokens.recipe import TokenModelArguments, TokenTrainingArguments
from training.tokens.recipe import read_recipe as read_token_recipe
from training.train import main as train

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "training" / "recipes"
LAUNCH = ROOT / "training" / "launch"
GUIDE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")

# In the order of training: each stage starts from the checkpoint of the previous one.
PAPER = [f"paper/{name}" for name in ("stage1_images", "stage2_video", "stage3_unfrozen", "sft")]
SMALL = ["small/stage2_24gb", "small/sft_24gb"]
LORA = ["small/stage2_lora_16gb", "small/sft_lora_24gb"]
OWN = "small/own_data"
GPUS_OF_THE_PAPER = 24 * 8

SCHEDULES = ("constant_with_warmup", "cosine")


def read(name: str, *overrides: str) -> Recipe:
    """Read a recipe by its name below `training/recipes`."""
    return read_recipe(str(RECIPES / f"{name}.yaml"), ["training.use_cpu=true", *overrides])


def header(name: str) -> str:
    """Return the comment at the top of a recipe as one line."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.removeprefix("#").strip() for line in comment)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_recipes_in_subfolders_are_all_listed_here():
    found = {str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.glob("*/*.yaml")}
    assert found == {*PAPER, *SMALL, *LORA, OWN}


@pytest.mark.parametrize("name", [*PAPER, *SMALL, *LORA])
def test_recipe_parses(name):
    recipe = read(name)
    check_config(recipe.model.config)
    training = recipe.training
    assert training.bf16
    assert training.save_strategy == "steps"
    assert training.max_steps % training.save_steps == 0
    assert 0 < training.warmup_steps < training.max_steps / 10
    assert training.lr_scheduler_type in SCHEDULES


@pytest.mark.parametrize(
    ("name", "frames", "batch", "parts", "steps", "rate", "schedule"),
    [
        # Section 3.2 of the paper and the stage table of Action100M (arXiv 2601.10592).
        ("paper/stage1_images", 1, 24_576, 1, 100_000, 5e-5, "constant_with_warmup"),
        ("paper/stage2_video", 8, 12_288, 1, 60_000, 5e-5, "constant_with_warmup"),
        ("paper/stage3_unfrozen", 32, 4 * 3_072, 4, 10_000, 1e-5, "constant_with_warmup"),
        # Frames and rate of SFT are our choices, as the header states.
        ("paper/sft", 32, 3_072, 1, 83_000, 5e-5, "cosine"),
    ],
)
def test_paper_recipes_have_the_papers_numbers(name, frames, batch, parts, steps, rate, schedule):
    recipe = read(name)
    training = recipe.training
    assert recipe.processor.num_frames == frames
    assert training.global_batch_size == batch
    assert training.gradient_accumulation_steps == parts
    assert training.max_steps == steps
    assert training.learning_rate == rate
    assert training.lr_scheduler_type == schedule
    # In every stage, these defaults are the paper's.
    assert training.objective == "info_nce"
    assert training.text_learning_rate_scale == 0.05
    assert recipe.model.lora is None


def test_paper_recipes_have_the_papers_number_of_samples():
    """Count 3.3 billion in pretraining and 3.6 with SFT, as in table 1."""
    samples = [r.max_steps * r.global_batch_size for r in (read(name).training for name in PAPER)]
    assert round(sum(samples[:3]) / 1e9, 1) == 3.3
    assert round(sum(samples) / 1e9, 1) == 3.6


@pytest.mark.parametrize(("name", "rows"), [*zip(PAPER, (128, 64, 16, 16), strict=True)])
def test_paper_recipes_divide_the_batch_among_the_papers_gpus(name, rows, monkeypatch):
    monkeypatch.setattr(VLJEPATrainingArguments, "world_size", GPUS_OF_THE_PAPER)
    assert read(name).training.per_device_train_batch_size == rows
    assert f"{rows} rows a process" in header(name)


@pytest.mark.parametrize(
    ("stages", "frozen"),
    [
        (PAPER, [True, True, False, True]),
        (SMALL, [True, True]),
        (["small/stage2_24gb", "small/sft_lora_24gb"], [True, True]),
        (LORA[:1], [True]),
    ],
)
def test_recipes_of_consecutive_stages_are_linked(stages, frozen):
    """Follow checkpoints and freezing, which is saved with the model until a stage changes it."""
    before, state, states = "runs/init", VLJEPAConfig.freeze_vision, []
    for name in stages:
        recipe = read(name)
        assert recipe.model.checkpoint == before
        state = recipe.model.config.get("freeze_vision", state)
        states.append(state)
        before = recipe.training.output_dir
    assert states == frozen


def test_recipes_write_to_different_folders():
    folders = [read(name).training.output_dir for name in (*PAPER, *SMALL, *LORA)]
    assert len({*folders, "runs/init"}) == len(folders) + 1


@pytest.mark.parametrize("name", [*PAPER, *SMALL, *LORA])
def test_recipe_header_states_batch_rate_and_missing_rows(name):
    training, text = read(name).training, header(name)
    assert f"{training.global_batch_size:,} rows a step" in text
    assert f"for {training.max_steps:,} steps" in text
    assert re.search(r"rate belongs to|5e-5|1e-5", text)
    for source in read(name).data.sources:
        folder = str(Path(source.rows).parent)
        assert folder in text, f"{folder}: the header does not ask the user for its rows"
    assert "yours to provide" in text


@pytest.mark.parametrize("name", ["paper/sft", "small/sft_24gb", "small/sft_lora_24gb"])
def test_sft_recipe_has_a_query_for_captions_and_none_for_questions(name):
    sources = read(name).data.sources
    asked = {source.rows: source.query for source in sources}
    for rows, query in asked.items():
        is_question = "vqa" in rows or "questions" in rows
        assert (query is None) == is_question, rows
    assert None in asked.values()


def test_paper_sft_recipe_replays_a_tenth():
    before = {source.rows for name in PAPER[:3] for source in read(name).data.sources}
    sources = read("paper/sft").data.sources
    replayed = sum(source.weight for source in sources if source.rows in before)
    assert replayed / sum(source.weight for source in sources) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.slow  # three seconds
def test_own_data_recipe_trains_on_rows_alone(tmp_path, monkeypatch):
    """Images and clips, with and without queries; the recipe names no other file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    overrides = ("max_steps=2", "global_batch_size=4", "device_tflops=1.0", "use_cpu=true")
    trainer = train(
        [
            str(RECIPES / f"{OWN}.yaml"),
            f"data.sources.0.rows={tiny_rows(tmp_path)}",
            *(f"training.{each}" for each in overrides),
            "data.num_workers=1",
        ]
    )
    assert trainer.state.global_step == 2
    assert trainer.train_dataset.sources[0].arguments.augmentation.turns
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in trainer.model.parameters())
    saved, processor = (
        auto.from_pretrained("runs/own_data") for auto in (AutoModel, AutoProcessor)
    )
    clip = processor(videos=str(tmp_path / "wide.mp4"), text="what does the man do ?")
    assert saved.predict(**clip).shape == (1, 384)


@pytest.mark.parametrize("name", [*SMALL, *LORA])
def test_small_recipe_uses_grad_cache_and_no_accumulation(name):
    recipe = read(name)
    training = recipe.training
    assert training.gradient_accumulation_steps == 1
    assert training.per_device_train_batch_size == training.global_batch_size == 512
    assert training.global_batch_size % training.gradient_cache_rows == 0
    assert training.activation_checkpointing
    assert (recipe.model.lora is not None) == (name in LORA)
    assert recipe.model.config.get("freeze_text", False) == (name in LORA)


# -- launching -----------------------------------------------------------------------------


def test_fsdp2_yaml_is_read_by_accelerate(monkeypatch):
    path = str(LAUNCH / "fsdp2.yaml")
    config = load_config_from_file(path)
    assert config.distributed_type == "FSDP"
    assert config.mixed_precision is None  # the recipe's `precision` decides

    # The launcher sets environment variables, from which each process makes its plugin.
    arguments = launch_command_parser().parse_args(["--config_file", path, "-m", "training.train"])
    assert set(config.fsdp_config) <= set(vars(arguments))
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.mixed_precision == "no"
    environment = prepare_multi_gpu_env(arguments)
    for name, value in environment.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    plugin.set_auto_wrap_policy(tiny_model())  # raises if the model lacks a layer
    layers = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert {layer.__name__ for layer in layers} == {
        "VJEPA2Layer",
        "LlamaDecoderLayer",
        "Gemma3DecoderLayer",
    }


def test_fsdp2_plugin_without_layer_names_fails_at_unused_layers():
    """Show why fsdp2.yaml names the layers."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    with pytest.raises(ValueError, match="Could not find the transformer layer class"):
        plugin.set_auto_wrap_policy(tiny_model())


def test_slurm_script_starts_torchrun_on_every_node(tmp_path):
    """Run it with stand-ins for scontrol and srun, and compare the command that srun gets."""
    script = LAUNCH / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    assert "#SBATCH --requeue" in script.read_text()
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in (("scontrol", "printf 'node7\\nnode8\\n'"), ("srun", 'echo "$@"')):
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    environment = {
        "PATH": f"{commands}:/usr/bin:/bin",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "42",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "64",
    }
    run = ["bash", script, "a.yaml", "training.seed=1"]
    output = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.split() == shlex.split(
        "--kill-on-bad-exit=1 torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d "
        "--rdzv_endpoint node7:29500 --rdzv_id 42-0 -m training.train a.yaml "
        "training.resume_from_checkpoint=true training.seed=1"
    )
    missing = subprocess.run(run[:2], env=environment, capture_output=True, text=True)
    assert missing.returncode != 0 and "give a recipe" in missing.stderr


# -- the guide -----------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    """Return the guide's fenced blocks of one language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def commands(program: str) -> list[list[str]]:
    """Return the arguments of the guide's commands that begin with `program`."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line) for line in lines if line.startswith(f"{program} ")]
    return [words[len(program.split()) :] for words in found]


def training_commands(module: str = "training.train") -> list[list[str]]:
    """Return the arguments of `-m module` in the guide, with any launcher."""
    launched = [*commands("python"), *commands("torchrun"), *commands("accelerate launch")]
    return [words[words.index(module) + 1 :] for words in launched if module in words]


def test_guide_has_commands_and_yaml():
    """Control that the tests below have something to test."""
    assert len(training_commands()) > 10
    assert len(blocks("yaml")) > 2


def test_guide_names_existing_files_and_modules():
    modules = set(re.findall(r"-m ((?:training|eval)\.[\w.]+)", GUIDE))
    assert {"training.train", "training.init_checkpoint"} <= modules
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    links = re.findall(r"\]\((\.\./[^)#]+)", GUIDE)
    assert len(links) > 8
    for link in links:
        assert (ROOT / "docs" / link).exists(), link
    for path in re.findall(r"\b(?:training|modeling_vljepa)/[\w/]+\.(?:py|yaml|sh)", GUIDE):
        assert (ROOT / path).is_file(), path


def test_guide_links_to_existing_headings():
    """Check links into the guide itself and into other documents."""
    for target, heading in re.findall(r"\]\(([^)#]*)#([\w-]+)\)", GUIDE):
        text = (ROOT / "docs" / target).read_text(encoding="utf-8") if target else GUIDE
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        # As GitHub does: punctuation is left out.
        names = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert heading in names, heading


@pytest.mark.parametrize("command", training_commands(), ids=" ".join)
def test_guide_command_is_a_valid_recipe(command, monkeypatch):
    # The guide names torchao, which the tests' environment does not have.
    monkeypatch.setattr("training.arguments.check_package", lambda *_: None)
    recipe, *overrides = command
    read_recipe(str(ROOT / recipe), ["training.use_cpu=true", *overrides])


def test_guide_commands_of_the_token_baseline_are_valid_recipes():
    found = training_commands("training.token_baseline")
    assert len(found) > 3
    for recipe, *overrides in found:
        read_token_recipe(str(ROOT / recipe), ["training.use_cpu=true", *overrides])


def test_guide_commands_are_valid_for_their_launchers():
    for words in commands("torchrun"):
        launch = get_args_parser().parse_args(words)
        assert (launch.module, launch.training_script) == (True, "training.train")
    for words in commands("accelerate launch"):
        launch = launch_command_parser().parse_args(words)
        assert (launch.module, launch.training_script) == (True, "training.train")
    assert len(commands("torchrun")) > 1 and len(commands("accelerate launch")) > 3
    assert (ROOT / commands("sbatch")[0][0]).is_file()


@pytest.mark.parametrize("block", blocks("yaml"))
def test_guide_yaml_is_valid_in_a_recipe(block, tmp_path):
    """Replace the keys of a valid recipe by those of the block."""
    if "deepspeed:" in block:
        pytest.skip("needs deepspeed and processes that a launcher starts")
    path = tiny_recipe(tmp_path / "rows.jsonl")
    recipe = yaml.safe_load(path.read_text())
    for section, keys in yaml.safe_load(block).items():
        recipe[section] = {**recipe.get(section, {}), **keys}
    path.write_text(yaml.safe_dump(recipe))
    read = read_recipe(str(path))
    check_config(read.model.config)
    benchmarks = yaml.safe_load((ROOT / read.evaluation.benchmarks).read_text())
    assert set(read.evaluation.tasks) <= set(benchmarks)


@pytest.mark.parametrize(
    ("section", "arguments"),
    [
        ("model", TokenModelArguments),  # those of a VL-JEPA, and one more
        ("data", DataArguments),
        ("evaluation", EvaluationArguments),
        ("training", TokenTrainingArguments),
    ],
)
def test_guide_names_existing_keys(section, arguments):
    known = set(arguments.__dataclass_fields__)
    modules = {path.stem for path in (ROOT / section).glob("*")}
    named = set(re.findall(rf"(?<![\w/]){section}\.(\w+)", GUIDE)) - modules
    named -= {"memory", "md", "push_to_hub"}
    assert named and named <= known, named - known


def test_guide_names_existing_model_settings():
    named = set(re.findall(r"model\.config\.(\w+)", GUIDE))
    assert named and named <= set(VLJEPAConfig.__dataclass_fields__)
