"""Parts of `benchmarks.gpu`, with the product's own model, trainer, GradCache and losses.

Shapes: B rows, T frames, N visual tokens, Dx their width, L query tokens, Ly target tokens, D
embedding size.
"""

import copy
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import nn
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from transformers.utils import is_flash_attn_2_available, logging

from benchmarks.configs import MID
from benchmarks.gpu_lines import Lines, Part, Skip
from benchmarks.loss import plain, tiled
from benchmarks.report import machine
from modeling_vljepa import VLJEPAConfig, VLJEPAModel
from modeling_vljepa.losses import info_nce
from processing import VLJEPAVideoProcessor
from training.arguments import SourceArguments, VLJEPATrainingArguments
from training.loop.grad_cache import cached_step
from training.loop.objective import Embeds, Ids, Objective, check_objective
from training.loop.speed import reachable_flops, synchronize
from training.loop.trainer import VLJEPATrainer
from training.memory import ADAPTED, FULL, MEASURED_ROWS, Need, Setting, measure
from training.model.adapters import prepare_for_training

Batch = dict[str, torch.Tensor]

RESERVE = 1.5 * 2**30  # bytes of the GPU that `training.memory` does not count
SETTINGS = {"full": Setting("full", FULL), "LoRA": Setting("LoRA", ADAPTED, {"r": 16})}
FIRST_ROWS = 64  # of a step, if `training.memory` fails on the machine
# The host waits for the device in these operations of the profile. `cudaDeviceSynchronize` is that
# of `Clock`.
WAITS = ("aten::item", "cudaStreamSynchronize", "cudaEventSynchronize")
# Largest differences of two computations. Unit vectors: length of the difference. Gradients: length
# of the difference, divided by that of the gradient. fp32 products are summed in another order.
UNIT_FP32, LOSS_FP32, GRADIENT_FP32 = 1e-4, 1e-4, 1e-3
UNIT_BF16, LOSS_BF16, GRADIENT_BF16 = 0.05, 0.05, 0.1  # bf16 has eight bits


@dataclass(frozen=True)
class Sizes:
    """Sizes of all parts.

    Attributes:
        config: configuration of the measured model; `small` is that of the model for parity.
        frames: frames of a clip in training.
        lengths: tokens of queries and of targets.
        rows: rows of a step; `None` for those that fit. `most` bounds them.
        memory_rows: rows for which `training.memory` is asked.
        warm_up, steps: steps that do not count, and steps that do.
        gradcache: rows of a GradCache step.
        loss: rows and width of the loss.
        asked: clips of a batch by their number of frames, for `predict`.
        tokens: tokens that the language model writes.
        compiler: backend of `torch.compile`.
    """

    config: VLJEPAConfig
    small: VLJEPAConfig
    frames: int
    lengths: tuple[int, int]
    rows: int | None
    most: int
    memory_rows: tuple[int, ...]
    warm_up: int
    steps: int
    gradcache: int
    loss: tuple[int, int]
    asked: dict[int, int]
    tokens: int
    compiler: str


def tiny_config() -> VLJEPAConfig:
    """Return the mid-size configuration with one narrow layer in each module."""
    parts = copy.deepcopy(MID)
    narrow = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    for name, part in parts.items():
        part |= narrow
        if name != "vision_config":
            part |= {"vocab_size": 300, "head_dim": 16, "num_key_value_heads": 1}
            part["intermediate_size"] = 32
    parts["vision_config"] |= {"crop_size": 32, "pred_hidden_size": 16}
    parts["text_config"]["query_pre_attn_scalar"] = 16
    return VLJEPAConfig(**parts, embedding_dim=24)


