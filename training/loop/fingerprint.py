"""Settings of a run, stored in its checkpoints and compared when a run is resumed.

| difference               | what happens                                               |
|--------------------------|------------------------------------------------------------|
| in `COMMAND`             | it is refused: the checkpoint is of another kind of model  |
| in `FREE`                | it is applied: it does not change what is trained          |
| in `APPLIED` or `PLACES` | it is applied, and reported in one line                    |
| any other                | it is refused: the checkpoint's states mean something else |
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from training.arguments import Recipe, RecipeError, words
from training.data.sources import Source, StreamedSource

FINGERPRINT = "recipe.json"
COMMAND = "command"  # key of the command that trains
Fingerprint = dict[str, Any]  # a setting's key in the recipe -> its value

# Settings of logging, evaluation, saving, publishing and the machine. `hub_token` is a secret, so a
# checkpoint must not contain it anyway.
FREE = words(
    """
    output_dir resume_from_checkpoint logging_strategy logging_steps logging_first_step
    log_on_each_node log_level log_level_replica logging_nan_inf_filter disable_tqdm report_to
    run_name project trackio_space_id trackio_bucket_id trackio_static_space_id debug
    skip_memory_metrics eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    save_strategy save_steps save_total_limit save_only_model save_on_each_node
    enable_jit_checkpoint load_best_model_at_end push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_revision dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout torch_empty_cache_steps device_tflops world_size_expected do_eval
    ignore_data_skip
    """
)
FREE_DATA = words(
    "num_workers cache_dir decode_once max_bad_share cache_targets validation licence"
)
# The schedule is computed again from these at every step, and the optimizer reads them from its
# groups, so a resumed run follows the new ones from its next step on.
RATES = frozenset(f"training.{name}" for name in ("learning_rate", "lr_scheduler_type"))
RATES |= {"training.lr_scheduler_kwargs", "training.warmup_steps"}
APPLIED = RATES | words(
    """
    training.max_steps training.weight_decay training.adam_beta1 training.adam_beta2
    training.adam_epsilon training.max_grad_norm training.clip_by_part training.precision
    training.use_cpu training.tf32
    training.full_determinism training.gradient_cache_rows training.activation_checkpointing
    training.activation_checkpointing_kwargs training.gradient_checkpointing
    training.gradient_checkpointing_kwargs training.torch_compile training.torch_compile_backend
    training.torch_compile_mode data.features data.noise model.prompts model.target_prompts
    """
)
# Where rows come from: a moved file is the same data, which `content` decides.
PLACES = words("rows dataset config split data_files revision columns media_folder")
ADAPTIVE = ("reduce_lr_on_plateau", "greedy")  # schedules whose rate is a state, not a function


def plain(value: Any) -> Any:
    """Return a setting as a value that JSON can hold."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def section(name: str, arguments: Any, free: Iterable[str] = ()) -> Fingerprint:
    """Return the settings of a section of a recipe, by their keys, without the `free` ones."""
    return {
        f"{name}.{each.name}": plain(vars(arguments)[each.name])
        for each in fields(arguments)
        if each.init and each.name not in free
    }


def rows_content(rows: list[dict]) -> list:
    """Return the number of rows and a hash of them."""
    return [f"{len(rows)} rows", texts_hash(rows)]


