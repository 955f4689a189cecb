"""Build a VL-JEPA from pretrained backbones, ready for training.

    python -m training.init_checkpoint --output runs/init \\
        --vision facebook/vjepa2-vitl-fpc64-256 \\
        --predictor meta-llama/Llama-3.2-1B --layers 8 \\
        --text google/embeddinggemma-300m

These are the parts of the paper's model (arXiv 2512.10942, section 3.1). Each may be a Hub id or a
folder, `--vision` also a published `.pt` file of V-JEPA 2.1 or the Perception Encoder, and `--text`
one of the Perception Encoder. The projections between the parts and the temperature are new.

`--calibrate ROWS` measures the visual tokens of a few hundred clips and fits them to the language
model's token table by two fixed vectors (`training/model/calibration.py`). The tokens depend on the
frames, so give the `--num-frames`, `--image-size` and `--visual-token-pooling` of the training.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from eval.evaluate import at_least_one
from modeling_vljepa import VLJEPAConfig, VLJEPAModel
from processing import VLJEPAProcessor
from processing.output import OutputError, check_output_folder, writing
from training.arguments import RecipeError
from training.model.backbones import (
    PredictorBackbone,
    TextBackbone,
    VisionBackbone,
    read_predictor,
    read_text,
    read_vision,
)
from training.model.calibration import calibrate_on
from training.model.checkpoint_files import Weights
from training.model.parameters import paper_table

# Weights that no backbone has; `VLJEPAPreTrainedModel` initialises them.
NEW = (
    "predictor.visual_standardization.",
    "predictor.visual_projection.",
    "predictor_head.",
    "y_head.",
    "logit_scale.",
)
NEW_LAYERS = ("predictor.backbone.layers.", "predictor.backbone.norm.")


def join_weights(
    vision: VisionBackbone, predictor: PredictorBackbone, text: TextBackbone
) -> Weights:
    """Return the weights of all parts under their names in the joint model."""
    parts = {"x_encoder": vision, "predictor": predictor, "y_encoder": text}
    return {f"{module}.{k}": v for module, part in parts.items() for k, v in part.weights.items()}


def join(
    vision: VisionBackbone,
    predictor: PredictorBackbone,
    text: TextBackbone,
    *,
    embedding_dim: int | None = None,
    project_target: bool = True,
    standardize: bool = False,
    new_layers: bool = False,
    visual_token_pooling: int = 1,
    concatenate_class_token: bool = False,
    seed: int = 0,
) -> VLJEPAModel:
    """Build one model from three pretrained parts.

    Its dtype is the widest of the parts' dtypes, so no weight is rounded. Weights that the model
    does not use (a pooler, the decoder of an encoder-decoder) are left out.

    Args:
        embedding_dim: width of the shared space; default: that of `VLJEPAConfig`, or the
            Y-Encoder's own without `project_target`.
        project_target: add a projection from the Y-Encoder to the shared space.
        standardize: add a standardisation of the visual tokens, to be calibrated.
        new_layers: initialise the Predictor's layers at random; its token table is pretrained.
        visual_token_pooling: see `VLJEPAConfig`.
        concatenate_class_token: see `VLJEPAConfig`.
        seed: seed of the new weights.

    Raises:
        RecipeError: a part lacks a weight, or the shared space cannot have this width.
    """
    settings = {} if embedding_dim is None else {"embedding_dim": embedding_dim}
    if not project_target and embedding_dim is None:
        widths = [text.config.hidden_size, *(layer["out_features"] for layer in text.dense)]
        settings["embedding_dim"] = widths[-1]
    config = VLJEPAConfig(
        backbones={"vision": vision.name, "predictor": predictor.name, "text": text.name},
        vision_config=vision.config,
        predictor_config=predictor.config,
        text_config=text.config,
        text_pooling=text.pooling,
        text_dense=text.dense,
        project_target=project_target,
        standardize_visual_tokens=standardize,
        visual_token_pooling=visual_token_pooling,
        concatenate_class_token=concatenate_class_token,
        **settings,
    )
    # A model without memory lists the weights it needs: `from_pretrained` below would initialise a
    # missing one at random and only warn.
    try:
        with torch.device("meta"):
            expected = VLJEPAModel(config).state_dict()
    except ValueError as error:
        raise RecipeError(str(error)) from error
    new = (*NEW, *NEW_LAYERS) if new_layers else NEW
    weights = join_weights(vision, predictor, text).items()
    weights = {k: v for k, v in weights if k in expected and not k.startswith(new)}
    for name, parameter in expected.items():
        if name.startswith(new):
            continue
        if name not in weights:
            raise RecipeError(
                f"the checkpoint given for {name.split('.')[0]} lacks {name}; give a complete one."
            )
        if weights[name].shape != parameter.shape:
            raise RecipeError(
                f"{name} has shape {tuple(weights[name].shape)}, but the configuration of its "
                f"checkpoint gives {tuple(parameter.shape)}; correct config.json."
            )
    dtype = functools.reduce(torch.promote_types, {w.dtype for w in weights.values()})
    torch.manual_seed(seed)
    return VLJEPAModel.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="training.init_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--vision", required=True, help="X-Encoder: V-JEPA 2 or 2.1, or an image tower")
    add("--predictor", required=True, help="language model, or its GGUF file")
    add("--layers", default="8", help="8: the last eight; 0-8: the first eight; 0: none")
    add("--new-layers", action="store_true", help="random layers; the token table is pretrained")
    add("--text", required=True, help="Y-Encoder: a sentence-transformers or transformers model")
    add("--output", required=True, type=Path, help="folder to write")
    add("--hierarchical", action="store_true", help="read all four levels of V-JEPA 2.1")
    add("--embedding-dim", type=int, help="width of the shared space; default: 1536, the paper's")
    add("--no-target-projection", action="store_true", help="use the Y-Encoder's own space")
    add("--without-dense", action="store_true", help="leave out the Y-Encoder's Dense layers")
    add("--pooling", help="pooling of the Y-Encoder: mean, cls or lasttoken; default: its own")
    add("--text-tokenizer", help="tokenizer of a Perception Encoder's text tower; default: CLIP's")
    add("--target-prompt", metavar="NAME", help="prompt of the Y-Encoder that precedes targets")
    add("--pad-token", help="padding token of a query tokenizer that has none")
    add("--num-frames", type=at_least_one, default=8, help="frames sampled from each video")
    add(
        "--image-size",
        type=at_least_one,
        help="shortest edge and crop in pixels; default: the X-Encoder's",
    )
    add(
        "--visual-token-pooling",
        type=at_least_one,
        default=1,
        help="edge of windows of averaged patches",
    )
    add(
        "--concatenate-class-token",
        action="store_true",
        help="append a frame's class token to each of its patch tokens",
    )
    add("--calibrate", metavar="ROWS", help="JSONL file of clips and texts to calibrate on")
    add("--calibrate-clips", type=int, default=256, help="number of its clips that are read")
    add("--seed", type=int, default=0, help="seed of the new weights")
    add("--max-shard-size", default="5GB", help="largest file of the saved weights")
    args = parser.parse_args(argv)

    # 1. Nothing is overwritten
    check_output_folder("--output", args.output)
    if args.output.exists() and any(args.output.iterdir()):
        raise RecipeError(f"--output: {args.output} is not empty; give a new folder.")

    # 2. The parts, without upstream's warnings: `join` checks for missing weights
    logging.set_verbosity_error()
    vision = read_vision("--vision", args.vision, hierarchical=args.hierarchical)
    predictor = read_predictor(args.predictor, args.layers, args.pad_token)
    text = read_text(
        "--text",
        args.text,
        with_dense=not args.without_dense,
        pooling=args.pooling,
        tokenizer=args.text_tokenizer,
    )

    # 3. The processor
    vision.video_processor.num_frames = args.num_frames
    if args.image_size is not None:
        vision.video_processor.size = {"shortest_edge": args.image_size}
        vision.video_processor.crop_size = {"height": args.image_size, "width": args.image_size}
    try:
        processor = VLJEPAProcessor(
            vision.video_processor,
            predictor.tokenizer,
            text.tokenizer,
            target_prompts=text.prompts,
            target_prompt_name=args.target_prompt or text.prompt_name,
        )
    except ValueError as error:
        raise RecipeError(f"--text: {error}") from error

    # 4. One model
    model = join(
        vision,
        predictor,
        text,
        embedding_dim=args.embedding_dim,
        project_target=not args.no_target_projection,
        standardize=args.calibrate is not None,
        new_layers=args.new_layers,
        visual_token_pooling=args.visual_token_pooling,
        concatenate_class_token=args.concatenate_class_token,
        seed=args.seed,
    )
    if args.calibrate is not None:
        print(calibrate_on(model, processor, args.calibrate, args.calibrate_clips, args.seed))
    print(paper_table(model))

    # 5. Save everything that a user loads
    with writing(args.output):
        model.save_pretrained(args.output, max_shard_size=args.max_shard_size)
        processor.save_pretrained(args.output)
    print(f"{args.output}: {model.dtype}, ready as model.checkpoint of a recipe")


if __name__ == "__main__":
    try:
        main()
    except (OutputError, RecipeError) as error:
        sys.exit(f"error: {error}")
