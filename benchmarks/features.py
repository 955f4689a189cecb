"""Compare a step from the feature store with a live step: `python -m benchmarks.features`.

Random weights, clips of eight frames of 256 pixels, queries and targets of 32 tokens. A live step
begins with uint8 frames in memory, so neither step decodes video; a step from the store begins with
reading its features from disk. The two alternate, and the minimum of CPU-seconds counts.
Operations are counted as in `training/loop/speed.py`. Their ratio is the gain on a machine on which
every operation is equally fast and reading is free.

With `--pooling 2`, the store holds pooled tokens (`visual_token_pooling: 2`); the live step pools
none.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.configs import mid_config, small_config
from benchmarks.measure import Cost, cost, cpu_seconds, in_own_process
from modeling_vljepa import VLJEPAConfig, VLJEPAModel
from processing import VLJEPAProcessor
from processing.feature_store import FeatureStore, made_with
from training.arguments import ProcessorArguments, use_bf16
from training.data.collator import to_pixel_values
from training.data.feature_writer import (
    Encoder,
    as_written,
    begin,
    clip_bytes,
    cut_into_shards,
    distinct_clips,
    make_plan,
    write_index,
    write_shards,
)
from training.loop.grad_cache import cached_step
from training.loop.objective import Embeds, Ids, Objective
from training.loop.speed import forward_flops, training_flops
from training.memory import ADAPTED, FULL, Setting, model_to_train, training_step
from training.model.recipe_model import new_processor, train_tokenizer

CONFIGS = {"mid": mid_config, "paper": VLJEPAConfig, "small": partial(small_config, 256)}
SETTINGS = {"LoRA": Setting("LoRA", ADAPTED, {"r": 16}), "full": Setting("full", FULL)}
KINDS = ("predict", "step", "GradCache")  # forward only; a training step; a step in two parts
DTYPES = ("bfloat16", "int8")
LENGTH = 32
PATCHES = 256  # of a tubelet of two frames


class Clips(torch.utils.data.Dataset):
    """Frames of noise, and rows that name files which exist."""

    def __init__(self, folder: Path, number: int, frames: int):
        self.rows = []
        for index in range(number):
            (folder / f"{index}.mp4").touch()
            self.rows.append({"video": str(folder / f"{index}.mp4")})
        generator = torch.Generator().manual_seed(0)
        shape = (number, frames, 3, 256, 256)
        self.frames = torch.randint(256, shape, dtype=torch.uint8, generator=generator)

    def __getitem__(self, index: int) -> dict:
        return {"frames": self.frames[index]}


def processor_of(frames: int) -> VLJEPAProcessor:
    return new_processor(train_tokenizer(["a"], 300), ProcessorArguments(num_frames=frames), None)


def write_store(
    folder: Path, clips: Clips, model: VLJEPAModel, processor: VLJEPAProcessor, bf16: bool
) -> FeatureStore:
    video = processor.video_processor
    encoder = Encoder(model, video, bf16)
    distinct = distinct_clips(clips.rows)
    shape = tuple(encoder([clips[0]]).shape[1:])
    facts = made_with(model, video, video.num_frames)
    plan = make_plan(clips.rows, distinct, facts, "bfloat16", 1, bf16)
    begin(folder, plan)
    shards = cut_into_shards(distinct, {"video": shape}, "bfloat16")
    list(write_shards(folder, shards, clips, encoder, dtype="bfloat16", batch_size=1))
    write_index(folder, plan, shards)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return FeatureStore.open(folder, model, video, dtype=dtype)


def texts(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(3, 300, (size, LENGTH), generator=generator)
        for name in ("input_ids", "target_input_ids")
    }


def loss_of(embeds: Embeds) -> torch.Tensor:
    rows = torch.arange(len(embeds.predicted_embeds))
    return Objective()(embeds, Ids(target_index=rows, target_ids=rows, group_ids=rows))[0]


def run(
    kind: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    bf16: bool,
) -> None:
    """Run one step of a kind: forward, or forward, backward and AdamW."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    if kind == "predict":
        batch = {name: value for name, value in batch.items() if name != "target_input_ids"}
        with torch.inference_mode(), autocast:
            model.predict(**batch)
        return
    if kind == "step":
        training_step(model, batch, bf16)
    else:
        with autocast:
            cached_step(model, batch, len(batch["input_ids"]) // 2, loss_of)
    optimizer.step()
    optimizer.zero_grad()


def gain_in_operations(
    kind: str, model: VLJEPAModel, live: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]
) -> float:
    """Return the ratio of operations, live / from the store."""
    rows, frames = live["pixel_values_videos"].shape[:2]
    llama, text = model.predictor.backbone.config, model.y_encoder.backbone.config
    width = llama.num_attention_heads * llama.head_dim

    def operations(batch: dict[str, torch.Tensor]) -> float:
        tokens = batch["visual_embeds"].shape[1]
        predictor = forward_flops(model.predictor, rows, tokens + LENGTH, width)
        if kind == "predict":
            return predictor
        step = training_flops(model, batch)
        if kind == "step":
            return step
        return step + predictor + forward_flops(model.y_encoder, rows, LENGTH, text.hidden_size)

    # A frozen X-Encoder runs once, also with GradCache. The live step pools no tokens.
    unpooled = stored | {"visual_embeds": torch.empty(rows, -(-frames // 2) * PATCHES, 0)}
    vision = training_flops(model, live) - training_flops(model, unpooled)
    return (vision + operations(unpooled)) / operations(stored)


def count(config: str, trains: str, frames: int, pooling: int) -> str:
    """Return a line: size of a clip, and the ratio of operations per kind of step. Runs nothing."""
    with torch.device("meta"):
        model = model_to_train(CONFIGS[config](), SETTINGS[trains], bf16=False)
        shape = (-(-frames // 2) * PATCHES // pooling**2, model.config.vision_config.hidden_size)
        live = {"pixel_values_videos": torch.empty(1, frames, 3, 256, 256)}
        stored = {"visual_embeds": torch.empty(1, *shape)}
        ids = {name: torch.empty(1, LENGTH) for name in ("input_ids", "target_input_ids")}
    sizes = ", ".join(f"{clip_bytes(shape, dtype) / 1e6:.2f} MB in {dtype}" for dtype in DTYPES)
    gains = [
        f"{kind} {gain_in_operations(kind, model, live | ids, stored | ids):.2f}" for kind in KINDS
    ]
    return f"{frames:>3} frames: {shape[0]:>4} tokens of {shape[1]}, {sizes}; {', '.join(gains)}"


def compare(
    config: str,
    trains: str,
    kinds: list[str],
    rows: int,
    frames: int,
    rounds: int,
    bf16: bool,
    pooling: int,
) -> dict[str, tuple[float, ...]]:
    """Measure every kind of step, and the reading of a clip.

    Args:
        pooling: `visual_token_pooling` of the store.

    Returns: for each kind, CPU-seconds live, CPU-seconds from the store, and the ratio of
        operations; for `"read"`, CPU-milliseconds and megabytes per clip, and the relative error
        of int8.
    """
    torch.manual_seed(0)
    model = model_to_train(CONFIGS[config](), SETTINGS[trains], bf16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)  # as the Trainer's default is
    processor = processor_of(frames)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        clips = Clips(Path(folder), rows, frames)
        model.config.visual_token_pooling = model.x_encoder.pooling = pooling
        store = write_store(Path(folder, "store"), clips, model, processor, bf16)
        model.x_encoder.pooling = 1
        model.train()

        def live() -> dict[str, torch.Tensor]:
            return {
                "pixel_values_videos": to_pixel_values(clips.frames, processor.video_processor),
                **texts(rows),
            }

        def stored() -> dict[str, torch.Tensor]:
            tokens = [store[row] for row in clips.rows]
            return {"visual_embeds": torch.stack(tokens), **texts(rows)}

        def least(call: Callable[[], object], times: int) -> float:
            return min(cost(call).cpu_seconds for _ in range(times))

        for kind in kinds:
            seconds = {live: [], stored: []}
            for batch in [live, stored] * rounds:
                since = cpu_seconds()
                run(kind, model, optimizer, batch(), bf16)
                seconds[batch].append(cpu_seconds() - since)
            gain = gain_in_operations(kind, model, live(), stored())
            found[kind] = (min(seconds[live]), min(seconds[stored]), gain)
        tokens = stored()["visual_embeds"]
        found["read"] = (
            1000 * least(stored, 20) / rows,
            clip_bytes(tokens.shape[1:], "bfloat16") / 1e6,
            as_written(tokens, "int8")["errors"].mean().item(),
        )
    return found


def measure(*arguments: object) -> Cost:
    return cost(lambda: compare(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.features", description=__doc__)
    parser.add_argument("--config", choices=CONFIGS, default="mid")
    parser.add_argument("--trains", choices=SETTINGS, nargs="+", default=["LoRA", "full"])
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[8], help="several only with --count"
    )
    parser.add_argument("--pooling", type=int, choices=(1, 2, 4), default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--count", action="store_true", help="count operations only; runs nothing")
    args = parser.parse_args()
    if args.count:
        for trains in args.trains:
            print(
                f"{args.config} config, {trains}: size of a clip; operations live / from the store"
            )
            lines = [count(args.config, trains, frames, args.pooling) for frames in args.frames]
            print("\n".join(lines))
        return
    (frames,) = args.frames
    bf16 = use_bf16(args.precision, torch.device("cpu"))
    print(
        f"{args.config} config, {'bf16' if bf16 else 'fp32'}, {args.rows} clips of {frames} "
        f"frames, {args.threads} threads; CPU-seconds"
    )
    print(f"{'':<18}{'live':>8}{'store':>8}{'ratio':>8}{'in operations':>15}")
    for trains in args.trains:
        found = in_own_process(
            measure,
            args.config,
            trains,
            args.kinds,
            args.rows,
            frames,
            args.rounds,
            bf16,
            args.pooling,
            threads=args.threads,
        )
        read = found.value.pop("read")
        for kind, (live, stored, gain) in found.value.items():
            print(
                f"{trains + ', ' + kind:<18}{live:>8.2f}{stored:>8.2f}{live / stored:>8.2f}"
                f"{gain:>15.2f}",
                flush=True,
            )
    print(f"reading a clip: {read[0]:.2f} ms of CPU for {read[1]:.2f} MB")
    print(f"relative error in int8: {read[2]:.2e}")


if __name__ == "__main__":
    main()
