"""A library of embedded clips on disk, to be searched by text.

`VLJEPARetrievalPipeline.build_library` writes one.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils import is_datasets_available, is_faiss_available

if is_datasets_available():
    from datasets import Dataset, Features, List, Value, load_from_disk


INNER_PRODUCT = 0  # faiss.METRIC_INNER_PRODUCT; faiss is optional and imported by datasets only
CLIPS_PER_READ = 4096
MAX_DRIFT = 1e-3  # in cosine: a model rounded to bf16 stays below, another model is far above


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
        embedding = List(Value("float32"), length=embeds.shape[1])  # FAISS needs one fixed length
        dataset = Dataset.from_dict(
            {"video": videos, "embedding": embeds.numpy()},
            features=Features({"video": Value("string"), "embedding": embedding}),
        )
        library = cls(dataset, query, probe, unreadable)
        library.check_numbers("library")
        return library

    def save(self, folder: str | os.PathLike) -> None:
        self.dataset.save_to_disk(folder)
        # Written last: a folder without this file is a library that was saved only in part.
        (Path(folder) / "library.json").write_text(
            json.dumps(
                {
                    "query": self.query,
                    "probe": self.probe.tolist(),
                    "unreadable": self.unreadable,
                },
                indent=2,
            )
        )

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "ClipLibrary":
        check_datasets()
        path = Path(folder) / "library.json"
        if not path.is_file():
            raise ValueError(
                f"library: {folder} has no library.json. Write a library with build_library."
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
        # In batches: a large library is on disk and does not fit into memory.
        for batch in self.dataset.with_format("numpy").iter(CLIPS_PER_READ):
            finite = np.isfinite(batch["embedding"]).all(axis=1)
            if not finite.all():
                clip = batch["video"][int(finite.argmin())]
                raise ValueError(f"{name}: the embedding of {clip} is not finite. Build it again.")

    def check_model(self, probe: torch.Tensor) -> None:
        """Raise `ValueError` if the probe is not that of the model that made this library."""
        same = probe.shape == self.probe.shape
        # Not `1 - cosine > MAX_DRIFT`, which is false for NaN.
        if not same or not ((probe * self.probe).sum(dim=1) >= 1 - MAX_DRIFT).all():
            raise ValueError(
                "library: it was made with another model. Build it again with this model, or load "
                "the model that made it."
            )

    def nearest(self, embeds: torch.Tensor, top_k: int) -> list[list[dict]]:
        """Return the `top_k` clips nearest to each embedding of `(N, D)`, best first."""
        if not is_faiss_available():
            raise ImportError("searching a library needs FAISS: pip install faiss-cpu")
        if "embedding" not in self.dataset.list_indexes():
            self.dataset.add_faiss_index("embedding", metric_type=INNER_PRODUCT)
        scores, clips = self.dataset.get_nearest_examples_batch(
            "embedding", embeds.numpy(), k=min(top_k, len(self.dataset))
        )
        return [
            [
                {"video": video, "score": float(score)}
                for video, score in zip(found["video"], cosines, strict=True)
            ]
            for found, cosines in zip(clips, scores, strict=True)
        ]


__all__ = ["ClipLibrary", "check_datasets", "unreadable_report"]
