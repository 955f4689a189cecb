"""Two processes on halves of a batch are one process on the whole of it."""

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from modeling_vljepa import VLJEPAModel
from tests.tiny import tiny_model, tiny_recipe, tiny_rows
from training import trainer
from training.arguments import RecipeError
from training.distributed import all_gather, check_world_size
from training.train import main

ROOT = Path(__file__).parents[1]
ROWS = 8
# Text 5 and group 9 stand in both halves: their pairs are no negatives either.
TARGET_IDS = torch.tensor([1, 5, 3, 4, 5, 6, 7, 8])
GROUP_IDS = torch.tensor([9, -2, -3, -4, -5, -6, 9, -8])


class LocalGradient(torch.autograd.Function):
    """The trap: an all-gather whose backward returns the local slice alone."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return all_gather(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def share(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """This process's rows of the batch, as the collator would make them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(ROWS).chunk(world_size)[rank]
    pixels = torch.randn(ROWS, 2, 3, 32, 32, generator=generator)
    queries = torch.randint(3, 300, (ROWS, 4), generator=generator)
    texts = torch.randint(3, 300, (10, 6), generator=generator)
    distinct, index = TARGET_IDS[rows].unique(return_inverse=True)
    return {
        "pixel_values_videos": pixels[rows],
        "input_ids": queries[rows],
        "target_input_ids": texts[distinct],
        "target_index": index,
        "target_ids": TARGET_IDS[rows],
        "group_ids": GROUP_IDS[rows],
    }


def step(model: VLJEPAModel, rank: int = 0, world_size: int = 1) -> dict[str, torch.Tensor]:
    """Loss and gradient of one step, by the trainer's own `compute_loss`."""
    model.zero_grad()
    parallel = DistributedDataParallel(model) if world_size > 1 else model
    parts = SimpleNamespace(_parts=defaultdict(list))
    loss = trainer.VLJEPATrainer.compute_loss(parts, parallel, share(rank, world_size))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), "chance": parts._parts["chance_loss"][0], **gradients}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    results = {"right": step(tiny_model(), rank, 2)}
    trainer.gather_with_gradient = LocalGradient.apply
    results["local"] = step(tiny_model(), rank, 2)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    # A server that has imported this module forks both: one import for two processes.
    mp.set_forkserver_preload([__name__])
    context = mp.start_processes(
        work, args=(folder,), nprocs=2, join=False, start_method="forkserver"
    )
    try:
        assert any(context.join(timeout=30) for _ in range(4)), "the processes hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def off(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative distance of each gradient."""
    assert result.keys() == expected.keys()
    return {
        name: ((result[name] - expected[name]).norm() / expected[name].norm()).item()
        for name in expected
        if name not in ("loss", "chance")
    }


def test_loss_and_gradient_equal_one_process(results):
    expected = step(tiny_model())
    for result in results:
        torch.testing.assert_close(result["right"]["loss"], expected["loss"], rtol=1e-5, atol=0)
        assert torch.equal(result["right"]["chance"], expected["chance"])
        distances = off(result["right"], expected)
        assert max(distances.values()) <= 1e-5, max(distances, key=distances.get)
    boxes = {name.split(".")[0] for name in distances}
    assert boxes == {"predictor", "predictor_head", "y_encoder", "y_head", "logit_scale"}


def test_a_local_gradient_would_be_wrong(results):
    """The positive control: with a gather whose backward returns only the local slice, the loss
    is right to the last digit, and each tower's gradient is half of what it should be."""
    expected = step(tiny_model())
    for result in results:
        assert torch.equal(result["local"]["loss"], result["right"]["loss"])
        distances = off(result["local"], expected)
        assert distances.pop("logit_scale.weight") <= 1e-5
        assert list(distances.values()) == pytest.approx([0.5] * len(distances), abs=1e-5)


def test_rows_of_other_processes_share_targets_and_groups(results):
    """Two rows share text 5 and two share group 9, each pair across the processes."""
    expected = (4 * math.log(ROWS - 1) + 4 * math.log(ROWS)) / ROWS
    for result in results:
        assert result["right"]["chance"].item() == pytest.approx(expected, abs=1e-6)


def test_torchrun_goes_the_way_of_one_process(tmp_path):
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
        timeout=180,
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


# -- how many processes there are ----------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_wrong_number_of_processes_is_refused(environment):
    for expected in (None, 2):
        check_world_size(2, expected)
    with pytest.raises(
        RecipeError,
        match=r"expects 4 process\(es\) and 1 run. Use: torchrun --nproc_per_node 4 -m training",
    ):
        check_world_size(1, 4)


def test_accelerates_silent_single_process_is_refused(environment):
    """On a machine without GPUs, `accelerate launch --num_processes 2` starts one process and
    says nothing."""
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
