"""Calibration of a new model on clips and texts, for `init_checkpoint --calibrate`.

Towers that were trained apart do not fit at their joints: most of a frozen encoder's energy is
common to all its inputs, and its projected tokens are larger than those of the language model's
table. Calibration measures both sides and sets the joint between them.

| part of the model        | after calibration                                                   |
|--------------------------|---------------------------------------------------------------------|
| `visual_standardization` | each dimension of the visual tokens has mean 0, and all have one    |
|                          | variance: that with which the projected tokens have the table's     |
| `visual_projection`      | its bias is the mean of the table's rows; its new weights stay      |

The weights stay because Adam's steps do not depend on a weight's size: weights scaled to fit are
several times smaller, and each step would be a larger share of them.

No part of this is in the paper. docs/training.md has its measured effect.

Shapes: B batch, N visual tokens, Dx visual width, Dp width of the Predictor.
"""

import random
from dataclasses import dataclass

import torch
from tqdm import tqdm

from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from processing.rows import clip_key
from processing.video_io import MediaError
from training.arguments import RecipeError, SourceArguments
from training.data.collator import ContrastiveCollator, to_pixel_values
from training.data.dataset import read_frames, text_id
from training.data.sources import read_source

IDS = ("target_ids", "group_ids")  # of the loss outside the model
PAIRS = 32  # rows of the report's batch
CLIPS_PER_PASS = 8
LEAST_CLIPS = 2
SMALLEST = 1e-6  # variance, relative to the mean variance: a constant dimension is not blown up


def chosen_rows(path: str, count: int, seed: int) -> list[dict]:
    """Return `count` rows of a JSONL file at random, each about another clip.

    Raises:
        RecipeError: the file is missing, or has no usable row.
    """
    rows = read_source(SourceArguments(rows=path), "--calibrate").rows
    random.Random(seed).shuffle(rows)
    return list({clip_key(row): row for row in rows}.values())[:count]


class Moments:
    """Running mean and variance of each dimension, in double precision."""

    def __init__(self):
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, vectors: torch.Tensor) -> None:
        """Add vectors `(..., D)`."""
        vectors = vectors.double().flatten(0, -2)
        self.count += len(vectors)
        self.total = self.total + vectors.sum(0)
        self.squares = self.squares + vectors.square().sum(0)

    def mean(self) -> torch.Tensor:
        return self.total / self.count  # (D,)

    def variance(self) -> torch.Tensor:
        return (self.squares / self.count - self.mean().square()).clamp_min(0)  # (D,)


@dataclass
class Measured:
    """Facts of the clips and texts of a calibration.

    Attributes:
        moments: those of all visual tokens.
        batch: the report's batch, with `visual_embeds`.
        clips: number of clips read.
        broken: reason for each clip that was left out.
    """

    moments: Moments
    batch: dict[str, torch.Tensor]
    clips: int
    broken: list[str]


@torch.inference_mode()
def measure(model: VLJEPAModel, processor: VLJEPAProcessor, rows: list[dict]) -> Measured:
    """Encode the rows' clips, images and videos each in batches of their own.

    Raises:
        RecipeError: fewer than two clips can be read.
    """
    model.eval()
    moments, samples, broken, clips = Moments(), [], [], 0
    video = processor.video_processor
    with tqdm(total=len(rows), desc="calibrating", unit="clip") as progress:
        for kind in ("image", "video"):
            same = [row for row in rows if kind in row]
            for start in range(0, len(same), CLIPS_PER_PASS):
                read = {}
                for index, row in enumerate(same[start : start + CLIPS_PER_PASS], start=start):
                    try:
                        read[index] = read_frames(row, video)
                    except MediaError as error:
                        broken.append(str(error))
                    progress.update()
                if not read:
                    continue
                pixels = to_pixel_values(torch.stack(list(read.values())), video)
                tokens = model.encode_video(pixels.to(model.dtype))  # (B, N, Dx)
                moments.add(tokens)
                clips += len(read)
                # One kind only: the tokens of an image and of a video differ in number.
                if not samples or samples[0]["visual_embeds"].shape == tokens.shape[1:]:
                    samples += [
                        sample_of(same[index], each)
                        for index, each in zip(read, tokens, strict=True)
                    ]
    if clips < LEAST_CLIPS:
        raise RecipeError(
            f"--calibrate: {clips} clips can be read, and {LEAST_CLIPS} are needed. "
            f"{broken[0] if broken else 'Give a file with more rows.'}"
        )
    return Measured(moments, ContrastiveCollator(processor)(samples[:PAIRS]), clips, broken)


def sample_of(row: dict, tokens: torch.Tensor) -> dict:
    """Return a sample of the collator with visual tokens in place of frames."""
    return {
        "query": row["query"],
        "target": row["target"],
        "target_id": text_id(row["target"]),
        "group_id": 0,
        "negatives": [],
        "clip_id": clip_key(row),
        "visual_embeds": tokens,
    }


