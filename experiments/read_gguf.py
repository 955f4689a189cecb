"""Write the language model of a GGUF file as safetensors: `python -m experiments.read_gguf FILE`.

    python -m experiments.read_gguf data/backbones/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
        --output runs/smollm2

`training.init_checkpoint --predictor` reads both, and the result is the same. transformers needs 40
seconds for a GGUF file of 135 M parameters, so a grid that makes many initial models reads it once.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from processing.output import OutputError, check_output_folder, writing
from training.arguments import RecipeError
from training.model.checkpoint_files import load, split_gguf


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.read_gguf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a .gguf file")
    parser.add_argument("--output", required=True, type=Path, help="folder to write, in fp32")
    args = parser.parse_args(argv)
    check_output_folder("--output", args.output)
    folder, options = split_gguf(args.source)
    if not options:
        parser.error(f"source: {args.source} is not a .gguf file")
    tokenizer = load(AutoTokenizer, "source", folder, **options)
    read = load(AutoModelForCausalLM, "source", folder, dtype=torch.float32, **options)
    del read.config.quantization_config  # with it, a model cannot be saved
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    with writing(args.output):
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    try:
        main()
    except (OutputError, RecipeError) as error:
        sys.exit(f"error: {error}")
