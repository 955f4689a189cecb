"""The estimated memory of a step equals the memory of a real one."""

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from modeling_vljepa import VLJEPAConfig
from tests.tiny import noise, tiny_config, tiny_recipe, write_rows
from training import memory
from training.arguments import RecipeError
from training.loop.grad_cache import cached_step
from training.loop.objective import Embeds, Ids, Objective
from training.memory import (
    SETTINGS,
    HeldMemory,
    Need,
    main,
    make_ready,
    markdown,
    measure,
    model_to_train,
    random_batch,
    table_line,
    training_step,
    waiting_row,
)
from training.model.parameters import count_parameters
from training.train import main as train

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "memory.md"
BY_NAME = {setting.name: setting for setting in SETTINGS}
LENGTHS = (5, 12)  # tokens of queries, and of targets
MIB = 2**20

# Half a GiB for a step of sixteen clips.
LARGER = {
    "vision_config": {"crop_size": 64, "hidden_size": 192},
    "predictor_config": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "head_dim": 64,
    },
}
LARGER_STEP = {"rows": 16, "frames": 32}


@pytest.fixture(scope="module")
def needs() -> dict[str, Need]:
    """Memory of a tiny model for clips of eight frames, by setting."""
    names = ("full", "full, checkpointing", "LoRA", "X-Encoder too")
    return {name: measure(tiny_config(), BY_NAME[name], 8, LENGTHS, rows=(1, 16)) for name in names}


# -- the count -----------------------------------------------------------------------------


def test_held_memory_counts_each_storage_once_until_it_is_freed():
    with HeldMemory() as held:
        kilo = torch.zeros(256)  # 1 KiB
        view = kilo.view(16, 16).T
        assert (held.held, held.peak) == (1024, 1024)
        doubled = view + view
        assert (held.held, held.peak) == (2048, 2048)
        del kilo, view
        assert (held.held, held.peak) == (1024, 2048)
        doubled.add_(1)
        assert (held.held, held.peak) == (1024, 2048)


def test_need_fixed_equals_weights_gradients_and_states(needs):
    for name, need in needs.items():
        model = model_to_train(tiny_config(), BY_NAME[name], bf16=True)
        count = count_parameters(model)["all"]
        assert need.trained == count["trainable"]
        assert need.gradients == 4 * need.trained
        assert need.fixed("fp32") == need.weights + need.gradients + 8 * need.trained
        assert need.fixed("8-bit") == need.weights + need.gradients + 2.03125 * need.trained
    # Frozen: the X-Encoder and the token table, in bf16. The rest is buffers: rotary frequencies
    # and the scale of Gemma's embedding.
    need = needs["full"]
    frozen = count_parameters(model_to_train(tiny_config(), BY_NAME["full"], bf16=True))["all"]
    frozen = frozen["parameters"] - frozen["trainable"]
    assert 0 <= need.weights - 4 * need.trained - 2 * frozen < 1000


@pytest.mark.parametrize(
    ("name", "bf16"), [("full", True), ("LoRA, checkpointing", True), ("X-Encoder too", False)]
)
def test_measure_equals_a_step_on_real_tensors(name, bf16):
    estimate = measure(tiny_config(), BY_NAME[name], 4, LENGTHS, rows=[6], bf16=bf16).steps[6]
    torch.manual_seed(0)
    model = model_to_train(tiny_config(), BY_NAME[name], bf16)
    grown = []
    for size in (1, 6):  # the first step allocates the gradients
        with HeldMemory() as held:
            held.count([*model.parameters(), *model.buffers()])
            held.count([p.grad for p in model.parameters()])
            before = held.held
            training_step(model, random_batch(tiny_config(), size, 4, *LENGTHS), bf16)
        grown.append(held.peak - before)
    assert grown[1] == pytest.approx(estimate, rel=0.01)
    assert grown[0] < 0.7 * estimate  # positive control


@pytest.mark.parametrize("changes", [[], ["training.gradient_cache_rows=4"]], ids=["", "cached"])
def test_measure_equals_the_trainers_step(tmp_path, changes):
    """Peak memory of `VLJEPATrainer.training_step` on a batch of four images. At GradCache's peak
    the pixels have been replaced by visual tokens."""
    rows = []
    for number, text in enumerate(("red", "a cat", "two dogs", "he rides a bike")):
        Image.fromarray(noise(40 + number, 40, 3)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "query": f"is it {text} ?", "target": text})
    recipe = tiny_recipe(
        write_rows(tmp_path / "rows.jsonl", rows), global_batch_size=4, max_steps=1
    )
    trainer = train([str(recipe), *changes])
    batch = next(iter(trainer.get_train_dataloader()))
    lengths = tuple(batch[f"{side}input_ids"].shape[1] for side in ("", "target_"))
    with HeldMemory() as held:
        held.count([*trainer.model.parameters(), *trainer.model.buffers()])
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        before = held.held
        held.count(batch)
        trainer.training_step(trainer.model, batch)
    # At the end: `measure` creates training arguments, which change accelerate's shared state.
    need = measure(trainer.model.config, BY_NAME["full"], 1, lengths, rows=[4], bf16=False)
    pixels = 4 * batch["frames"].nbytes if changes else 0
    assert held.peak - before == pytest.approx(need.steps[4] - pixels, rel=0.02)


