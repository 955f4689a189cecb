"""The app in a browser: `python -m space.app --model MODEL --library FOLDER_OF_CLIPS`.

One model, a folder or a Hub id, serves every tab. A tab is one file; `build` adds it to the app.
"""

import argparse
import os
from pathlib import Path
from tempfile import mkdtemp

import gradio as gr
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils.peft_utils import find_adapter_config_file

from .ask import EXAMPLES, ask_tab
from .search import Library, search_tab
from .uploads import MAX_MEGABYTES
from .watch import Watcher, read_captions
from .watch_tab import watch_tab

STYLE = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("script.html")


def load(name: str) -> tuple[PreTrainedModel, PreTrainedModel | None, ProcessorMixin]:
    """Return a `VLJEPAModel`, the same model with its Y-Decoder if it has one, and the processor.

    An adapter is loaded onto its base model, without a Y-Decoder.
    """
    options = {"trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(name, **options)
    is_adapter = find_adapter_config_file(name) is not None
    if is_adapter or AutoConfig.from_pretrained(name, **options).decoder_config is None:
        return AutoModel.from_pretrained(name, **options).eval(), None, processor
    writer = AutoModelForImageTextToText.from_pretrained(name, **options).eval()
    return writer.vljepa, writer, processor


def build(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    library: Library,
    *,
    writer: PreTrainedModel | None = None,
    captions: tuple[str, ...] = (),
) -> gr.Blocks:
    """Return the app, with one tab per use of the model. It reports its use to nobody."""
    # Unless they are static, gradio copies examples to the uploads and deletes them after an hour.
    gr.set_static_paths([EXAMPLES])
    with gr.Blocks(title="VL-JEPA", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(
            "# VL-JEPA\nThe model predicts the embedding of an answer and ranks texts by their "
            "similarity to it.",
            elem_id="title",
        )
        with gr.Tab("Ask", id="ask"):
            ask_tab(model, processor)
        with gr.Tab("Search", id="search"):
            search_tab(model, processor, library)
        with gr.Tab("Watch", id="watch"):
            watch_tab(Watcher(model, processor, writer, captions), library)
    return app


def serve(app: gr.Blocks, library: Library, **options: object) -> tuple:
    """Start the app on loopback, or on `GRADIO_SERVER_NAME`; `options` are those of `launch`.

    The files that it serves are uploads, the library and the examples.
    """
    fonts = ["system-ui", "sans-serif"]  # a named web font would be downloaded
    return app.queue(max_size=32).launch(
        allowed_paths=[str(library.folder), str(EXAMPLES)],
        max_file_size=MAX_MEGABYTES * 10**6,
        theme=gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"]).set(
            # The theme's own greys and violets are too light to read: 2.5 to 1 and 3.9 to 1.
            body_text_color_subdued="*neutral_600",
            body_text_color_subdued_dark="*neutral_300",
            block_label_text_color="*primary_700",
            block_title_text_color="*primary_700",
        ),
        css_paths=STYLE,
        head_paths=SCRIPT,
        footer_links=[],
        share=False,
        ssr_mode=False,
        **options,
    )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command's arguments; the environment variable VLJEPA_MODEL may name the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        default=os.environ.get("VLJEPA_MODEL"),
        help="folder or Hub id; default: the environment variable VLJEPA_MODEL",
    )
    parser.add_argument(
        "--library", type=Path, default=EXAMPLES, help="folder of clips; default: the examples"
    )
    parser.add_argument("--limit", type=int, help="embed only the first files of the library")
    parser.add_argument(
        "--captions", type=Path, help="JSONL file whose targets are the texts for segments"
    )
    parser.add_argument("--port", type=int, help="default: the first free port from 7860 on")
    args = parser.parse_args(arguments)
    if not args.model:
        parser.error("--model is missing: give a folder or Hub id, or set VLJEPA_MODEL")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit is {args.limit}; give 1 or more")
    return args


def main() -> None:
    args = parse_args()
    # A folder of its own: two apps with one folder would delete each other's uploads.
    os.environ.setdefault("GRADIO_TEMP_DIR", mkdtemp(prefix="vljepa-space-"))
    captions = () if args.captions is None else read_captions(args.captions)
    model, writer, processor = load(args.model)
    (writer or model).to("cuda" if torch.cuda.is_available() else "cpu")
    library = Library.from_folder(model, processor, args.library, args.limit)
    app = build(model, processor, library, writer=writer, captions=captions)
    serve(app, library, server_port=args.port)


if __name__ == "__main__":
    main()
