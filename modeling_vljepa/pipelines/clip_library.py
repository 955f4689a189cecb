"""A library of embedded clips on disk, to be searched by text.

`VLJEPARetrievalPipeline.build_library` writes one.
"""

import json
import os
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import is_datasets_available

from .library_writer import (
    KEPT,
    as_arrow,
    columns_of,
    complete,
    incomplete_folder,
    only_writer,
    same_model,
    writing,
)

if is_datasets_available():
    from datasets import Dataset, load_from_disk

TEXTS_AT_ONCE = 256  # their cosines with a million clips take a gigabyte


def check_datasets() -> None:
    """Raise `ImportError` if the `datasets` package is missing."""
    if not is_datasets_available():
        raise ImportError("a library needs datasets: pip install datasets")


def unreadable_report(unreadable: list[dict], total: int) -> str:
    """Return a report that names up to 20 of the clips that could not be read."""
    shown = "".join(f"\n  {each['reason']}" for each in unreadable[:20])
    more = f"\n  ... and {len(unreadable) - 20} more" if len(unreadable) > 20 else ""
    return f"{len(unreadable)} of {total} clips cannot be read:{shown}{more}"


@dataclass(frozen=True)
class ClipLibrary:
    """Embedded clips.

    Attributes:
        dataset (`datasets.Dataset`): columns `video`, a path, and `embedding`, a unit vector.
        query (`str`): the query under which every clip was embedded.
        probe (`torch.Tensor` of shape `(2, D)`): `VLJEPARetrievalPipeline.probe` of the model.
        unreadable (`list[dict]`): `video` and `reason` of each clip that could not be read.
    """

    dataset: "Dataset"
    query: str
    probe: torch.Tensor
    unreadable: list[dict]

    @classmethod
    def from_embeddings(
        cls,
        videos: list[str],
        embeds: torch.Tensor,
        *,
        query: str,
        probe: torch.Tensor,
        unreadable: list[dict],
    ) -> "ClipLibrary":
        """Make a library of n clips from their paths and embeddings `(n, D)`.

        Raises: `ValueError` for embeddings that are not finite.
        """
        dataset = Dataset.from_dict(as_arrow(videos, embeds), features=columns_of(embeds.shape[1]))
        library = cls(dataset, query, probe, unreadable)
        library.check_numbers("library")
        return library

    def __repr__(self) -> str:
        files = self.dataset.cache_files
        return (
            f"ClipLibrary({len(self.dataset)} clips, {self.probe.shape[1]} dimensions, query "
            f"{textwrap.shorten(self.query, 60, placeholder=' …')!r}, "
            f"{Path(files[0]['filename']).parent if files else 'in memory'})"
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Write the library to a new folder, complete or not at all.

        Raises: `ValueError` for a folder that exists or cannot be written.
        """
        with only_writer(folder) as incomplete:
            self.write(incomplete, Path(folder))

    def write(self, incomplete: Path, folder: Path) -> None:
        """Write the library to `folder` by way of the `incomplete` folder of `only_writer`."""
        written = incomplete / "library"
        shutil.rmtree(written, ignore_errors=True)  # left by a killed process
        facts = {"query": self.query, "probe": self.probe.tolist(), "unreadable": self.unreadable}
        try:
            with writing(folder, KEPT):
                self.dataset.save_to_disk(written)
                (written / "library.json").write_text(json.dumps(facts, indent=2))
                complete(incomplete, folder)
        except BaseException:
            shutil.rmtree(written, ignore_errors=True)
            raise

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "ClipLibrary":
        check_datasets()
        path = Path(folder) / "library.json"
        if not path.is_file():
            raise ValueError(
                f"library: {folder} is incomplete. Call build_library again with the same clips, "
                "query and model: it continues."
                if incomplete_folder(Path(folder).absolute()).is_dir()
                else f"library: {folder} has no library.json. Give a folder that build_library "
                "wrote."
            )
        saved = json.loads(path.read_text())
        library = cls(
            dataset=load_from_disk(folder),
            query=saved["query"],
            probe=torch.tensor(saved["probe"]),
            unreadable=saved["unreadable"],
        )
        library.check_numbers(f"library {folder}")
        return library

    def check_numbers(self, name: str) -> None:
        """Raise `ValueError` for a probe or an embedding that is not finite: no search finds it."""
        if not self.probe.isfinite().all():
            raise ValueError(f"{name}: its probe is not finite. Build it again.")
        start = 0
        for embeds in self.embeddings():
            finite = embeds.sum(dim=1).isfinite()  # four times as fast as `isfinite` of each number
            if not finite.all():
                clip = self.dataset[start + finite.tolist().index(False)]["video"]
                raise ValueError(f"{name}: the embedding of {clip} is not finite. Build it again.")
            start += len(embeds)

    def embeddings(self) -> Iterator[torch.Tensor]:
        """Yield the embeddings in batches `(b, D)`: views of the files, which may exceed the
        memory."""
        # As Arrow: the formats for NumPy and torch copy, which takes longer than the product.
        table = self.dataset.select_columns("embedding").with_format("arrow")[:]
        for batch in table["embedding"].chunks:
            # Not through NumPy, whose read-only arrays torch warns about.
            yield torch.from_dlpack(batch.flatten()).reshape(len(batch), -1)

    def check_model(self, probe: torch.Tensor) -> None:
        """Raise `ValueError` if the probe is not that of the model that made this library."""
        if not same_model(probe, self.probe):
            raise ValueError(
                "library: it was made with another model. Build it again with this model, or load "
                "the model that made it."
            )

    def nearest(self, embeds: torch.Tensor, top_k: int) -> list[list[dict]]:
        """Return the `top_k` clips nearest to each embedding of `(N, D)`, best first."""
        results = []
        for texts in embeds.detach().float().cpu().split(TEXTS_AT_ONCE):
            scores, indices = self.cosines(texts).topk(min(top_k, len(self.dataset)))
            videos = self.dataset.select_columns("video")[indices.flatten().tolist()]["video"]
            found = [
                {"video": video, "score": score}
                for video, score in zip(videos, scores.flatten().tolist(), strict=True)
            ]
            k = scores.shape[1]
            results += [found[row * k : (row + 1) * k] for row in range(len(texts))]
        return results

    def cosines(self, texts: torch.Tensor) -> torch.Tensor:
        """Return the cosines `(N, n)` of N texts and all n clips.

        Products batch by batch are as fast as one product. FAISS's flat index needs a copy of all
        embeddings and takes five times as long for 32 texts.
        """
        cosines = torch.empty(len(texts), len(self.dataset))
        start = 0
        for clips in self.embeddings():
            torch.mm(texts, clips.T, out=cosines[:, start : start + len(clips)])
            start += len(clips)
        return cosines


__all__ = ["ClipLibrary", "check_datasets", "unreadable_report"]
