"""Write a small language model with random weights, and a tokenizer trained on rows.

    python -m experiments.small_language_model --output runs/lm --rows a.jsonl b.jsonl --layers 6

A VL-JEPA and its token baseline that start from it have the same family, width and token table: the
Predictor takes a part of its layers (`init_checkpoint --layers`), the baseline takes all of them
(`model.language_model`). No language model of this size is pretrained, so nothing else differs
between the two.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval.evaluate import at_least_one
from processing import read_rows
from processing.output import OutputError, check_output_folder, writing
from training.model.recipe_model import train_tokenizer

HEAD = 32  # width of an attention head


def texts_of(paths: list[str]) -> list[str]:
    """Return the distinct queries and targets of JSONL files, sorted."""
    texts = set()
    for path in paths:
        rows, _ = read_rows(path)
        texts |= {row[name] for row in rows for name in ("query", "target")}
    return sorted(texts - {""})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.small_language_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", required=True, type=Path, help="folder to write")
    add("--rows", required=True, nargs="+", help="JSONL files whose texts train the tokenizer")
    add("--vocab-size", type=at_least_one, default=1000)
    add("--layers", type=at_least_one, default=6)
    add("--width", type=at_least_one, default=128, help=f"{HEAD} for each attention head")
    # That of training/recipes/babyai_pretrain.yaml: with 0.02, training stalls at this width.
    add("--initializer-range", type=float, default=0.08)
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.width % HEAD:
        parser.error(f"--width {args.width}: give a multiple of {HEAD}, the width of a head")
    check_output_folder("--output", args.output)
    tokenizer = train_tokenizer(texts_of(args.rows), args.vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // HEAD,
        num_key_value_heads=args.width // HEAD,
        head_dim=HEAD,
        initializer_range=args.initializer_range,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config)
    with writing(args.output):
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    print(f"{args.output}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    try:
        main()
    except (OutputError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
