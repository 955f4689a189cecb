"""Several processes with parts of a batch equal one process with all of it, also with GradCache."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from modeling_vljepa.losses import LOSSES, Loss
from tests.tiny import HANG_SECONDS, tiny_model, tiny_recipe, tiny_rows
from training.arguments import RecipeError
from training.loop import objective as objective_module
from training.loop.distributed import all_gather, check_world_size
from training.loop.grad_cache import cached_step
from training.loop.objective import Embeds, Ids, Objective, freeze_ignored
from training.train import main

ROOT = Path(__file__).parents[2]
ROWS = 8
# Rows of different processes share text 5 and group 9, so they are not each other's negatives.
TARGET_IDS = torch.tensor([1, 5, 3, 4, 5, 6, 7, 8])
GROUP_IDS = torch.tensor([9, -2, -3, -4, -5, -6, 9, -8])
NEGATIVE_IDS = torch.tensor([[2, 9], [0, -1], [9, 5], [2, 0], [0, 9], [2, -1], [-1, -1], [9, 2]])
SETTINGS = {
    **{name: {"name": name} for name in LOSSES},
    "positives": {"as_positives": True},
    "terms": {"sigreg_weight": 0.1, "variance_weight": 1.0, "covariance_weight": 0.1},
}


class LocalGradient(torch.autograd.Function):
    """A wrong all-gather, whose backward returns the local slice alone."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return all_gather(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def share(rank: int, world_size: int) -> tuple[dict[str, torch.Tensor], Ids]:
    """Return this process's rows of the batch in the form of the collator's output."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(ROWS).chunk(world_size)[rank]
    pixels = torch.randn(ROWS, 2, 3, 32, 32, generator=generator)
    queries = torch.randint(3, 300, (ROWS, 4), generator=generator)
    texts = torch.randint(3, 300, (10, 6), generator=generator)
    own, hard = TARGET_IDS[rows], NEGATIVE_IDS[rows]
    distinct, index = torch.cat([own[:, None], hard.clamp(min=0)], dim=1).unique(
        return_inverse=True
    )
    batch = {
        "pixel_values_videos": pixels[rows],
        "input_ids": queries[rows],
        "target_input_ids": texts[distinct],
    }
    ids = Ids(
        target_index=index[:, 0],
        target_ids=own,
        group_ids=GROUP_IDS[rows],
        negative_index=index[:, 1:],
        negative_ids=hard,
    )
    return batch, ids


def step(
    objective: Objective,
    model: nn.Module,
    rank: int = 0,
    world_size: int = 1,
    cache_rows: int | None = None,
    no_sync: AbstractContextManager = nullcontext,
) -> dict[str, torch.Tensor]:
    """Compute loss and gradients of one step."""
    batch, ids = share(rank, world_size)
    parts = {}

    def loss_of(embeds: Embeds) -> torch.Tensor:
        loss, found = objective(embeds, ids)
        parts.update(found)
        return loss

    if cache_rows is None:
        outputs = model(**batch)
        loss = loss_of(
            Embeds(
                outputs.predicted_embeds,
                outputs.target_embeds,
                outputs.logit_scale,
                outputs.logit_bias,
            )
        )
        loss.backward()
    else:
        loss = cached_step(model, batch, cache_rows, loss_of, no_sync=no_sync)
    gradients = {
        name.removeprefix("module."): p.grad.full_tensor() if isinstance(p, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return {"loss": loss.detach(), "chance": parts.get("chance_loss"), **gradients}


def new_model(setting: str) -> nn.Module:
    """Return a model in which every parameter that trains gets a gradient from the loss."""
    model = tiny_model(logit_bias_init_value=-3.0)
    freeze_ignored(model, loss_of_setting(setting))
    return model


def loss_of_setting(setting: str) -> Loss:
    return LOSSES[Objective(**SETTINGS.get(setting, {})).name]


def sharded(model: nn.Module) -> nn.Module:
    """Shard every layer, and the rest of the model, over the processes (FSDP2)."""
    for layer in [*model.predictor.backbone.layers, *model.y_encoder.backbone.layers]:
        fully_shard(layer)
    return fully_shard(model)


def no_sync_of(model: nn.Module) -> AbstractContextManager:
    """Return a context like `Accelerator.no_sync` for FSDP2."""

    @contextmanager
    def no_sync():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return no_sync


def work(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=HANG_SECONDS),
    )
    results = {}
    for setting, arguments in SETTINGS.items():
        for cache_rows in (None, 1, 3):
            model = DistributedDataParallel(new_model(setting))
            results[setting, cache_rows] = step(
                Objective(**arguments), model, rank, world_size, cache_rows, model.no_sync
            )
    for cache_rows in (None, 1):
        model = sharded(new_model("info_nce"))
        assert all(isinstance(p, DTensor) for p in model.parameters())
        results["sharded", cache_rows] = step(
            Objective(), model, rank, world_size, cache_rows, no_sync_of(model)
        )
    objective_module.gather_with_gradient = LocalGradient.apply
    model = DistributedDataParallel(new_model("local"))
    results["local", None] = step(Objective(), model, rank, world_size)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(request, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Loss and gradients computed by each of several processes."""
    world_size = request.param
    folder = tmp_path_factory.mktemp("processes")
    # The fork server imports this module once for all processes.
    mp.set_forkserver_preload([__name__])
    context = mp.start_processes(
        work, args=(world_size, folder), nprocs=world_size, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + HANG_SECONDS
    try:
        # `join` returns False each time one process ends while others still run.
        while not context.join(timeout=HANG_SECONDS):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def off(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the relative distance of each gradient."""
    assert result.keys() == expected.keys()
    return {
        name: ((result[name] - expected[name]).norm() / expected[name].norm()).item()
        for name in expected
        if name not in ("loss", "chance")
    }


@pytest.mark.slow
@pytest.mark.parametrize("cache_rows", [None, 1, 3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_processes_have_the_loss_and_gradient_of_one_process(results, setting, cache_rows):
    expected = step(Objective(**SETTINGS[setting]), new_model(setting))
    found = [result[setting, cache_rows] for result in results]
    mean = torch.stack([result["loss"] for result in found]).mean()
    torch.testing.assert_close(mean, expected["loss"], rtol=1e-5, atol=0)
    for result in found:
        torch.testing.assert_close(result["chance"], expected["chance"], rtol=1e-6, atol=0)
        distances = off(result, expected)
        assert max(distances.values()) <= 1e-5, max(distances, key=distances.get)
    loss = loss_of_setting(setting)
    expected_modules = {"predictor", "predictor_head", "y_encoder", "y_head"}
    expected_modules |= {"logit_scale"} if loss.needs_scale else set()
    expected_modules |= {"logit_bias"} if loss.needs_bias else set()
    assert {name.split(".")[0] for name in distances} == expected_modules


@pytest.mark.slow
@pytest.mark.parametrize("cache_rows", [None, 1])
def test_sharded_weights_have_the_gradient_of_one_process(results, cache_rows):
    expected = step(Objective(), new_model("info_nce"))
    for result in results:
        assert max(off(result["sharded", cache_rows], expected).values()) <= 1e-5


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
@pytest.mark.parametrize("setting", SETTINGS)
def test_cached_step_equals_the_whole_batch(setting, rows):
    expected = step(Objective(**SETTINGS[setting]), new_model(setting))
    found = step(Objective(**SETTINGS[setting]), new_model(setting), cache_rows=rows)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=0)
    assert max(off(found, expected).values()) <= 1e-5


@pytest.mark.slow
def test_gather_with_local_gradient_would_be_wrong(results):
    """Positive control: if the backward of the gather returns the local slice only, the loss is
    correct and the encoders' gradients are not."""
    expected = step(Objective(), new_model("local"))
    for result in results:
        loss, right = (result[name, None]["loss"] for name in ("local", "info_nce"))
        torch.testing.assert_close(loss, right, rtol=1e-6, atol=0)
        distances = off(result["local", None], expected)
        assert distances.pop("logit_scale.weight") <= 1e-5
        assert min(d for name, d in distances.items() if name.startswith("y_")) > 0.1


@pytest.mark.slow
def test_processes_share_targets_groups_and_hard_negatives(results):
    """Two rows share text 5 and two share group 9, across processes. Hard negatives of other
    processes count too, except for rows whose own text they are."""
    columns = [ROWS - 1 if i in (0, 1, 4, 6) else ROWS for i in range(ROWS)]
    hard = NEGATIVE_IDS.flatten()
    rows = [columns[i] + int(((hard != -1) & (hard != TARGET_IDS[i])).sum()) for i in range(ROWS)]
    expected = sum(math.log(count) for count in columns + rows) / (2 * ROWS)
    for result in results:
        assert result["info_nce", None]["chance"].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_torchrun_trains_like_one_process(tmp_path):
    recipe = tiny_recipe(tiny_rows(tmp_path), world_size_expected=2, max_steps=3)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", "-m", "training.train", str(recipe)),
        ],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 process(es) on cpu:0 · 3 steps of 2 rows") == 1
    assert "unused parameters" not in done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("step ")]) == 3
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    alone = main(
        [str(recipe), "training.world_size_expected=1", f"training.output_dir={tmp_path / 'one'}"]
    )
    for name in ("loss", "grad_norm", "chance_loss", "accuracy", "logit_scale"):
        first, expected = state["log_history"][0][name], alone.state.log_history[0][name]
        assert first == pytest.approx(expected, rel=1e-5), name
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1


