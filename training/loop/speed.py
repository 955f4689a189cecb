"""Speed and memory of training, as reported in the log."""

import json
import math
import resource
import sys
import time
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainerControl, TrainerState

from modeling_vljepa import VLJEPAModel
from modeling_vljepa.x_encoder import XEncoder, build_backbone, patch_edge
from training.arguments import VLJEPATrainingArguments

PRODUCTS = (nn.Linear, nn.Conv2d, nn.Conv3d)
MEASURED_SECONDS = 2.0  # of matrix products, for the speed that a device can reach


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all submitted work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_memory(device: torch.device) -> int:
    """Return this process's peak memory in bytes: GPU memory, or resident memory without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


@cache
def reachable_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations per second of a large matrix product over `MEASURED_SECONDS`.

    The fastest product counts. On a CPU one thread computes it, its processor time is measured, and
    the result is multiplied by the number of threads: the elapsed time would depend on the other
    programs of the machine. On this process's next calls the value is the same.
    """
    on_cpu = device.type == "cpu"
    # On a GPU several products follow each other, so that starting them costs nothing.
    size, products = (1024, 1) if on_cpu else (8192, 10)
    clock = time.thread_time if on_cpu else time.perf_counter
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    threads = torch.get_num_threads() if on_cpu else 1
    if on_cpu:
        torch.set_num_threads(1)
    best, end = float("inf"), time.monotonic() + MEASURED_SECONDS
    while best == float("inf") or time.monotonic() < end:
        synchronize(device)
        start = clock()
        for _ in range(products):
            left @ right
        synchronize(device)
        best = min(best, clock() - start)
    if on_cpu:
        torch.set_num_threads(threads)
    return 2 * size**3 * products / best * threads


def forward_flops(module: nn.Module, sequences: int, length: int, attention_width: int) -> int:
    """Count the operations of a transformer on `sequences` sequences of `length` tokens."""
    return sum(count_products(module, sequences, length, attention_width)[:2])


def count_products(
    module: nn.Module, sequences: int, length: int, attention_width: int
) -> tuple[int, int, float]:
    """Count the operations of a forward pass; return those of the weights, those of attention, and
    the share of the weights that train.

    Every weight of a matrix product is used once for each token, and attention multiplies each
    pair of tokens twice; all other operations are ignored (Chowdhery et al. 2022, appendix B).
    """
    weights = [m.weight for m in module.modules() if isinstance(m, PRODUCTS)]
    size = sum(w.numel() for w in weights)
    trained = sum(w.numel() for w in weights if w.requires_grad)
    attention = 2 * module.backbone.config.num_hidden_layers * length * attention_width
    return 2 * sequences * length * size, 2 * sequences * length * attention, trained / size


def step_flops(
    module: nn.Module, sequences: int, length: int, attention_width: int, through: bool = False
) -> float:
    """Count the operations of a transformer in a step, forward and backward.

    Activations need a gradient if any weight trains, or if it passes `through` to an earlier
    module. It costs one forward pass of the weights and two of attention, whose products have two
    activations each. The gradient of the weights costs the share of them that train.
    """
    weights, attention, trained = count_products(module, sequences, length, attention_width)
    backward = through or trained > 0
    return weights * (1 + backward + trained) + attention * (1 + 2 * backward)


def convolution_flops(encoder: XEncoder, frames: int, height: int, width: int) -> float:
    """Count the operations of a convolutional tower in a step, forward and backward.

    Its layers have maps of different sizes, so no formula of its weights counts them: torch counts
    those of one frame on tensors without memory.
    """
    config = encoder.backbone.config
    forward = frames * forward_of_frame(type(config), config.to_json_string(), height, width)
    trains = any(parameter.requires_grad for parameter in encoder.parameters())
    return forward * (1 + 2 * trains)


@cache
def forward_of_frame(cls: type, settings: str, height: int, width: int) -> int:
    """Count the operations of a convolutional tower on one frame, forward.

    Args:
        cls, settings: class and JSON of its configuration.
    """
    config = cls(**json.loads(settings))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build_backbone(config).eval()(torch.zeros(1, config.num_channels, height, width))
    return counter.get_total_flops()