def texts_hash(rows: Iterable[dict]) -> str:
    """Return a hash of the texts of rows and of the kinds of their media."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(["video" in row, row["query"], row["target"]]).encode())
    return digest.hexdigest()


def content_of(source: Source | StreamedSource) -> list:
    """Return the size of a source and a hash of its rows, of a streamed one of its first rows."""
    if isinstance(source, Source):
        return rows_content(source.rows)
    return [source.size(), texts_hash(source.fallback_rows)]


def fingerprint(recipe: Recipe, contents: list[list], lanes: int | None = None) -> Fingerprint:
    """Return the settings of a run that decide what it trains.

    Args:
        recipe: a recipe of a command that trains.
        contents: size and hash of each source.
        lanes: number of lanes, if a source is streamed.
    """
    data = section("data", recipe.data, FREE_DATA | {"sources", "lanes"})
    for index, (source, content) in enumerate(zip(recipe.data.sources, contents, strict=True)):
        name = f"data.sources[{index}]"
        data |= section(name, source, FREE_DATA) | {f"{name}.content": content}
        if not vars(source).get("streaming"):
            data.pop(f"{name}.shuffle_rows", None)  # nothing reads it
    if lanes is not None:
        data["data.lanes"] = lanes
    settings = {COMMAND: recipe.training.command}
    settings |= data | section("training", recipe.training, FREE)
    for name in ("model", "processor"):
        if name in vars(recipe):  # a Y-Decoder's recipe has no section `processor`
            settings |= section(name, vars(recipe)[name])
    # The precision that "auto" has found on this machine.
    settings["training.precision"] = "bf16" if recipe.training.bf16 else "fp32"
    return json.loads(json.dumps(settings))


def write_fingerprint(folder: Path, settings: Fingerprint) -> None:
    (folder / FINGERPRINT).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def compare(folder: str | None, now: Fingerprint) -> str:
    """Return a line that lists the settings which differ from those of a checkpoint's run.

    Args:
        folder: the checkpoint to resume from; `None` to start from the beginning.
        now: the settings of this run.
    Raises:
        RecipeError: another command trained the checkpoint, or a setting differs that its states
            depend on.
    """
    if folder is None:
        return ""
    before = json.loads(Path(folder, FINGERPRINT).read_text(encoding="utf-8"))
    steps = json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))
    # Checkpoints of earlier versions do not state their command.
    if before.get(COMMAND, now[COMMAND]) != now[COMMAND]:
        raise RecipeError(
            f"training.resume_from_checkpoint: {folder} is a checkpoint of {before[COMMAND]}, "
            f"which {now[COMMAND]} cannot continue. Give one of {now[COMMAND]}, or another "
            "training.output_dir."
        )
    cure = "or start a new run from its weights with model.checkpoint."
    counts = [sum(key.endswith("].content") for key in each) for each in (before, now)]
    if counts[0] != counts[1]:
        raise RecipeError(
            f"training.resume_from_checkpoint: {folder} was trained on {counts[0]} sources, and "
            f"the recipe has {counts[1]}. Resume with the same sources, {cure}"
        )
    if now["training.max_steps"] < steps["global_step"]:
        raise RecipeError(
            f"training.max_steps: it is {now['training.max_steps']}, but {folder} has made "
            f"{steps['global_step']} steps. Give more, {cure}"
        )
    # A setting that only one of them has belongs to another version of a library.
    changed = [key for key in before if key in now and before[key] != now[key]]
    refused = [key for key in changed if not is_applied(key, before, now)]
    if refused:
        raise RecipeError(
            f"training.resume_from_checkpoint: {folder} cannot continue with other settings: "
            f"{listed(refused, before, now)}. Set them back to resume, {cure}"
        )
    return listed(changed, before, now)


def is_applied(key: str, before: Fingerprint, now: Fingerprint) -> bool:
    """Return whether a resumed run can follow a setting that has changed."""
    source, _, name = key.rpartition(".")
    if source.startswith("data.sources["):
        # With other content, that is named instead of the file.
        return name in PLACES
    if key in RATES:
        # A rate of 0 is one group of all parameters, so the optimizer's states would not fit.
        rates = (before["training.learning_rate"], now["training.learning_rate"])
        kinds = {before["training.lr_scheduler_type"], now["training.lr_scheduler_type"]}
        return 0 not in rates and kinds.isdisjoint(ADAPTIVE) and not now["training.deepspeed"]
    return key in APPLIED


def listed(keys: list[str], before: Fingerprint, now: Fingerprint) -> str:
    """Return the settings with their new and old values."""
    return "; ".join(line for key in keys for line in differences(key, before[key], now[key]))


def differences(key: str, before: Any, now: Any) -> list[str]:
    """Return a line for each value that differs, within mappings too."""
    if key.endswith("].content"):
        source = key.removesuffix(".content")
        return [f"{source} has other rows ({now[0]}, before {before[0]})"]
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [f"{key} is {now} and was {before}"]
    return [
        line
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        for line in differences(f"{key}.{name}", before.get(name), now.get(name))
    ]


__all__ = [
    "FINGERPRINT",
    "Fingerprint",
    "compare",
    "content_of",
    "fingerprint",
    "rows_content",
    "write_fingerprint",
]