def allocated_by_a_real_step(name: str) -> int:
    """Return the peak of torch's allocator in a step of the `LARGER` model, above its start."""
    model = model_to_train(tiny_config(**LARGER), BY_NAME[name], bf16=False)
    for rows in (1, LARGER_STEP["rows"]):  # the first step allocates the gradients
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            batch = random_batch(model.config, rows, LARGER_STEP["frames"], *LENGTHS)
            training_step(model, batch, bf16=False)
    events = profiled.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(sizes))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "full, checkpointing"])
def test_measure_equals_the_allocators_peak(name):
    """A larger model, measured by torch's profiler in a real step."""
    measured = allocated_by_a_real_step(name)
    rows, frames = LARGER_STEP["rows"], LARGER_STEP["frames"]
    estimates = {
        each: measure(
            tiny_config(**LARGER), BY_NAME[each], frames, LENGTHS, rows=[rows], bf16=False
        ).steps[rows]
        for each in ("full", "full, checkpointing")
    }
    print(f"{name}: estimate {estimates[name] / MIB:.0f} MiB, measured {measured / MIB:.0f} MiB")
    assert estimates[name] > 100 * MIB
    assert (
        estimates["full, checkpointing"] < 0.7 * estimates["full"]
    )  # more than the tolerance below
    assert estimates[name] == pytest.approx(measured, rel=0.05)


# -- growth --------------------------------------------------------------------------------


def test_measure_grows_with_rows_and_frames(needs):
    for need in needs.values():
        assert 2 * need.steps[1] < need.steps[16]
    still = measure(tiny_config(), BY_NAME["full"], 1, LENGTHS, rows=(1, 16))
    assert all(still.steps[rows] < needs["full"].steps[rows] for rows in (1, 16))
    assert still.fixed("fp32") == needs["full"].fixed("fp32")


def test_measure_shrinks_with_checkpointing_adapters_and_8_bit_states(needs):
    assert needs["full, checkpointing"].row < 0.8 * needs["full"].row
    assert needs["full, checkpointing"].fixed("fp32") == needs["full"].fixed("fp32")
    assert all(need.fixed("8-bit") < need.fixed("fp32") for need in needs.values())
    assert needs["LoRA"].row < needs["full"].row < needs["X-Encoder too"].row
    fixed = [needs[name].fixed("fp32") for name in ("LoRA", "full", "X-Encoder too")]
    assert fixed == sorted(fixed)


@pytest.mark.parametrize("rows", [5, 30])
def test_most_rows_fit_between_and_beyond_the_measured_steps(needs, rows):
    """In the memory of a step of n rows, n rows fit, or at most 5 % fewer."""
    truth = measure(tiny_config(), BY_NAME["full"], 8, LENGTHS, rows=[rows])
    found = needs["full"].most_rows(truth.fixed("fp32") + truth.steps[rows], "fp32")
    assert 0.95 * rows - 1 <= found <= rows


def test_waiting_row_equals_the_growth_of_a_cached_step():
    """GradCache with two rows at a time. The first step allocates the gradients; the batch is
    allocated before."""
    waits, on_device = waiting_row(tiny_config(), 4, LENGTHS, bf16=False)
    batch_of_it, tokens = 4 * 3 * 32 * 32 + 2 * 8 * (5 + 12), 4 * (2 * 4 * 48)
    assert (waits, on_device) == (batch_of_it + tokens, 2 * 4 * 24)
    assert waiting_row(tiny_config(), 4, LENGTHS)[0] == batch_of_it + tokens // 2
    pooled = tiny_config(visual_token_pooling=2)
    assert waiting_row(pooled, 4, LENGTHS)[0] == batch_of_it + tokens // 8
    trained = tiny_config(freeze_vision=False)
    assert waiting_row(trained, 4, LENGTHS) == (batch_of_it, on_device)
    torch.manual_seed(0)
    model, peaks = model_to_train(tiny_config(), BY_NAME["full"], bf16=False), {}
    for size in (2, 8, 24):
        batch, indices = random_batch(tiny_config(), size, 4, *LENGTHS), torch.arange(size)
        ids = Ids(target_index=indices, target_ids=indices, group_ids=indices)

        def loss_of(embeds: Embeds, ids: Ids = ids) -> torch.Tensor:
            return Objective()(embeds, ids)[0]

        with HeldMemory() as held:
            held.count([*model.parameters(), *model.buffers(), batch])
            held.count([p.grad for p in model.parameters()])
            cached_step(model, batch, 2, loss_of, make_ready=make_ready)
        peaks[size] = held.peak
    assert (peaks[24] - peaks[8]) / 16 == pytest.approx(waits + on_device, rel=0.02)