def start_node(
    rank: int, folder: Path, port: int, recipe: Path, *overrides: str
) -> subprocess.Popen:
    """Start one of two nodes with one process each, which writes into its own folder."""
    folder.mkdir(exist_ok=True)
    ranks = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    settings = {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    environment = {name: str(value) for name, value in settings.items()}
    outputs = [f"training.output_dir={folder}/out", f"data.cache_dir={folder}/cache"]
    return subprocess.Popen(
        [sys.executable, "-m", "training.train", str(recipe), *outputs, *overrides],
        cwd=ROOT,
        env=os.environ | environment | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_train_rejects_nodes_without_a_shared_disk(tmp_path):
    recipe = tiny_recipe(
        tiny_rows(tmp_path), world_size_expected=2, save_strategy="steps", save_steps=2
    )
    port = free_port()
    first, second = (start_node(rank, tmp_path / f"{rank}", port, recipe) for rank in range(2))
    _, errors = second.communicate(timeout=HANG_SECONDS)
    assert second.returncode == 1
    assert f"error: training.output_dir: {tmp_path}/1/out on this node is not" in errors
    first.communicate(timeout=HANG_SECONDS)  # it waits until the other has ended
    assert first.returncode != 0


# -- the number of processes ---------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_check_world_size_rejects_a_wrong_number(environment):
    for expected in (None, 2):
        check_world_size(2, expected)
    with pytest.raises(
        RecipeError,
        match=r"expects 4 process\(es\) and 1 run. Use: torchrun --nproc_per_node 4 -m training",
    ):
        check_world_size(1, 4)


def test_check_world_size_rejects_the_single_process_of_accelerate(environment):
    """On a machine without GPUs, `accelerate launch --num_processes 2` starts one process without a
    warning."""
    environment.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_world_size(1, None)  # it was asked for one
    environment.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(RecipeError, match="was asked for several processes and started one"):
        check_world_size(1, None)
    environment.setenv("WORLD_SIZE", "2")
    check_world_size(2, None)  # on GPUs it starts them
    environment.delenv("ACCELERATE_MIXED_PRECISION")
    environment.delenv("WORLD_SIZE")
    check_world_size(1, None)  # another launcher