@torch.no_grad()
def calibrate(model: VLJEPAModel, measured: Measured) -> None:
    """Set the standardisation and the projection's bias of a model whose projection is new."""
    moments, table, projected = measured.moments, Moments(), Moments()
    standard, projection = model.predictor.visual_standardization, model.predictor.visual_projection
    variance = moments.variance()
    least = (SMALLEST * variance.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    standard.mean.copy_(moments.mean())
    standard.scale.copy_(variance.clamp_min(least).rsqrt())

    # Through the module: some language models scale their embeddings in it.
    embedding = model.get_input_embeddings()
    for ids in torch.arange(embedding.num_embeddings).split(4096):
        table.add(embedding(ids))
    tokens = standard(measured.batch["visual_embeds"].to(projection.weight.dtype))  # (B, N, Dx)
    projected.add(tokens @ projection.weight.T)  # (B, N, Dp)
    standard.scale.mul_((table.variance().mean() / projected.variance().mean()).sqrt())
    projection.bias.copy_(table.mean())


# -- report ----------------------------------------------------------------------------------


def root_mean_square(vectors: torch.Tensor) -> float:
    return vectors.double().square().mean().sqrt().item()


def spread(vectors: torch.Tensor) -> float:
    """Return the share of energy that vectors `(B, D)` do not have in common: 0 if all are equal,
    1 - 1 / B if they are orthogonal and of one length."""
    vectors = vectors.double()
    return (1 - vectors.mean(0).square().sum() / vectors.square().sum(1).mean()).item()


@torch.inference_mode()
def joints(model: VLJEPAModel, batch: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Return root mean square and spread at each joint of a model, and the loss of a batch.

    The spread of tokens is that of the rows' mean tokens. The loss has its chance level in the
    place of the spread.

    Args:
        batch: batch of a collator, with `visual_embeds`.
    """
    model.eval()
    inputs = {name: each for name, each in batch.items() if name not in IDS}
    standard = model.predictor.visual_standardization(batch["visual_embeds"])
    outputs = model(**inputs, return_loss=True, output_hidden_states=True)
    visual = batch["visual_embeds"].shape[1]
    joined = model.predictor.join(batch["visual_embeds"], batch["input_ids"])
    found = {
        "visual tokens": batch["visual_embeds"],
        "standardised": standard,
        "projected": joined[:, :visual],
        "query tokens": joined[:, visual:],
    }
    if states := outputs.hidden_states:  # empty without layers
        found["after the first layer"] = states[1][:, :visual]
        found["after the last layer"] = states[-1][:, :visual]
    table = {
        name: (root_mean_square(each), spread(each.mean(1)))
        for name, each in found.items()
        if each.shape[1]  # a query may have no token
    }
    table["prediction"] = (
        root_mean_square(outputs.predicted_embeds),
        spread(outputs.predicted_embeds),
    )
    table["target"] = root_mean_square(outputs.target_embeds), spread(outputs.target_embeds)
    chance = torch.tensor(float(len(outputs.predicted_embeds))).log().item()
    table["loss at step 0"] = outputs.loss.item(), chance
    return table


def report(
    before: dict[str, tuple[float, float]],
    after: dict[str, tuple[float, float]],
    measured: Measured,
) -> str:
    """Return the table of `joints` before and after calibration."""
    pairs, tokens = len(measured.batch["visual_embeds"]), measured.moments.count
    lines = [
        f"calibrated on {measured.clips} clips ({tokens:,} visual tokens); table on {pairs} rows",
        f"{'':<24}{'rms':>8}{'after':>9}{'spread':>9}{'after':>9}",
    ]
    for name, (rms, share) in before.items():
        note = "  (spread: its chance level)" if name.startswith("loss") else ""
        numbers = f"{rms:>8.3f}{after[name][0]:>9.3f}{share:>9.3f}{after[name][1]:>9.3f}"
        lines.append(f"{name:<24}{numbers}{note}")
    if measured.broken:
        lines.append(f"{len(measured.broken)} clips left out, the first: {measured.broken[0]}")
    return "\n".join(lines)


def calibrate_on(
    model: VLJEPAModel, processor: VLJEPAProcessor, path: str, count: int, seed: int
) -> str:
    """Calibrate a new model on `count` rows of a JSONL file; return the report.

    Raises:
        RecipeError: the file has no usable row, or fewer than two clips can be read.
    """
    measured = measure(model, processor, chosen_rows(path, count, seed))
    before = joints(model, measured.batch)
    calibrate(model, measured)
    return report(before, joints(model, measured.batch), measured)


__all__ = ["calibrate_on"]
