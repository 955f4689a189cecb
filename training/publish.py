"""Publish a trained VL-JEPA on the Hub and check that the published model equals the trained one.

    python -m training.publish --model runs/demo-seed0/sft --repo user/name --output to_read
    python -m training.publish --model runs/demo-seed0/sft --repo user/name --private

The first command sends nothing: it writes the repository's content into a folder to read.
`--space user/name` also creates a Gradio Space that shows the model.

The repository gets the weights (safetensors) or an adapter, the processor, the code that loads them
without this package, pipelines, a sentence-transformers module, an endpoint handler, the model card
with its results, and licences. Repeating the command publishes the same content. Repeating it after
an interruption continues the upload.
"""

import argparse
import sys

from eval.models import TokenModelError
from processing.output import OutputError
from training.arguments import RecipeError
from training.hub.publishing import publish


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="training.publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of a trained VL-JEPA or an adapter")
    parser.add_argument("--repo", required=True, help="user/name on the Hub")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument("--base-repo", help="for an adapter: the published model that it adapts")
    parser.add_argument("--space", help="user/name of a Space that shows the model")
    parser.add_argument("--answers", help="JSONL of questions whose answers become the VQA choices")
    parser.add_argument(
        "--example",
        metavar="ROWS",
        help="JSONL of test rows: the card shows six with the model's answers, and the clip of one "
        "(at most 1 MB) is published as it is, so the licence of the clips must permit that",
    )
    parser.add_argument(
        "--code-url",
        help="address of the repository with the training code; default: this clone's origin",
    )
    sending = parser.add_mutually_exclusive_group()
    sending.add_argument(
        "--dry-run", action="store_true", help="build, check and list the files, send nothing"
    )
    sending.add_argument(
        "--output", help="a new folder: write the repository's content there, send nothing"
    )
    args = parser.parse_args(argv)
    publish(
        args.model,
        args.repo,
        private=args.private or None,
        dry_run=args.dry_run,
        output=args.output,
        base_repo=args.base_repo,
        answers=args.answers,
        example=args.example,
        code_url=args.code_url,
        space=args.space,
    )


if __name__ == "__main__":
    try:
        main()
    except (OutputError, RecipeError, TokenModelError) as error:
        sys.exit(f"error: {error}")