# The paper's second stage: eight frames of 256 pixels.
PAPER = Sizes(
    config=VLJEPAConfig(),
    small=VLJEPAConfig(**copy.deepcopy(MID)),
    frames=8,
    lengths=(32, 64),
    rows=None,
    most=512,
    memory_rows=MEASURED_ROWS,
    warm_up=2,
    steps=5,
    gradcache=4096,
    loss=(24_576, 1536),
    asked={8: 16, 64: 4},
    tokens=20,
    compiler="inductor",
)
TINY = Sizes(
    config=tiny_config(),
    small=tiny_config(),
    frames=2,
    lengths=(4, 6),
    rows=3,
    most=3,
    memory_rows=(1, 3),
    warm_up=1,
    steps=1,
    gradcache=5,
    loss=(40, 16),
    asked={2: 2, 4: 1},
    tokens=3,
    compiler="eager",  # inductor would compile C++ for half a minute
)


def facts(device: torch.device) -> dict[str, str | int | float]:
    """Return the machine and the versions; a GPU is named first."""
    found = machine()
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        size = f"{gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        found["processor"] = f"{gpu.name} ({size}), {found['processor']}"
    return found


class Lab:
    """Device, sizes and results that several parts use.

    Attributes:
        trained: rows and seconds of a step, by case.
    """

    def __init__(self, device: torch.device, lines: Lines, sizes: Sizes):
        self.device, self.lines, self.sizes = device, lines, sizes
        self.trained: dict[Case, tuple[int, float]] = {}
        self.pool: ProcessPoolExecutor | None = None
        self.futures: dict[str, Future[Need]] = {}
        self.needs: dict[str, Need | None] = {}
        self.reachable: float | None = None

    def __enter__(self) -> "Lab":
        if self.device.type == "cuda":  # in processes of their own, while the GPU works
            self.pool = ProcessPoolExecutor(
                len(SETTINGS),
                mp_context=get_context("spawn"),
                initializer=logging.set_verbosity_error,
            )
            for name in SETTINGS:
                self.futures[name] = self.pool.submit(need_of, self.sizes, name)
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def need(self, name: str) -> Need | None:
        """Return what `training.memory` predicts for a setting; `None` if it fails."""
        if name not in self.needs:
            self.needs[name] = None
            try:
                future = self.futures.get(name)
                self.needs[name] = need_of(self.sizes, name) if future is None else future.result()
            except Exception as error:  # the steps can be measured without it
                note = f"failed: {type(error).__name__}: {error}"
                self.lines.fail("training.memory", name, note)
        return self.needs[name]

    def peak_flops(self) -> float:
        """Return the operations per second of a large bf16 matrix product, measured once."""
        if self.reachable is None:
            self.reachable = reachable_flops(self.device, torch.bfloat16)
            self.lines.add("train", "matrix product", {"TFLOP/s": self.reachable / 1e12})
        return self.reachable

    def reset_peak(self) -> int:
        """Free unused memory and start to measure the peak; return the bytes that are in use."""
        if self.device.type != "cuda":
            return 0
        gc.collect()  # a trainer and its model refer to each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self, before: int | None = None) -> dict[str, float]:
        """Return the peak in GiB since `reset_peak`, as a column; a CPU has none.

        Args:
            before: bytes that do not count, such as those of a model.
        """
        if self.device.type != "cuda":
            return {}
        name = "peak GiB" if before is None else "added GiB"
        return {name: (torch.cuda.max_memory_allocated(self.device) - (before or 0)) / 2**30}

    def least_seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Return the seconds of the fastest of several calls, after a first one."""
        best = float("inf")
        for repeat in range(repeats + 1):
            synchronize(self.device)
            since = time.perf_counter()
            call()
            synchronize(self.device)
            if repeat:
                best = min(best, time.perf_counter() - since)
        return best


def need_of(sizes: Sizes, name: str) -> Need:
    setting = SETTINGS[name]
    return measure(sizes.config, setting, sizes.frames, sizes.lengths, rows=sizes.memory_rows)


def predicted_peak(need: Need, rows: int) -> float:
    """Return the bytes that `training.memory` predicts for a step of `rows` rows."""
    known, held = list(need.steps), list(need.steps.values())
    beyond = max(0, rows - known[-1]) * need.row
    return need.fixed("fp32") + float(np.interp(rows, known, held)) + beyond


# -- batches -----------------------------------------------------------------------------------


def random_texts(config: VLJEPAConfig, rows: int, lengths: tuple[int, int], masks: bool) -> Batch:
    """Return tokens `(B, L)` and `(B, Ly)`, and masks if lengths differ."""
    generator = torch.Generator().manual_seed(0)
    batch = {}
    for prefix, length, part in (
        ("", lengths[0], config.predictor_config),
        ("target_", lengths[1], config.text_config),
    ):
        ids = torch.randint(3, part.vocab_size, (rows, length), generator=generator)
        batch[f"{prefix}input_ids"] = ids
        if masks:
            ends = torch.randint(1, length + 1, (rows, 1), generator=generator)
            ends[0] = length  # a batch is padded to its longest text
            batch[f"{prefix}attention_mask"] = (torch.arange(length) < ends).long()
    return batch


def repeated(block: torch.Tensor, rows: int) -> torch.Tensor:
    """Repeat rows: random numbers for thousands of clips would take longer than a step."""
    return block.repeat(-(-rows // len(block)), *[1] * (block.ndim - 1))[:rows]


def random_batch(sizes: Sizes, rows: int, *, cached: bool, masks: bool) -> dict:
    """Return a batch of the trainer's collator: clips of noise, or stored visual tokens."""
    vision = sizes.config.vision_config
    side, block = vision.crop_size, min(rows, 32)
    if cached:
        tubelets = -(-sizes.frames // vision.tubelet_size)
        shape = (block, tubelets * (side // vision.patch_size) ** 2, vision.hidden_size)
        clips = {"visual_embeds": repeated(torch.randn(shape).bfloat16(), rows)}
    else:
        shape = (block, sizes.frames, 3, side, side)
        clips = {"frames": repeated(torch.randint(256, shape, dtype=torch.uint8), rows)}
    index = torch.arange(rows)
    return {
        **clips,
        **random_texts(sizes.config, rows, sizes.lengths, masks),
        **dict.fromkeys(("target_index", "target_ids", "group_ids"), index),
        "source": 0,
        "bad_rows": [],
    }


# -- training ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A kind of training step.

    Attributes:
        setting: a key of `SETTINGS`.
        cached: visual tokens come from a feature store.
        attention: "sdpa", "flash" (only torch's flash kernel) or "flash_attention_2" (its package).
        compiled: with `torch_compile`.
    """

    setting: str
    cached: bool = False
    attention: str = "sdpa"
    compiled: bool = False

    def __str__(self) -> str:
        words = [self.setting, "cached" if self.cached else "live", self.attention]
        return ", ".join([*words, *["compiled"] * self.compiled])


CASES = (
    Case("full"),
    Case("LoRA"),
    Case("full", cached=True),
    Case("LoRA", cached=True),
    Case("full", attention="flash"),
    Case("full", attention="flash_attention_2"),
)
COMPILED = (Case("full", compiled=True), Case("LoRA", cached=True, compiled=True))


class Noise(Dataset):
    """One batch, for every step."""

    def __init__(self, batch: dict, steps: int):
        self.batch, self.steps = batch, steps
        self.sources = [SimpleNamespace(arguments=SourceArguments(rows="noise"))]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict:
        return dict(self.batch)  # a step removes entries


class NoiseTrainer(VLJEPATrainer):
    """Trainer whose loader yields the batches of its dataset."""

    def get_train_dataloader(self) -> DataLoader:
        pinned = self.args.dataloader_pin_memory
        return DataLoader(self.train_dataset, batch_size=None, pin_memory=pinned)


@dataclass
class Clock(TrainerCallback):
    """Seconds of each step, and a profile of the last one if a profiler is given."""

    device: torch.device
    last: int
    profiler: profile | None = None
    seconds: list[float] = field(default_factory=list)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        synchronize(self.device)
        if self.profiler is not None and state.global_step == self.last - 1:
            self.profiler.start()
        self.since = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.since)
        if self.profiler is not None and state.global_step == self.last:
            self.profiler.stop()


def build(lab: Lab, case: Case, args: VLJEPATrainingArguments) -> nn.Module:
    """Build the model on the device and prepare it as `training.train` does."""
    config, setting = copy.deepcopy(lab.sizes.config), SETTINGS[case.setting]
    config.update(setting.changes)
    with lab.device:
        model = VLJEPAModel(config)
    if case.attention == "flash_attention_2":
        model.set_attn_implementation("flash_attention_2")
    check_objective(model, args)
    return prepare_for_training(model, setting.lora, args)


@contextmanager
def fresh_accelerator():
    """Forget the settings of the last trainer: accelerate would keep them in this process."""
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
            del os.environ[name]
        AcceleratorState._reset_state()
        torch._dynamo.reset()


def kernels(case: Case) -> AbstractContextManager:
    if case.attention != "flash":
        return nullcontext()
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def train(
    lab: Lab,
    case: Case,
    rows: int,
    *,
    warm_up: int,
    steps: int,
    part: int | None = None,
    profiler: profile | None = None,
) -> tuple[float, float, dict[str, float]]:
    """Train for some steps.

    Args:
        part: rows of a part of GradCache.

    Returns: seconds and operations of a step, and the peak of memory as a column.
    """
    lab.reset_peak()
    # No mask: torch's flash kernel reads none.
    batch = random_batch(
        lab.sizes, rows, cached=case.cached, masks=not case.attention.startswith("flash")
    )
    with tempfile.TemporaryDirectory() as folder, fresh_accelerator(), kernels(case):
        args = VLJEPATrainingArguments(
            output_dir=folder,
            max_steps=warm_up + steps,
            global_batch_size=rows,
            gradient_cache_rows=part,
            precision="bf16",
            learning_rate=1e-5,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            use_cpu=lab.device.type == "cpu",
            torch_compile=case.compiled,
            torch_compile_backend=lab.sizes.compiler if case.compiled else None,
        )
        clock = Clock(lab.device, warm_up + steps, profiler)
        trainer = NoiseTrainer(
            model=build(lab, case, args),
            args=args,
            train_dataset=Noise(batch, warm_up + steps),
            processing_class=SimpleNamespace(video_processor=VLJEPAVideoProcessor()),
            callbacks=[clock],
            settings={},
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        flops = trainer.floating_point_ops(batch)
    return statistics.median(clock.seconds[warm_up:]), flops, lab.peak()


def rows_that_fit(lab: Lab, case: Case) -> int:
    """Return the rows that `training.memory` expects to fit."""
    if lab.sizes.rows is not None:
        return lab.sizes.rows
    need = lab.need(case.setting)
    if need is None:
        return FIRST_ROWS
    room = torch.cuda.mem_get_info(lab.device)[0] - RESERVE
    return max(1, min(lab.sizes.most, need.most_rows(room, "fp32")))


def train_case(lab: Lab, case: Case) -> None:
    """Measure the largest step of a case; a step that does not fit is tried with fewer rows."""
    if case.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise Skip("the package flash_attn is not installed")
    peak_flops = lab.peak_flops()
    lab.reset_peak()
    rows, found = rows_that_fit(lab, case), None
    while found is None:
        try:
            found = train(lab, case, rows, warm_up=lab.sizes.warm_up, steps=lab.sizes.steps)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        if found is None:  # outside of `except`, whose traceback holds the tensors of the step
            lab.lines.add("train", str(case), {"rows": rows}, "out of memory: fewer rows are tried")
            rows = rows * 9 // 10
    seconds, flops, peak = found
    lab.trained[case] = rows, seconds
    need = lab.need(case.setting)
    if need is not None and not case.cached:  # the prediction is that of a live step
        predicted = predicted_peak(need, rows) / 2**30
        ratio = {name: value / predicted for name, value in peak.items()}
        peak |= {"predicted GiB": predicted}
        peak |= {f"{name} / predicted": value for name, value in ratio.items()}
    numbers = {"rows": rows, "samples/s": rows / seconds, "s/step": seconds}
    mfu = flops / seconds / peak_flops
    lab.lines.add("train", str(case), numbers | {"MFU": mfu, **peak})


def gradcache(lab: Lab) -> None:
    """Measure one step of GradCache, with the rows per part that the largest step has."""
    case, rows = Case("full"), lab.sizes.gradcache
    # A step keeps the gradients of all rows' embeddings, and has no warm-up: some memory to spare.
    part = lab.trained[case][0] if case in lab.trained else rows_that_fit(lab, case)
    part = max(1, part * 9 // 10)
    seconds, _, peak = train(lab, case, rows, warm_up=0, steps=1, part=part)
    numbers = {"rows": rows, "rows of a part": part, "samples/s": rows / seconds}
    lab.lines.add("gradcache", str(case), numbers | peak)


# -- parity ------------------------------------------------------------------------------------


@contextmanager
def without_tf32():
    """Compute fp32 products of a GPU in fp32: cuDNN's convolutions would round to TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def loss_of(embeds: Embeds) -> torch.Tensor:
    index = torch.arange(len(embeds.predicted_embeds), device=embeds.predicted_embeds.device)
    return Objective()(embeds, Ids(index, index, index))[0]


def gradients(model: nn.Module) -> torch.Tensor:
    """Return the gradient of all parameters as one vector, on the CPU; clear it."""
    found = [p.grad.float().cpu().flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(found)


def plain_step(
    model: VLJEPAModel, batch: Batch, bf16: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return both embeddings `(2, B, D)`, the loss `()` and the gradient, on the CPU."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        output = model(**batch)
    loss = loss_of(Embeds(output.predicted_embeds, output.target_embeds, output.logit_scale))
    loss.backward()
    embeds = torch.stack([output.predicted_embeds, output.target_embeds])
    return embeds.detach().float().cpu(), loss.detach().float().cpu(), gradients(model)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def parity(lab: Lab) -> None:
    """Compare the device with the CPU, and different ways to compute one value."""
    sizes, rows, compare = lab.sizes, 6, lab.lines.compare
    torch.manual_seed(0)
    on_cpu = VLJEPAModel(sizes.small).train()
    on_device = copy.deepcopy(on_cpu).to(lab.device)
    side = sizes.small.vision_config.crop_size
    batch = random_texts(sizes.small, rows, sizes.lengths, masks=True)
    batch["pixel_values_videos"] = torch.randn(rows, 2, 3, side, side)
    moved = {name: tensor.to(lab.device) for name, tensor in batch.items()}
    with without_tf32():
        embeds, loss, gradient = plain_step(on_cpu, batch)
        its_embeds, its_loss, its_gradient = plain_step(on_device, moved)
        cached_step(
            on_device,
            batch,
            rows=4,
            loss_of=loss_of,
            make_ready=lambda part: {name: each.to(lab.device) for name, each in part.items()},
        )
        by_parts = gradients(on_device)
        rounded = plain_step(on_device, moved, bf16=True)
    pair = f"{lab.device.type} and cpu, fp32"
    compare(f"embeddings, {pair}", (its_embeds - embeds).norm(dim=-1).max().item(), UNIT_FP32)
    compare(f"loss, {pair}", (its_loss - loss).abs().item(), LOSS_FP32)
    compare(f"gradient, {pair}", relative(its_gradient, gradient), GRADIENT_FP32)
    compare("gradient, GradCache and one batch", relative(by_parts, its_gradient), GRADIENT_FP32)
    distance = (rounded[0] - its_embeds).norm(dim=-1).max().item()
    compare("embeddings, bf16 and fp32", distance, UNIT_BF16)
    compare("loss, bf16 and fp32", (rounded[1] - its_loss).abs().item(), LOSS_BF16)
    compare("gradient, bf16 and fp32", relative(rounded[2], its_gradient), GRADIENT_BF16)


def loss_parity(lab: Lab) -> None:
    """Compare the tiled loss with the plain one, on the device, with equal texts among the rows."""
    rows, width = 96, 64
    found = []
    for function in (plain, lambda *inputs: info_nce(*inputs, tile_elements=7 * rows).loss):
        leaves, scale, ids = unit_vectors(rows, width, lab.device)
        with without_tf32():
            loss = function(*leaves, scale, ids)
            loss.backward()
        grads = [each.grad.flatten() for each in (*leaves, scale)]
        found.append((loss.detach(), torch.cat(grads)))
    (loss, gradient), (its_loss, its_gradient) = found
    lab.lines.compare("loss, tiled and plain", (its_loss - loss).abs().item(), LOSS_FP32)
    lab.lines.compare(
        "gradient of the loss, tiled and plain", relative(its_gradient, gradient), GRADIENT_FP32
    )


# -- loss --------------------------------------------------------------------------------------


def unit_vectors(
    rows: int, width: int, device: torch.device
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return two sides of unit vectors, a scale, and text ids of which some occur twice."""
    torch.manual_seed(0)
    sides = [
        F.normalize(torch.randn(rows, width), dim=1).to(device).requires_grad_() for _ in range(2)
    ]
    scale = torch.tensor([14.3], device=device, requires_grad=True)
    return sides, scale, torch.randint(5 * rows, (rows,)).to(device)


def loss_speed(lab: Lab) -> None:
    """Measure the loss, forward and backward, in fp32; inputs and gradients do not count."""
    rows, width = lab.sizes.loss
    sides, scale, ids = unit_vectors(rows, width, lab.device)
    for name, function in (("tiled", tiled), ("plain", plain)):

        def step(function: Callable = function) -> None:
            function(*sides, scale, ids).backward()

        step()  # allocates the gradients
        before = lab.reset_peak()
        seconds = lab.least_seconds(step, repeats=3)
        numbers = {"rows": rows, "ms": 1000 * seconds} | lab.peak(before)
        lab.lines.add("loss", f"{name}, {width} dimensions", numbers)


# -- prediction --------------------------------------------------------------------------------


def language_model(model: VLJEPAModel) -> nn.Module:
    """Return a causal language model with the Predictor's layers and random weights."""
    config = copy.deepcopy(model.config.predictor_config)
    config.is_causal = True
    with model.device:
        return AutoModelForCausalLM.from_config(config).to(model.dtype).eval()


def predict_speed(lab: Lab, frames: int) -> None:
    """Compare `predict` with an answer that a language model writes after the same tokens."""
    sizes, rows = lab.sizes, lab.sizes.asked[frames]
    torch.manual_seed(0)
    with lab.device:
        model = VLJEPAModel(sizes.config).to(torch.bfloat16).eval()
    writer = language_model(model)
    side = sizes.config.vision_config.crop_size
    shape = (rows, frames, 3, side, side)
    pixels = torch.randn(shape, device=lab.device, dtype=torch.bfloat16)
    query = random_texts(sizes.config, rows, sizes.lengths, masks=False)["input_ids"].to(lab.device)

    def predict() -> torch.Tensor:
        return model.predict(pixels, query)  # (B, D)

    def write() -> torch.Tensor:
        visual = model.predictor.visual_projection(model.encode_video(pixels))  # (B, N, Dp)
        prompt = torch.cat([visual, writer.get_input_embeddings()(query)], dim=1)
        return writer.generate(
            inputs_embeds=prompt,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long, device=lab.device),
            max_new_tokens=sizes.tokens,
            min_new_tokens=sizes.tokens,
            do_sample=False,
            pad_token_id=0,
        )  # (B, tokens)

    with torch.inference_mode():
        before = lab.reset_peak()
        predicting = lab.least_seconds(predict, repeats=3)
        memory = lab.peak(before)
        writing = lab.least_seconds(write, repeats=1)
    numbers = {
        "clips": rows,
        "embeddings/s": rows / predicting,
        f"answers/s, {sizes.tokens} tokens": rows / writing,
        "written / predicted, seconds": writing / predicting,
    }
    lab.lines.add("predict", f"{frames} frames", numbers | memory)


# -- profile -----------------------------------------------------------------------------------


def covered(intervals: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def profile_slowest(lab: Lab) -> None:
    """Profile a step of the slowest case."""
    if not lab.trained:
        raise Skip("no training step was measured")
    case = min(lab.trained, key=lambda each: lab.trained[each][0] / lab.trained[each][1])
    rows, _ = lab.trained[case]
    on_gpu = lab.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    profiler = profile(activities=activities)
    train(lab, replace(case, compiled=False), rows, warm_up=1, steps=1, profiler=profiler)
    averages = [
        each
        for each in profiler.key_averages()
        # The time of a kernel counts for the operation that started it.
        if each.device_type == DeviceType.CPU and not each.is_user_annotation
    ]
    spent = {each.key: own_time(each, on_gpu) for each in averages}
    counts = {each.key: each.count for each in averages}
    total = sum(spent.values()) or 1.0
    for rank, key in enumerate(sorted(spent, key=spent.get, reverse=True)[:10], 1):
        numbers = {"ms": spent[key] / 1000, "share": spent[key] / total, "calls": counts[key]}
        lab.lines.add("profile", f"{case}: {rank}. {key[:80]}", numbers)
    events = [each for each in profiler.events() if not each.is_user_annotation]
    spans = [(each.time_range.start, each.time_range.end) for each in events]
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    waits = [span for span, each in zip(spans, events, strict=True) if each.name in WAITS]
    numbers = {"ms": wall / 1000, **{name: counts.get(name, 0) for name in WAITS}}
    numbers["share of waits"] = covered(waits) / wall
    if on_gpu:
        kinds = [each.device_type for each in events]
        busy = [span for span, kind in zip(spans, kinds, strict=True) if kind == DeviceType.CUDA]
        numbers["idle share of the GPU"] = 1 - covered(busy) / wall
    lab.lines.add("profile", f"{case}: step", numbers)


def own_time(average, on_gpu: bool) -> float:
    """Return the microseconds of an operation without those that it calls."""
    return average.self_device_time_total if on_gpu else average.self_cpu_time_total


# -- all ---------------------------------------------------------------------------------------


def parts(lab: Lab) -> list[Part]:
    """Return the parts in the order of their worth: the last ones are the first to be skipped."""

    def cases(chosen: tuple[Case, ...], seconds: float) -> list[Part]:
        limit = seconds if lab.device.type == "cuda" else 0
        return [
            Part(f"train {case}", limit, lambda case=case: train_case(lab, case)) for case in chosen
        ]

    def part(name: str, seconds: float, run: Callable[..., None], *arguments) -> Part:
        limit = seconds if lab.device.type == "cuda" else 0
        return Part(name, limit, lambda: run(lab, *arguments))

    return [
        part("parity model", 40, parity),
        part("parity loss", 5, loss_parity),
        *cases(CASES, 45),
        part("loss", 20, loss_speed),
        *[part(f"predict {n} frames", 40, predict_speed, n) for n in lab.sizes.asked],
        part("profile", 40, profile_slowest),
        part("gradcache", 110, gradcache),
        *cases(COMPILED, 100),
    ]
