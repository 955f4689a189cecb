"""Recipes are read and checked; every error names the key, the value and the cure."""

import importlib.util
import json
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import TrainingArguments

from tests.tiny import tiny_recipe, tiny_settings
from training.arguments import (
    READ,
    UNREAD,
    RecipeError,
    VLJEPATrainingArguments,
    apply_override,
    check_deepspeed,
    gpu_has_bf16,
    precision_line,
    read_recipe,
    set_loader_defaults,
    use_bf16,
)
from training.decoder.recipe import READ_HERE, UNREAD_HERE, DecoderTrainingArguments
from training.model.recipe_model import check_config

# Recipes of `training.train`; test_train_decoder.py reads those of `training.train_decoder`.
RECIPES = [
    path
    for path in sorted((Path(__file__).parents[2] / "training" / "recipes").glob("*.yaml"))
    if not path.stem.endswith("_decoder")
]
CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A valid recipe; its rows are not read here."""
    return tiny_recipe(tmp_path / "rows.jsonl")


def test_recipe_folder_is_not_empty():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_read_recipe_accepts_every_published_recipe(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = read_recipe(str(path), ["training.precision=fp32", "training.use_cpu=true"])
    check_config(read.model.config)
    if read.training.world_size_expected in (None, 1):
        steps = read.training.gradient_accumulation_steps
        assert read.training.per_device_train_batch_size * steps == read.training.global_batch_size


def test_read_recipe_applies_overrides(recipe):
    read = read_recipe(str(recipe), ["training.seed=7", "data.sources=[{rows: a}, {rows: b}]"])
    assert read.training.seed == 7
    assert [(source.rows, source.weight) for source in read.data.sources] == [("a", 1), ("b", 1)]
    assert read.processor.image_size == 32
    assert read.training.per_device_train_batch_size == 2
    assert not read.training.bf16
    assert read.training.remove_unused_columns is False


def test_read_recipe_converts_a_whole_number_to_a_float(recipe):
    read = read_recipe(str(recipe), ["training.learning_rate=1", "data.max_bad_share=0"])
    assert (type(read.training.learning_rate), read.training.learning_rate) == (float, 1.0)
    assert type(read.data.max_bad_share) is float


def test_apply_override_reads_values_as_yaml(recipe):
    given = {"training": {"seed": 1}}
    for override in ("training.seed=null", "model.config.vision_config.hidden_size=8"):
        apply_override(given, override)
    assert given == {
        "training": {"seed": None},
        "model": {"config": {"vision_config": {"hidden_size": 8}}},
    }
    apply_override(given, "data.query=a=b")
    assert given["data"] == {"query": "a=b"}
    given = {"data": {"sources": [{"rows": "a", "weight": 2}, {"rows": "b"}]}}
    apply_override(given, "data.sources.1.rows=c")
    assert given["data"]["sources"] == [{"rows": "a", "weight": 2}, {"rows": "c"}]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # Keys
        ("modle.vocab_size=3", "modle: no such section"),
        (
            "training.learning_rte=1.0",
            "training.learning_rte: no such key. Did you mean 'learning_rate'",
        ),
        ("processor.size=3", "processor.size: no such key"),
        ("data.sources=[{row: a}]", r"data.sources\[0\].row: no such key. Did you mean 'rows'"),
        ("data.sources=[{weight: 2}]", "data.sources: each source needs either rows or dataset"),
        # Keys of the parent class that are derived from other keys
        ("training.per_device_train_batch_size=8", "per_device_train_batch_size: no such key"),
        ("training.num_train_epochs=3", "num_train_epochs: no such key"),
        ("training.bf16=true", "training.bf16: no such key"),
        # Types
        ("training.seed=one", "training.seed: .* expected int, got str .value: 'one'"),
        ("training.seed=true", "training.seed: .* expected int, got bool"),
        ("training.max_steps=2.5", "training.max_steps: .* expected int, got float"),
        ("processor.num_frames=two", "processor.num_frames: .* expected .*int.*, got str"),
        ("model.config=3", "model.config: .* expected dict, got int"),
        ("data.sources=3", "data.sources: .* expected list, got int"),
        ("data.sources=[rows.jsonl]", r"data.sources\[0\]: expected keys and values, found 'rows"),
        ("training.learning_rate=1e-3", "YAML reads 1e-3 as text: write 1.0e-3"),
        ("training.save_strategy=no", "got bool .* YAML reads yes and no as true and false unless"),
        ("training.learning_rate=2.5E5", "YAML reads 1e-3 as text: write 1.0e-3"),
        # Values
        ("model.vocab_size=-1", "model.vocab_size: it is -1; give 1 or more"),
        ("processor.num_frames=0", "processor.num_frames: it is 0; give 1 or more"),
        ("processor.image_size=0", "processor.image_size: it is 0; give 1 or more"),
        ("data.num_workers=0", "data.num_workers: it is 0; give 1 or more"),
        ("data.lanes=0", "data.lanes: it is 0; give 1 or more"),
        ("training.save_steps=0", "training.save_steps: it is 0.0; give more than 0"),
        ("training.device_tflops=-1", "training.device_tflops: it is -1.0; give more than 0"),
        ("data.hard_negatives=-1", "data.hard_negatives: it is -1; give 0 or more"),
        ("data.sources=[{rows: a, shuffle_rows: 0}]", "a.shuffle_rows: it is 0; give 1 or more"),
        ("data.sources=[{rows: a, rows_per_clip: 0}]", "a.rows_per_clip: it is 0; give 1 or more"),
        (
            "data.sources=[{rows: a, rows_per_clip: 2, group_by_length: true}]",
            "a: rows_per_clip and group_by_length exclude each other; set group_by_length to false",
        ),
        ("data.max_bad_share=2", "data.max_bad_share: it is 2.0; give 0 to 1"),
        ("data.sources=[{rows: a, weight: 0}]", "a: weight is 0.0; give more than 0"),
        ("data.sources=[{rows: a, weight: .inf}]", "a: weight is inf"),
        ("data.sources=[]", "data.sources: give at least one source"),
        ("training.precision=fp16", "'fp16' is not one of auto, fp32, bf16"),
        ("training.global_batch_size=-2", "global_batch_size: it is -2; give 1 or more"),
        ("training.gradient_accumulation_steps=0", "accumulation_steps: it is 0; give 1 or more"),
        ("training.gradient_cache_rows=0", "gradient_cache_rows: it is 0; give 1 or more"),
        ("training.seed=-1", "training.seed: it is -1; give 0 or more"),
        ("training.data_seed=-1", "training.data_seed: it is -1; give 0 or more"),
        ("training.dataloader_num_workers=-1", "num_workers: it is -1; give 0 or more"),
        ("training.learning_rate=.nan", "training.learning_rate: it is nan; give 0 or more"),
        ("training.learning_rate=.inf", "training.learning_rate: it is inf; give 0 or more"),
        ("training.text_learning_rate_scale=-1", "rate_scale: it is -1.0; give 0 or more"),
        ("training.sigreg_weight=.nan", "training.sigreg_weight: it is nan; give 0 or more"),
        ("training.ignore_data_skip=true", "training.ignore_data_skip: no such key"),
        ("training.gradient_accumulation_steps=4", "2 rows do not divide among 1 processes x 4"),
        ("training.max_steps=0", "training.max_steps: it is 0; give 1 or more"),
        ("evaluation.limit=0", "evaluation.limit: it is 0; give 1 or more"),
        ("evaluation.limit=-1", "evaluation.limit: it is -1; give 1 or more"),
        ("training.lr_scheduler_type=cosin", "training: cosin is not a valid SchedulerType"),
        ("training.global_batch_size=1180591620717411303424", "1303424; give 100000000 or less"),
        ("training.max_steps=1180591620717411303424", "training.max_steps: .*100000000 or less"),
        ("training.seed=4294967296", "training.seed: it is 4294967296; give 4294967295 or less"),
        ("training.lr_scheduler_kwargs=x", "lr_scheduler_kwargs: expected keys and values, found"),
        ("training.gradient_checkpointing_kwargs=x", "kwargs: expected keys and values, found 'x'"),
        ("training.fsdp_config=x", "training.fsdp_config: x: no such file"),
        ("training.deepspeed=x.json", "training.deepspeed: x.json: no such file"),
        ("training.hub_strategy=every_save", "hub_strategy: it is 'every_save', but push_to_hub"),
        ("training.hub_revision=dev", "training.hub_revision: it is 'dev', but .*; remove it"),
        ("data.sources=[{rows: a, licence: 3}]", "licence: .*3"),
        ('training.report_to="~"', "report_to: '~' is not one of none, all, tensorboard, wandb"),
        # What belongs to a new model
        (
            ["model.checkpoint=a", "model.text_encoder=b"],
            "model.text_encoder: a checkpoint has a Y-E",
        ),
        (
            ["model.checkpoint=a", "model.tokenizer_rows=[b]"],
            "model.tokenizer_rows: a checkpoint has",
        ),
        # The override itself
        ("training.seed", "'training.seed': an override looks like training.seed=1"),
        ("seed=1", "'seed=1': an override looks like training.seed=1"),
        ("data.sources.1.rows=x", "'1' is not the index of one of 1 items"),
        ("data.sources.first.rows=x", "'first' is not the index of one of 1 items"),
        ("data.sources.rows=a", "name a key of an item, as in data.sources.0.rows=FILE"),
        ("training.max_steps.x=a", "the recipe has no keys below 'max_steps'"),
        ("training.seed=[1", "'training.seed=.1': not a YAML value"),
        ("data.sources=[{rows: a, rows: b}]", "(?s)not a YAML value: 'rows' stands twice"),
    ],
)
def test_read_recipe_names_a_wrong_value(recipe, override, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(str(recipe), override if isinstance(override, list) else [override])


@pytest.mark.parametrize(
    ("override", "module", "package"),
    [
        ("report_to=wandb", "wandb", "wandb"),
        ("report_to=[tensorboard]", "tensorboard", "tensorboard"),
        ("report_to=comet_ml", "comet_ml", "comet-ml"),
        ("report_to=azure_ml", "azureml.core", "azureml-core"),
        ("optim=adamw_torch_4bit", "torchao", "torchao"),
        ("optim=adamw_bnb_8bit", "bitsandbytes", "bitsandbytes"),
        ("optim=paged_adamw_32bit", "bitsandbytes", "bitsandbytes"),
        ("optim=galore_adamw_8bit", "galore_torch", "galore-torch"),
        ("deepspeed={zero_optimization: {stage: 1}}", "deepspeed", "deepspeed"),
    ],
)
def test_read_recipe_names_a_package_that_is_not_installed(
    recipe, override, module, package, monkeypatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find(name)
    )
    monkeypatch.delitem(sys.modules, module, raising=False)
    key = override.split("=")[0]
    with pytest.raises(RecipeError, match=f"^training.{key}: .* needs .*pip install {package}$"):
        read_recipe(str(recipe), [f"training.{override}"])


@pytest.mark.parametrize("kind", [VLJEPATrainingArguments, DecoderTrainingArguments])
def test_training_arguments_are_read_or_refused_by_name(kind):
    """A new version of transformers that adds a field fails here: try it, and put it into one of
    the lists."""
    read, unread = (READ, UNREAD) if kind is VLJEPATrainingArguments else (READ_HERE, UNREAD_HERE)
    derived = {each.name for each in fields(kind) if not each.init}
    inherited = {each.name for each in fields(TrainingArguments)}
    assert read | unread.keys() | derived >= inherited
    assert read <= inherited and read.isdisjoint(derived)


# A value of another type or none of the ordinary kinds, for the fields that are not a switch or a
# number.
VALUES = {
    "optim_target_modules": "all-linear",
    "liger_kernel_config": {"rope": True},
    "include_num_input_tokens_seen": "all",
    "include_for_metrics": ["loss"],
    "accelerator_config": {"split_batches": True},
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
}


@pytest.mark.parametrize("name", sorted(UNREAD.keys() - {"parallelism_config"}))
def test_training_arguments_refuse_a_setting_that_nothing_reads(recipe, name):
    (field,) = (each for each in fields(VLJEPATrainingArguments) if each.name == name)
    value = VALUES.get(name, not field.default if isinstance(field.default, bool) else 3)
    with pytest.raises(RecipeError, match=f"training.{name}: it is .* nothing here reads it: "):
        read_recipe(str(recipe), [f"training.{name}={json.dumps(value)}"])


def test_training_arguments_refuse_a_field_of_a_new_version(recipe, monkeypatch):
    monkeypatch.setattr("training.arguments.READ", READ - {"adam_epsilon"})
    read_recipe(str(recipe))
    with pytest.raises(RecipeError, match="adam_epsilon: .* this version of transformers has"):
        read_recipe(str(recipe), ["training.adam_epsilon=0.1"])


@pytest.mark.parametrize(
    "given",
    [
        {"label_smoothing_factor": 0.5},
        {"num_train_epochs": 2.0},
        {"train_sampling_strategy": "sequential"},
        {"dataloader_drop_last": True},
        {"neftune_noise_alpha": 5.0},
        {"bf16_full_eval": True},
    ],
    ids=lambda given: next(iter(given)),
)
def test_decoder_arguments_refuse_a_setting_that_nothing_reads(given, tmp_path):
    options = {"output_dir": str(tmp_path), "max_steps": 1, "precision": "fp32", "use_cpu": True}
    DecoderTrainingArguments(**options)
    with pytest.raises(RecipeError, match=f"training.{next(iter(given))}: it is .* nothing here r"):
        DecoderTrainingArguments(**options, **given)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim=sgd", "adam_beta1=0.5"], "adam_beta1: it is 0.5, but training.optim: sgd does"),
        (["optim_args=eps=0.1"], "optim_args: it is 'eps=0.1', but training.optim: adamw_torch_fu"),
        (["lr_scheduler_type=constant", "warmup_steps=5"], "warmup_steps: it is 5.0, but training"),
        (["lr_scheduler_kwargs={min_lr: 0.1}"], "lr_scheduler_kwargs: of linear: .* 'min_lr'"),
        (["lr_scheduler_type=cosine_with_min_lr"], "lr_scheduler_kwargs: of cosine_with_min_lr: "),
        (
            ["dataloader_persistent_workers=true"],
            "persistent_workers: it is True, but there",
        ),
        (
            ["dataloader_multiprocessing_context=spawn"],
            "context: it is 'spawn', but there",
        ),
        (["torch_empty_cache_steps=1", "gradient_cache_rows=1"], "steps with gradient_cache_rows"),
    ],
)
def test_training_arguments_refuse_settings_that_do_not_go_together(recipe, overrides, message):
    with pytest.raises(RecipeError, match=f"^training.*{message}"):
        read_recipe(str(recipe), [f"training.{each}" for each in overrides])
    read_recipe(str(recipe), ["training.optim=sgd", "training.optim_args=momentum=0.5"])


@pytest.mark.parametrize(
    "setting",
    [{"architectures": 3}, {"return_dict": "q"}, {"id2label": 4}, {"is_encoder_decoder": "z"}],
)
def test_check_config_checks_inherited_fields(setting):
    (key,) = setting
    with pytest.raises(RecipeError, match=f"model.config.{key}: "):
        check_config(tiny_settings(**setting))


def test_read_recipe_names_an_output_dir_that_is_a_file(recipe):
    with pytest.raises(RecipeError, match="training.output_dir: .*recipe.yaml is a file; name a f"):
        read_recipe(str(recipe), [f"training.output_dir={recipe}"])


def test_read_recipe_gives_the_hint_on_numbers_for_numbers_only(recipe):
    with pytest.raises(RecipeError) as error:
        read_recipe(str(recipe), ["training.learning_rate='0,001'"])
    assert "YAML" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("training", None, "the section 'training' is missing"),
        ("training", "max_steps", "training: 'max_steps' is missing"),
        ("data", "sources", "data: 'sources' is missing"),
    ],
)
def test_read_recipe_names_a_missing_key(recipe, section, key, message):
    given = yaml.safe_load(recipe.read_text())
    del (given if key is None else given[section])[key or section]
    recipe.write_text(yaml.safe_dump(given))
    with pytest.raises(RecipeError, match=message):
        read_recipe(str(recipe))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "recipe.yaml: not a YAML file"),
        (
            b"data: {}\nmodel: {}\ndata: {}",
            "(?s)not a YAML file: 'data' stands twice.*line 3",
        ),
        (b"\xff\xfe\x00", "recipe.yaml: not a YAML file"),
        (b"", "a recipe needs the sections model, processor, data, training, evaluation"),
        (b"- 1", "a recipe needs the sections"),
        (b"{model: , data: {sources: [{rows: a}]}, training: {}}", "model: expected keys and val"),
    ],
)
def test_read_recipe_names_a_file_that_is_not_a_recipe(recipe, content, message):
    recipe.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        read_recipe(str(recipe))


def test_read_recipe_names_a_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="gone.yaml: no such recipe"):
        read_recipe(str(tmp_path / "gone.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeding_dim": 8}, "model.config.embeding_dim: no such setting"),
        ({"vision_config": {"hiden_size": 8}}, "model.config.vision_config.hiden_size: no such"),
        (
            {"text_config": {"model_type": "brt"}},
            "text_config.model_type: transformers has no 'brt'",
        ),
        ({"predictor_config": None}, "predictor_config: expected keys and values, found None"),
    ],
)
def test_check_config_names_an_unknown_setting(changes, message):
    """transformers would store an unknown key as an attribute that nothing reads."""
    check_config(tiny_settings())
    with pytest.raises(RecipeError, match=message):
        check_config({**tiny_settings(), **changes})


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_global_batch_size_is_divided_among_processes(monkeypatch, tmp_path, processes):
    monkeypatch.setattr(VLJEPATrainingArguments, "world_size", processes)
    options = {"output_dir": str(tmp_path), "max_steps": 1, "precision": "fp32", "use_cpu": True}
    arguments = VLJEPATrainingArguments(global_batch_size=12, **options)
    assert arguments.per_device_train_batch_size == 12 // processes
    if processes > 1:
        with pytest.raises(RecipeError, match=f"13 rows do not divide among {processes} processes"):
            VLJEPATrainingArguments(global_batch_size=13, **options)


@pytest.mark.parametrize(
    "device, processes, given, expected",
    [
        ("cuda", 1, {}, (4, True)),
        ("cuda", 4, {}, (3, True)),  # of its four cores, one is left to the training process
        ("cuda", 16, {}, (0, True)),
        ("cuda", 32, {}, (0, True)),
        ("cuda", 1, {"dataloader_num_workers": 0}, (0, True)),
        ("cuda", 1, {"dataloader_num_workers": 9, "dataloader_pin_memory": False}, (9, False)),
        ("mps", 1, {}, (0, False)),
        ("cpu", 1, {}, (0, False)),
        ("cpu", 1, {"dataloader_num_workers": 2}, (2, False)),
    ],
    ids=str,
)
def test_loader_defaults_follow_the_device_and_given_settings_win(
    monkeypatch, device, processes, given, expected
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device(device))
    settings = {"dataloader_num_workers": None, "dataloader_pin_memory": None, **given}
    arguments = SimpleNamespace(use_cpu=device == "cpu", **settings)
    set_loader_defaults(arguments)
    assert (arguments.dataloader_num_workers, arguments.dataloader_pin_memory) == expected


def test_read_recipe_sets_loader_defaults_of_a_cpu(recipe):
    training = read_recipe(recipe).training
    assert (training.dataloader_num_workers, training.dataloader_pin_memory) == (0, False)
    assert read_recipe(recipe, ["training.dataloader_num_workers=2"]).training != training


@pytest.mark.parametrize("native", [True, False])
def test_use_bf16_follows_precision_and_what_the_device_multiplies_natively(monkeypatch, native):
    monkeypatch.setattr("training.arguments.gpu_has_bf16", lambda: native)
    monkeypatch.setattr("training.arguments.cpu_has_bf16", lambda: not native)
    assert use_bf16("bf16", CPU) and use_bf16("bf16", None)
    assert not use_bf16("fp32", CPU) and not use_bf16("fp32", None)
    assert use_bf16("auto", None) is native
    assert use_bf16("auto", CPU) is not native
    with pytest.raises(RecipeError, match="training.precision: 'fp16' is not one of"):
        use_bf16("fp16", CPU)


@pytest.mark.parametrize("native", [True, False])
def test_gpu_has_bf16_ignores_emulation(monkeypatch, native):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    # Volta and Turing emulate it.
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    assert gpu_has_bf16() is native


@pytest.mark.parametrize(
    ("precision", "bf16", "use_cpu", "expected"),
    [
        ("auto", True, False, "bf16 compute (auto: this GPU has native bf16)"),
        ("auto", False, True, "fp32 compute (auto: this CPU has no native bf16)"),
        ("bf16", True, True, "bf16 compute"),
        ("fp32", False, True, "fp32 compute"),
    ],
)
def test_precision_line_states_the_choice_of_auto(precision, bf16, use_cpu, expected):
    args = SimpleNamespace(precision=precision, bf16=bf16, use_cpu=use_cpu)
    assert precision_line(args) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "ZeRO stage 3 does not work with this model"),
        ("{", "training.deepspeed: .* is not JSON"),
        ("[]", r"training.deepspeed: expected keys and values, found \[\]"),
        ('{"zero_optimization": {"stage": 3}}', "ZeRO stage 3 does not work with this model"),
    ],
)
def test_check_deepspeed_refuses_settings_that_cannot_work(
    settings, message, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())  # as if it were installed
    monkeypatch.setenv("LOCAL_RANK", "0")
    if isinstance(settings, str):
        (tmp_path / "settings.json").write_text(settings)
        settings = str(tmp_path / "settings.json")
    with pytest.raises(RecipeError, match=message):
        check_deepspeed(settings)
    check_deepspeed({"zero_optimization": {"stage": 2}})
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(RecipeError, match="start the processes with torchrun or accelerate"):
        check_deepspeed({"zero_optimization": {"stage": 2}})
