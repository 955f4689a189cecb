"""Export both towers of a trained model as programs that run without this package.

    python -m training.export --model runs/demo-seed0/sft --output exported
    python -m training.export --model runs/demo-seed0/sft --output exported --format onnx

`predict` takes `pixel_values_videos` `(B, T, C, H, W)`, `input_ids` and `attention_mask` `(B, L)`;
`encode_target` takes `target_input_ids` and `target_attention_mask` `(B, Ly)`. Both return unit
vectors `(B, D)`. Batch size and lengths are free; frames, height and width are the processor's.
"""

import argparse
import io
import sys
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim
from transformers import AutoModel, AutoProcessor

from modeling_vljepa import VLJEPAModel
from processing.output import OutputError, check_output_folder, writing
from training.arguments import RecipeError
from training.model.checkpoint_files import load

FREE = {0: Dim.AUTO, 1: Dim.AUTO}  # batch and length


class Predict(nn.Module):
    """`predict` as a module: an exported program has one entry point, `forward`."""

    def __init__(self, model: VLJEPAModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values_videos, input_ids, attention_mask):
        return self.model.predict(pixel_values_videos, input_ids, attention_mask)  # (B, D)


class EncodeTarget(nn.Module):
    """`encode_target` as a module."""

    def __init__(self, model: VLJEPAModel):
        super().__init__()
        self.model = model

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
    processor = load(AutoProcessor, "--model", args.model).video_processor
    programs = export(model, processor.num_frames, processor.crop_size["height"])
    paths = []
    for name, program in programs.items():
        paths.append(args.output / f"{name}.{'pt2' if args.format == 'torch' else 'onnx'}")
        with writing(paths[-1]):
            args.output.mkdir(parents=True, exist_ok=True)
            if args.format == "torch":
                # Through memory: on a full disk, torch's own file would end the process.
                torch.export.save(program, buffer := io.BytesIO())
                paths[-1].write_bytes(buffer.getbuffer())
            else:
                torch.onnx.export(program, dynamo=True, verbose=False).save(paths[-1])
        print(f"{paths[-1]}: {paths[-1].stat().st_size / 1e6:.1f} MB")
    return paths


if __name__ == "__main__":
    try:
        main()
    except (OutputError, RecipeError) as error:
        sys.exit(f"error: {error}")
