"""Change a new model, for ablations of its calibration: `python -m experiments.variants INIT ...`.

    python -m experiments.variants runs/calibrated --output runs/folded --fold
    python -m experiments.variants runs/calibrated --output runs/larger --token-scale 4
    python -m experiments.variants runs/init --output runs/warmer --temperature 0.2
    python -m experiments.variants runs/init --output runs/random --new-text-encoder 0

`--fold` folds the standardisation of the visual tokens into the projection, which then trains.
`--token-scale` multiplies the standardised tokens by a fixed number. `--temperature` is that of the
loss at step 0. `--new-text-encoder` gives the Y-Encoder random weights of this seed.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

from eval.models import TokenModelError, check_vljepa
from modeling_vljepa import VLJEPAModel
from processing import VLJEPAProcessor
from processing.output import OutputError, check_output_folder, writing
from training.arguments import RecipeError
from training.model.checkpoint_files import load


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="folder of a model")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--fold", action="store_true", help="fold the standardisation")
    parser.add_argument("--token-scale", type=float, help="factor on the standardised tokens")
    parser.add_argument("--temperature", type=float, help="of the loss at step 0")
    parser.add_argument("--new-text-encoder", type=int, metavar="SEED", help="random weights")
    args = parser.parse_args(argv)
    check_output_folder("--output", args.output)
    config = load(AutoConfig, "source", args.source)
    check_vljepa("source", args.source, config, "variants change a VL-JEPA")
    model = load(VLJEPAModel, "source", args.source)
    if (args.fold or args.token_scale is not None) and not model.config.standardize_visual_tokens:
        parser.error(
            f"{args.source} does not standardise its visual tokens, which --fold and --token-scale "
            "change. Make it with training.init_checkpoint --calibrate."
        )
    if args.token_scale is not None:
        model.predictor.visual_standardization.scale.mul_(args.token_scale)
    if args.fold:
        model.predictor.fold_standardization()
        model.config.standardize_visual_tokens = False
    if args.temperature is not None:
        with torch.no_grad():
            model.logit_scale.weight.fill_(math.log(1 / args.temperature))
    if args.new_text_encoder is not None:
        torch.manual_seed(args.new_text_encoder)
        new = AutoModel.from_config(model.config.text_config).state_dict()
        backbone = model.y_encoder.backbone  # it lacks a pooler, which the new one may have
        backbone.load_state_dict({name: new[name] for name in backbone.state_dict()})
        model.config.backbones.pop("text", None)
    with writing(args.output):
        model.save_pretrained(args.output)
        VLJEPAProcessor.from_pretrained(args.source).save_pretrained(args.output)


if __name__ == "__main__":
    try:
        main()
    except (OutputError, RecipeError, TokenModelError) as error:
        sys.exit(f"error: {error}")
