"""The Search tab: find clips of a library by a sentence. The library is embedded once, at start-up.

Shapes: F files of a library, D embedding size.
"""

from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .uploads import read, user_error

IMAGES = (".gif", ".png", ".jpg", ".jpeg")
PATTERNS = ("*.mp4", "*.webm", "*.mkv", "*.mov", "*.avi", *(f"*{ending}" for ending in IMAGES))
SHOWN = 6  # clips


@dataclass(frozen=True)
class Library:
    """A folder of clips and the model's prediction for each.

    Attributes:
        folder (`Path`): the folder; its files can be downloaded through the app.
        paths (`list[Path]`): F files of it.
        embeds (`torch.Tensor` of shape `(F, D)`): Ŝ_Y under the model's retrieval prompt, unit
            vectors.
    """

    folder: Path
    paths: list[Path]
    embeds: torch.Tensor

    @classmethod
    @torch.inference_mode()
    def from_folder(
        cls,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        folder: str | Path,
        limit: int | None = None,
    ) -> "Library":
        """Embed the clips and images of a folder, in the order of their names.

        An unusable file is reported and left out.
        Raises: `FileNotFoundError` for a folder without a usable file.
        """
        folder = Path(folder).resolve()
        found = sorted(path for pattern in PATTERNS for path in folder.glob(pattern))[:limit]
        paths, embeds, query = [], [], model.config.prompts["retrieval"]
        for path in tqdm(found, "embedding the library", disable=None):
            try:
                batch = read(processor, path, text=query).to(model.device)
            except gr.Error as error:
                print(f"left out of the library: {error.message}")
                continue
            paths.append(path)
            embeds.append(model.predict(**batch))  # (1, D)
        if not paths:
            raise FileNotFoundError(
                f"{folder} has no readable clip or image: give another folder as --library."
            )
        return cls(folder, paths, torch.cat(embeds))


@torch.inference_mode()
def search(
    model: PreTrainedModel, processor: ProcessorMixin, library: Library, sentence: str
) -> list[tuple[Path, float]]:
    """Return the clips nearest to a sentence, best first, with their similarities.

    Raises: `gr.Error` for an empty sentence.
    """
    if not (sentence or "").strip():
        raise user_error("Type a sentence that describes the clip.")
    wanted = processor(targets=sentence.strip()).to(model.device)
    similarities = (library.embeds @ model.encode_target(**wanted).T)[:, 0]  # (F,)
    best = similarities.float().topk(min(SHOWN, len(library.paths)))
    return [
        (library.paths[index], similarity)
        for index, similarity in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def contents(library: Library) -> str:
    """Return the numbers of videos and images of a library: `5 videos and 1 image`."""
    images = sum(path.suffix.lower() in IMAGES for path in library.paths)
    counts = {"video": len(library.paths) - images, "image": images}
    return " and ".join(
        f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items() if count
    )


def search_tab(model: PreTrainedModel, processor: ProcessorMixin, library: Library) -> None:
    """Build the tab: a sentence in, the nearest clips of the library out."""

    def find(sentence: str) -> list[tuple[str, str]]:
        return [
            (str(path), f"{rank} · {similarity:.3f} · {path.stem}")
            for rank, (path, similarity) in enumerate(
                search(model, processor, library, sentence), 1
            )
        ]

    sentence = gr.Textbox(
        label=f"Search {contents(library)}",
        placeholder="pick up the blue key",
        elem_id="sentence",
    )
    button = gr.Button("Search", variant="primary", elem_id="search")
    found = gr.Gallery(
        show_label=False, columns=3, height="auto", interactive=False, buttons=[], elem_id="found"
    )
    gr.HTML(
        '<p class="legend">On each result: its rank, its similarity and its file. Similarity is '
        "the cosine of the sentence and the prediction, from −1 to 1.</p>"
    )
    gr.on([button.click, sentence.submit], find, sentence, found, api_name="search")
