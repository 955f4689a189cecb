"""Export both towers of a trained model as programs that run without this package.

    python -m training.export --model runs/demo-seed0/sft --output exported
    python -m training.export --model runs/demo-seed0/sft --output exported --format onnx

`predict` takes `pixel_values_videos` `(B, T, C, H, W)`, `input_ids` and `attention_mask` `(B, L)`;
`encode_target` takes `target_input_ids` and `target_attention_mask` `(B, Ly)`. Both return unit
vectors `(B, D)`. Batch size and lengths are free, up to the processor's limits; frames, height and
width are the processor's. The folder holds the processor, too: its code, its tokenizers and its
settings. README.md has an example.
"""

import argparse
import copy
import io
import sys
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim
from transformers import AutoModel, AutoProcessor

from eval.models import TokenModelError, check_vljepa
from modeling_vljepa import VLJEPAModel
from processing.output import OutputError, check_output_folder, writing
from training.arguments import RecipeError
from training.model.checkpoint_files import load

MOST_DISTANCE = 0.05  # of a unit vector and the model's: rounding in bf16, and much less in fp32
FREE = {0: Dim.AUTO, 1: Dim.AUTO}  # batch and length


def only(model: VLJEPAModel, *names: str) -> VLJEPAModel:
    """Return the model with these of its modules; a program stores every weight of its module."""
    part = copy.copy(model)
    part._modules = {name: model.get_submodule(name) for name in names}
    return part


class Predict(nn.Module):
    """`predict` as a module: an exported program has one entry point, `forward`."""

    def __init__(self, model: VLJEPAModel):
        super().__init__()
        self.model = only(model, "x_encoder", "predictor", "predictor_head")

    def forward(self, pixel_values_videos, input_ids, attention_mask):
        return self.model.predict(pixel_values_videos, input_ids, attention_mask)  # (B, D)


class EncodeTarget(nn.Module):
    """`encode_target` as a module."""

    def __init__(self, model: VLJEPAModel):
        super().__init__()
        self.model = only(model, "y_encoder", "y_head")

    def forward(self, target_input_ids, target_attention_mask):
        return self.model.encode_target(target_input_ids, target_attention_mask)  # (B, D)


def example(model: VLJEPAModel, frames: int, side: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return inputs of both towers for tracing.

    Some rows are padded: with full masks, tracing would drop the code that handles padding.
    """
    ids = torch.ones(3, 7, dtype=torch.long)
    mask = (torch.arange(7) < torch.tensor([[7], [4], [2]])).long()
    pixels = torch.zeros(3, frames, 3, side, side, dtype=model.dtype)
    return {"predict": (pixels, ids, mask), "encode_target": (ids, mask)}


@torch.no_grad()
def export(model: VLJEPAModel, frames: int, side: int) -> dict[str, torch.export.ExportedProgram]:
    """Trace both towers; `frames` and `side` (pixels) are fixed, batch and lengths are free."""
    towers = {"predict": Predict(model), "encode_target": EncodeTarget(model)}
    free = {"predict": ({0: Dim.AUTO}, FREE, FREE), "encode_target": (FREE, FREE)}
    examples = example(model, frames, side)
    programs = {
        name: torch.export.export(tower, examples[name], dynamic_shapes=free[name])
        for name, tower in towers.items()
    }
    # Gemma builds its mask with a function; `torch.export.save` needs such a program decomposed.
    return {name: program.run_decompositions({}) for name, program in programs.items()}


@torch.no_grad()
def check_lengths(
    model: VLJEPAModel,
    programs: dict[str, torch.export.ExportedProgram],
    frames: int,
    side: int,
    longest: dict[str, int],
) -> None:
    """Check that the programs equal the model at the lengths that they promise.

    A backbone that reads sizes while it is traced gives a program for some of them only.

    Args:
        longest: the longest query of "predict" and the longest text of "encode_target", in tokens.

    Raises:
        RecipeError: a program refuses a length, or its embeddings are other ones.
    """
    vocabulary = min(model.config.predictor_config.vocab_size, model.config.text_config.vocab_size)
    for name, program in programs.items():
        run, of_model = program.module(), getattr(model, name)
        shortest = 0 if name == "predict" else 1  # a query may have no token
        for rows, length in ((1, shortest), (2, 2), (1, longest[name])):
            ids = torch.arange(rows * length).view(rows, length)
            ids = (ids + vocabulary // 2) % vocabulary  # the first ids are special tokens
            pixels = torch.ones(rows, frames, 3, side, side, dtype=model.dtype)
            given = (*([pixels] if name == "predict" else []), ids, torch.ones_like(ids))
            what = f"--model: {name} of {rows} rows of {length} tokens"
            other = "Use other versions of torch and transformers."
            try:
                distance = (run(*given) - of_model(*given)).norm(dim=1).max().item()
            except AssertionError as error:  # a guard of the program
                raise RecipeError(f"{what} is refused by the program: {error}. {other}") from error
            if not distance < MOST_DISTANCE:
                raise RecipeError(f"{what} is {distance:.4f} away from the model's. {other}")


def main(argv: list[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(
        prog="training.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a VL-JEPA")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--format", choices=("torch", "onnx"), default="torch")
    args = parser.parse_args(argv)

    check_output_folder("--output", args.output)
    model = load(AutoModel, "--model", args.model).eval()
    check_vljepa("--model", args.model, model.config, "the two towers are a VL-JEPA's")
    model.fold_standardization()
    processor = load(AutoProcessor, "--model", args.model)
    frames = processor.video_processor.num_frames
    side = processor.video_processor.crop_size["height"]
    programs = export(model, frames, side)
    limit = model.y_encoder.limit or processor.max_target_length
    longest = {
        "predict": processor.max_query_length,
        "encode_target": min(processor.max_target_length, limit),
    }
    check_lengths(model, programs, frames, side, longest)
    with writing(args.output):
        processor.save_pretrained(args.output)
    paths = []
    for name, program in programs.items():
        paths.append(args.output / f"{name}.{'pt2' if args.format == 'torch' else 'onnx'}")
        with writing(paths[-1]):
            if args.format == "torch":
                # Through memory: on a full disk, torch's own file would end the process.
                torch.export.save(program, buffer := io.BytesIO())
                paths[-1].write_bytes(buffer.getbuffer())
            else:
                torch.onnx.export(program, dynamo=True, verbose=False).save(paths[-1])
        size = paths[-1].stat().st_size / 1e6
        print(f"{paths[-1]}: {size:.1f} MB, up to {longest[name]} tokens")
    return paths


if __name__ == "__main__":
    try:
        main()
    except (OutputError, RecipeError, TokenModelError) as error:
        sys.exit(f"error: {error}")
