"""Speed in the log: operations by formula and as counted by torch, rates and memory."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerControl, TrainerState

from modeling_vljepa import LORA_TARGET_MODULES
from tests.tiny import RESNET, TOWER, tiny_batch, tiny_model
from training.loop.speed import SpeedMeter, peak_memory, reachable_flops, training_flops

VISION = {"hidden_size": 192, "num_hidden_layers": 6}
IMAGE_TOWER = {"model_type": "dinov2", **TOWER}


def counted(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**batch, return_loss=True).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"freeze_vision": False, "vision_config": VISION},
        {"freeze_text": True},
        {"vision_config": IMAGE_TOWER},
        {"vision_config": {"crop_size": 64}, "visual_token_pooling": 2},
        {"vision_config": RESNET},
        {"vision_config": RESNET | {"hidden_sizes": [64, 96, 128]}, "freeze_vision": False},
    ],
    ids=str,
)
def test_training_flops_are_those_that_torch_counts(changes):
    """To 10 %: the formula ignores the heads and the class tokens of an image tower. It also counts
    a gradient through the first layer, which matters only if there are few layers."""
    model, batch = tiny_model(**changes), tiny_batch()
    batch.pop("attention_mask"), batch.pop("target_attention_mask")
    if "visual_token_pooling" in changes:
        batch["pixel_values_videos"] = torch.zeros(3, 4, 3, 64, 64)
    assert training_flops(model, batch) == pytest.approx(counted(model, batch), rel=0.1)


def test_training_flops_count_the_gradient_through_frozen_attention():
    """With adapters on long clips, it is a quarter of the step here."""
    model, batch = tiny_model(), tiny_batch()
    model.set_attn_implementation("eager")  # torch counts no operations of the CPU's own kernel
    (
        batch.pop("attention_mask"),
        batch.pop("target_attention_mask"),
        batch.pop("pixel_values_videos"),
    )
    batch["visual_embeds"] = torch.zeros(3, 512, model.config.vision_config.hidden_size)
    lora = LoraConfig(r=1, target_modules=LORA_TARGET_MODULES)
    adapted = get_peft_model(model, lora)
    with FlopCounterMode(display=False) as counter:
        adapted(**batch, return_loss=True).loss.backward()
    found = training_flops(adapted.base_model.model, batch)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_training_flops_are_fewer_for_frozen_or_given_parts():
    batch = tiny_batch()
    trained = training_flops(tiny_model(freeze_vision=False), batch)
    frozen = training_flops(tiny_model(), batch)
    assert trained > frozen
    lora = LoraConfig(r=2, target_modules=LORA_TARGET_MODULES)
    assert training_flops(get_peft_model(tiny_model(), lora), batch) < frozen
    pixels = batch.pop("pixel_values_videos")
    batch["visual_embeds"] = tiny_model().encode_video(pixels)
    assert training_flops(tiny_model(), batch) < frozen


def test_training_flops_count_a_shared_clip_once():
    model, batch = tiny_model(), tiny_batch()
    batch.pop("attention_mask"), batch.pop("target_attention_mask")
    whole, index = training_flops(model, batch), torch.tensor([0, 1, 0])
    batch["pixel_values_videos"] = batch["pixel_values_videos"][:2]
    with FlopCounterMode(display=False) as counter:
        model(**batch, visual_index=index, return_loss=True).loss.backward()
    found = training_flops(model, batch | {"visual_index": index})
    assert found == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert found < 0.95 * whole


@pytest.fixture
def unmeasured():
    """No stored speed of a device, before and after the test."""
    reachable_flops.cache_clear()
    yield
    reachable_flops.cache_clear()


def test_reachable_flops_is_the_rate_of_the_fastest_product(monkeypatch, unmeasured):
    """The clocks are the test's own: on a busy machine, equal products take unequal times."""
    times = iter([time for taken in (0.5, 0.2, 0.4) for time in (0.0, taken)])
    elapsed = iter([0.0, 0.1, 1.9, 2.1])  # the end, and after each product
    monkeypatch.setattr("training.loop.speed.time.thread_time", lambda: next(times))
    monkeypatch.setattr("training.loop.speed.time.monotonic", lambda: next(elapsed))
    threads = torch.get_num_threads()
    monkeypatch.setattr("training.loop.speed.torch.get_num_threads", lambda: 3)
    set_to = []
    monkeypatch.setattr("training.loop.speed.torch.set_num_threads", set_to.append)
    reachable = reachable_flops(torch.device("cpu"), torch.float32)
    assert reachable == pytest.approx(3 * 2 * 1024**3 / 0.2)  # one thread is timed, three compute
    assert list(times) == list(elapsed) == [] and set_to == [1, 3]
    monkeypatch.undo()
    assert torch.get_num_threads() == threads
    assert reachable_flops(torch.device("cpu"), torch.float32) == reachable  # not measured again


def test_reachable_flops_reads_the_real_clock(monkeypatch, unmeasured):
    monkeypatch.setattr("training.loop.speed.MEASURED_SECONDS", 0.0)  # one product
    assert 1e6 < reachable_flops(torch.device("cpu"), torch.float32) < 1e16


def test_peak_memory_includes_memory_freed_since():
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(64, 2**20)  # 256 MiB
    assert block.sum() == 64 * 2**20
    del block
    assert peak_memory(torch.device("cpu")) - before <= 2**30
    assert peak_memory(torch.device("cpu")) >= 2**28


def test_speed_meter_counts_steps_since_the_last_line_and_not_those_of_a_checkpoint(monkeypatch):
    now = 100.0
    monkeypatch.setattr("training.loop.speed.time.monotonic", lambda: now)
    args = SimpleNamespace(global_batch_size=8, world_size=2, device=torch.device("cpu"))
    state = TrainerState(global_step=1000, total_flos=7e15)  # of a run that resumes
    meter = SpeedMeter(peak_flops=5e11)
    meter.on_train_begin(args, state, TrainerControl())
    for seconds, steps in ((4.0, 10), (2.0, 20)):
        now += seconds
        state.global_step += steps
        state.total_flos += steps * 1e11
        speed = meter.read(args, state)
        assert speed["samples_per_second"] == pytest.approx(8 * steps / seconds)
        assert speed["tflops"] == pytest.approx(0.1 * steps / seconds / 2)  # of each process
        assert speed["mfu"] == pytest.approx(speed["tflops"] / 0.5)
    meter.peak_flops = None
    now += 1.0
    assert "mfu" not in meter.read(args, state)