# -- the table -----------------------------------------------------------------------------

HAND_MADE = Need(
    weights=2**30, gradients=2**29, trained=2**27, steps={1: 2**28, 2: 2**29, 4: 2**30}
)


def test_most_rows_computes_the_rows_that_fit():
    """Fixed: 1 + 1/2 + 1 GiB, or 1 + 1/2 + 0.254 GiB of 8 bits; a row: 1/4 GiB."""
    assert HAND_MADE.fixed("fp32") == 2.5 * 2**30
    rows = [HAND_MADE.most_rows(gib * 2**30, "fp32") for gib in (2, 2.74, 2.75, 3.24, 5.5, 1000)]
    assert rows == [0, 0, 1, 2, 12, 3990]
    assert HAND_MADE.most_rows(5.5 * 2**30, "8-bit") == 14


def test_table_line_contains_the_rows_that_fit():
    cells = table_line(SETTINGS[0], 8, HAND_MADE, [3, 8], reserve_gib=0.25)
    # 3 GB are 2.79 GiB, 2.54 of them usable; 8 GB are 7.45 GiB, 7.2 of them usable.
    assert cells == ["full", "8", "2.5 / 1.8", "256", "- / 3", "18 / 21"]
    assert markdown([["a", "bcd"], ["efg", "h"]]) == "| a   | bcd |\n| --- | --- |\n| efg | h   |"


@pytest.mark.slow
def test_memory_command_prints_a_line_for_each_setting_and_number_of_frames(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(memory, "SETTINGS", SETTINGS[2:3])
    tiny_config().save_pretrained(tmp_path)
    lengths = ["--query-length", "5", "--target-length", "12"]
    main(["--config", str(tmp_path), "--frames", "2", "8", *lengths, "--cards", "2", "16"])
    table, waiting = capsys.readouterr().out.strip().split("\n\n")
    header, _, *rows = table.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")][-2:] == ["2 GB", "16 GB"]
    found = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [cells[:2] for cells in found] == [["LoRA", "2"], ["LoRA", "8"]]
    counts = [[int(cell.split(" / ")[0]) for cell in cells[-2:]] for cells in found]
    assert (
        0 < counts[1][0] < counts[0][0] < counts[0][1]
    )  # fewer with more frames, more on a larger card
    assert waiting.splitlines() == [
        "A row that waits in GradCache, KiB on the card: 0",
        "A row that waits in GradCache, MiB of main memory, by frames: 0.0 at 2, 0.0 at 8",
    ]


def test_memory_command_refuses_a_folder_without_a_vljepa(tmp_path):
    with pytest.raises(RecipeError, match="--config: cannot load .*nowhere as a folder or Hub id"):
        main(["--config", str(tmp_path / "nowhere")])
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RecipeError, match="'bert' model, not of a VL-JEPA"):
        main(["--config", str(tmp_path)])
    with pytest.raises(RecipeError, match="give 1 or more"):
        main(["--frames", "0"])


# -- the document --------------------------------------------------------------------------


def documented() -> dict[tuple[str, str], list[str]]:
    """Return the cells of each line of the document's table, by setting and frames."""
    lines = [
        line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(line[0], line[1]): line for line in cells if line[0] in BY_NAME}


def test_memory_document_has_every_line():
    assert set(documented()) == {(name, frames) for name in BY_NAME for frames in ("1", "8", "32")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LoRA", "full, checkpointing"])
def test_memory_document_equals_the_commands_output(name):
    """A line for the paper's model is computed again with the defaults of the named command."""
    assert "\npython -m training.memory\n" in DOCUMENT.read_text(encoding="utf-8")
    need = measure(VLJEPAConfig(), BY_NAME[name], 8, (32, 64))
    assert table_line(BY_NAME[name], 8, need, [16, 24, 80, 141], 1.5) == documented()[name, "8"]
