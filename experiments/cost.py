"""Measure the processor time of a query of an embedding and of a token model.

    python -m experiments.cost experiments/c1_embedding_or_tokens/grid.yaml \\
        --embedding pictures-embedding-77k --tokens pictures-tokens-77k \\
        --rows data/pictures/test_style_subgroups.jsonl

Both models start as in the grid: time depends on sizes and lengths, not on weights. One clip and
one query at a time, with one thread, in milliseconds; the median of the repeats. Generated texts
have the mean length of the rows' targets, which are the candidates, too. It appends a line to
`cost.jsonl` next to the grid.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging

from eval.embed import grey_frame
from eval.evaluate import at_least_one
from eval.models import TokenModelError
from experiments.grid import GridError, read_grid
from modeling_vljepa import VLJEPAForConditionalGeneration, VLJEPATokenModel
from processing import VLJEPAProcessor, read_rows
from training.arguments import Recipe, RecipeError
from training.decoder.model import with_decoder
from training.decoder.recipe import read_recipe as read_decoder_recipe
from training.loop.run_facts import device_name
from training.tokens.model import start_token_model

FILE = "cost.jsonl"


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median processor time of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(1000 * (time.process_time() - start))
    return round(statistics.median(times), 2)


def pixels_of(recipe: Recipe, processor: VLJEPAProcessor, rows: list[dict]) -> torch.Tensor:
    """Return a grey clip `(1, T, 3, h, w)` with the frames of the rows' kind of media."""
    frames = 1
    if "video" in rows[0]:
        frames = recipe.processor.num_frames or processor.video_processor.num_frames
    return grey_frame(processor).expand(-1, frames, -1, -1, -1)


@torch.inference_mode()
def cost_of_embedding(
    model: VLJEPAForConditionalGeneration,
    processor: VLJEPAProcessor,
    pixels: torch.Tensor,
    query: str,
    texts: list[str],
    repeats: int,
) -> dict[str, float]:
    """Return the times of a VL-JEPA with a Y-Decoder."""
    base = model.vljepa
    visual = base.encode_video(pixels)
    inputs = processor(text=[query])
    embeds = base.predict(visual_embeds=visual, **inputs)  # (1, D)
    targets = processor(targets=texts)  # of the candidates, once for all queries
    length, contexts = mean_length(processor, texts), processor(contexts=[""])
    return {
        "X-Encoder": milliseconds(lambda: base.encode_video(pixels), repeats),
        "Predictor": milliseconds(lambda: base.predict(visual_embeds=visual, **inputs), repeats),
        f"Y-Encoder, {len(texts)} candidates, once": milliseconds(
            lambda: base.encode_target(**targets), repeats
        ),
        f"Y-Decoder, {length} tokens": milliseconds(
            lambda: model.generate(
                predicted_embeds=embeds,
                min_new_tokens=length,
                max_new_tokens=length,
                **contexts,
            ),
            repeats,
        ),
    }


@torch.inference_mode()
def cost_of_tokens(
    model: VLJEPATokenModel,
    processor: VLJEPAProcessor,
    pixels: torch.Tensor,
    query: str,
    texts: list[str],
    repeats: int,
) -> dict[str, float]:
    """Return the times of a token model."""
    visual = model.encode_video(pixels)
    inputs = processor(text=[query])
    labels, length = processor.text_labels(texts), mean_length(processor, texts)
    return {
        "X-Encoder": milliseconds(lambda: model.encode_video(pixels), repeats),
        f"likelihood of {len(texts)} candidates": milliseconds(
            lambda: model.score_texts(labels, visual_embeds=visual, **inputs), repeats
        ),
        f"generation of {length} tokens": milliseconds(
            lambda: model.generate(
                visual_embeds=visual, min_new_tokens=length, max_new_tokens=length, **inputs
            ),
            repeats,
        ),
    }


def mean_length(processor: VLJEPAProcessor, texts: list[str]) -> int:
    """Return the mean number of tokens of texts, each with its end token."""
    labels = processor.text_labels(texts)
    return round((labels >= 0).sum().item() / len(texts))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("grid", type=Path)
    parser.add_argument("--embedding", required=True, metavar="SETTING", help="with a decoder")
    parser.add_argument("--tokens", required=True, metavar="SETTING")
    parser.add_argument("--rows", required=True, help="JSONL file of a classification")
    parser.add_argument("--repeats", type=at_least_one, default=20)
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    grid = read_grid(args.grid)
    for name in (args.embedding, args.tokens):
        grid.check_setting("--embedding and --tokens", name)
    rows, _ = read_rows(args.rows)
    texts, query = sorted({row["target"] for row in rows}), rows[0]["query"]

    run = grid.run(args.embedding, grid.seeds[0])
    recipe, decoder = run.write_recipe(), run.options.decoder
    if decoder is None:
        raise GridError(f"--embedding: {args.embedding} has no decoder.")
    override = [f"model.checkpoint={recipe.model.checkpoint}"]
    writer, processor = with_decoder(read_decoder_recipe(decoder, override).model, seed=0)
    pixels = pixels_of(recipe, processor, rows)
    costs = {
        "embedding": cost_of_embedding(writer.eval(), processor, pixels, query, texts, args.repeats)
    }

    run = grid.run(args.tokens, grid.seeds[0])
    if run.options.trainer != "token_baseline":
        raise GridError(f"--tokens: {args.tokens} trains no token model.")
    recipe = run.write_recipe()
    model, processor = start_token_model(recipe, [])
    costs["tokens"] = cost_of_tokens(model.eval(), processor, pixels, query, texts, args.repeats)

    line = {"rows": args.rows, "device": device_name(torch.device("cpu")), "milliseconds": costs}
    with (args.grid.parent / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line, indent=2))


if __name__ == "__main__":
    try:
        main()
    except (GridError, OSError, RecipeError, TokenModelError) as error:
        sys.exit(f"error: {error}")