def training_flops(model: VLJEPAModel, inputs: dict[str, torch.Tensor]) -> int:
    """Count the operations of a step on these inputs, forward and backward, for the MFU.

    Operations repeated to save memory count once: MFU measures the model's work, not the
    machine's. Padding counts, because the machine does not skip it. Class and register tokens of
    an image tower do not count.
    """
    total = 0
    if "visual_embeds" in inputs:
        rows, tokens = inputs["visual_embeds"].shape[:2]
    else:
        # The collator's uint8 frames have the shape of the pixel values computed from them.
        clips = inputs["frames"] if "frames" in inputs else inputs["pixel_values_videos"]
        rows, frames, _, height, width = clips.shape
        vision = model.x_encoder.backbone.config
        grid = height // patch_edge(vision), width // patch_edge(vision)
        patches = math.prod(grid)
        if model.x_encoder.is_convolutional:
            total += convolution_flops(model.x_encoder, rows * frames, height, width)
        elif model.x_encoder.is_video:
            if frames > 1 or not model.x_encoder.has_image_stem:
                frames = -(-frames // vision.tubelet_size)
            total += step_flops(model.x_encoder, rows, frames * patches, vision.hidden_size)
        else:
            total += step_flops(model.x_encoder, rows * frames, patches, vision.hidden_size)
        # The Predictor reads pooled tokens.
        tokens = frames * math.prod(-(-edge // model.x_encoder.pooling) for edge in grid)

    if "visual_index" in inputs:  # several queries share a clip
        rows = len(inputs["visual_index"])
    queries = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    llama = model.predictor.backbone.config
    width = llama.num_attention_heads * llama.head_dim
    # A token model reads the target after the query.
    length = tokens + queries + (inputs["labels"].shape[1] if "labels" in inputs else 0)
    # The gradient passes through frozen Predictor layers as well, to the visual projection.
    total += step_flops(model.predictor, rows, length, width, through=True)
    if "labels" in inputs:  # its output layer skips all visual tokens but the last
        head = model.predictor.backbone.get_output_embeddings().weight.numel()
        total -= 3 * 2 * rows * (tokens - 1) * head

    if "target_input_ids" in inputs:
        texts, length = inputs["target_input_ids"].shape
        text = model.y_encoder.backbone.config
        total += step_flops(model.y_encoder, texts, length, text.hidden_size)
    return round(total)


class SpeedMeter(TrainerCallback):
    """Training speed between log lines.

    Args:
        peak_flops (`float`, *optional*): operations per second that one device can reach; without
            it, `mfu` is not measured.
    """

    def __init__(self, peak_flops: float | None = None):
        self.peak_flops = peak_flops

    def on_train_begin(
        self, args: VLJEPATrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        # From `state`, not from 0: a resumed run did not make the checkpoint's steps.
        self.step, self.flops, self.time = state.global_step, state.total_flos, time.monotonic()

    def read(self, args: VLJEPATrainingArguments, state: TrainerState) -> dict[str, float]:
        """Return the speed since the last call, and the peak memory of this process.

        Returns: `samples_per_second` of all processes together, `tflops` (10^12 operations per
            second) and `mfu` (their share of `peak_flops`) of one device, `peak_memory_gib`.
        """
        now = time.monotonic()
        seconds = now - self.time
        rows = (state.global_step - self.step) * args.global_batch_size
        flops = (state.total_flos - self.flops) / seconds / args.world_size
        self.step, self.flops, self.time = state.global_step, state.total_flos, now
        speed = {
            "samples_per_second": rows / seconds,
            "tflops": flops / 1e12,
            "peak_memory_gib": peak_memory(args.device) / 2**30,
        }
        return speed if self.peak_flops is None else speed | {"mfu": flops / self.peak_flops}


__all__ = ["SpeedMeter", "peak_memory", "reachable_flops", "training_flops"]
