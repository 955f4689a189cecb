"""Pipelines: answer a question about a video, rank texts for a video or videos for a text,
classify a video, and caption one while it runs.

| task                             | call                                              |
|----------------------------------|---------------------------------------------------|
| `visual-question-answering`      | `pipe(video=..., question=..., candidates=[...])` |
|                                  | `pipe(video=..., question=...)`, with a Y-Decoder |
| `video-text-retrieval`           | `pipe(video=..., texts=[...])`                    |
|                                  | `pipe(text=..., videos=[...])`                    |
|                                  | `pipe.build_library(...)`, `pipe.search(...)`     |
| `zero-shot-video-classification` | `pipe(video=..., candidate_labels=[...])`         |
| `streaming-caption`              | `pipe(source)`: see `pipeline_streaming`          |
| `zero-shot-image-classification` | `pipe(image, candidate_labels=[...])`             |
| `image-text-to-text`             | `pipe(image, text=...)`, with a Y-Decoder         |
| `image-feature-extraction`       | `pipe(image)`                                     |

The last three have the calls of transformers' own pipelines. Texts are embedded by
`SentenceTransformer`, not by `feature-extraction`.

For a published model, `pipe` is `pipeline(task, model="user/name", trust_remote_code=True)`. For
any other, make it from the class: `VLJEPARetrievalPipeline(model=model, processor=processor)`.

A *sample* is a dictionary with `"video"` or `"image"` (and, if the task needs it, a `"question"`),
or the medium alone; the content of a file decides whether it is a video or an image. One sample
gives one result. A list of samples gives a list of results. Any other iterable, such as a generator
or a dataset, gives an iterator that reads it lazily.

A *medium* is a path, the bytes of a file, a PIL image, a uint8 array `(T, H, W, 3)` or
`(H, W, 3)`, a uint8 tensor `(T, 3, H, W)` or `(3, H, W)`, or, with `allow_urls=True`, an http(s)
address.

A *score* is the cosine of the predicted embedding and the text's embedding, from -1 to 1. It does
not depend on the other candidates. With `calibrated=True` it is the probability of the text among
the candidates: a softmax at the temperature that the model was trained with.

A *query* is what the Predictor reads with the medium. Its default, and the default template of
labels, are the model's own: `config.prompts` and `config.target_prompts`.

Shapes: B samples, N texts, T frames, h and w pixels, D embedding size.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils import logging

from .clip_library import ClipLibrary, check_datasets, unreadable_report
from .decoding import decode_texts
from .embedding import check_finite, embed_texts, weights_state
from .fetching import fetch
from .library_writer import EmbeddingLog, only_writer
from .pipeline_base import PipelineBase, given
from .pipeline_streaming import VLJEPAStreamingCaptionPipeline
from .text_checks import check_string, check_text, check_texts, fill_template

logger = logging.get_logger(__name__)

PROBE_TEXT = "a person opens a door"  # any text: `probe` embeds it with every model

FILE = str | os.PathLike | bytes


# -- arguments -----------------------------------------------------------------------------


def as_sample(sample: Any) -> Mapping[str, Any]:
    """Return a sample as a dictionary; find the kind of a medium that is given alone.

    Raises: `ValueError` for a medium that could be a video or an image, such as bytes.
    """
    if isinstance(sample, Mapping):
        return sample
    if isinstance(sample, Image.Image):
        return {"image": sample}
    if isinstance(sample, np.ndarray | torch.Tensor) and sample.ndim in (3, 4):
        return {"image" if sample.ndim == 3 else "video": sample}
    if isinstance(sample, str | os.PathLike):
        return {"medium": sample}  # `preprocess` looks at the content
    raise ValueError(
        f"a {type(sample).__name__} may be a video, an image or neither: give it as "
        '{"video": ...} or {"image": ...}.'
    )


def medium_of(sample: Mapping[str, Any]) -> tuple[str, Any]:
    """Return `"video"`, `"image"` or, if its kind is unknown, `"medium"`, and the medium."""
    found = [kind for kind in ("video", "image", "medium") if sample.get(kind) is not None]
    if len(found) != 1:
        kinds = "both video and image" if found else "neither video nor image"
        raise ValueError(f"{kinds} given: give exactly one.")
    kind, medium = found[0], sample[found[0]]
    # `datasets` gives a medium in this form if decoding is off.
    if isinstance(medium, Mapping) and {"bytes", "path"} <= medium.keys():
        medium = medium["path"] if medium["bytes"] is None else medium["bytes"]
    allowed = FILE | np.ndarray | torch.Tensor | (Image.Image if kind == "image" else list)
    if not isinstance(medium, allowed):
        raise ValueError(
            f"{kind} is a {type(medium).__name__}: give a path, bytes, a uint8 array or tensor, "
            f"or {'a PIL image' if kind == 'image' else 'a list of PIL images'}."
        )
    return kind, medium


def as_path(name: str, path: Any) -> str:
    """Return a path as a string, or raise `ValueError` for another type."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{name} is a {type(path).__name__}: give a path.")
    return check_string(name, os.fspath(path))


def is_url(medium: Any) -> bool:
    return isinstance(medium, str) and medium.lower().startswith(("http://", "https://"))


# -- base class ----------------------------------------------------------------------------


class VLJEPAPipeline(PipelineBase):
    """Pipeline that ranks texts for samples.

    A text is embedded once, however many samples and calls rank it, until the model's weights
    change.
    """

    label: str  # key of the text in a result
    prompt: str  # name in `config.prompts` of the default query
    # For the endpoint's handler, which is alone in its module and can import nothing from here.
    fetch = staticmethod(fetch)
    check_text = staticmethod(check_text)
    check_texts = staticmethod(check_texts)
    fill_template = staticmethod(fill_template)

    def __call__(self, inputs: Any = None, *, video: Any = None, image: Any = None, **kwargs: Any):
        """Rank texts for one sample or many.

        Args:
            inputs (*optional*): a sample, a list or another iterable of samples.
            video, image (*optional*): the medium of one sample.
            batch_size (`int`, *optional*, defaults to 1): samples per batch.
            num_workers (`int`, *optional*, defaults to 0): processes that decode media.
            kwargs: the parameters of the task.

        Raises: `ValueError` that names the argument and, for a list or iterable, the index of the
            input.
        """
        sources = given(inputs=inputs, video=video, image=image)
        if len(sources) != 1:
            names = " and ".join(sources) or "none"
            raise ValueError(f"give either video, image or a list of samples; got {names}.")
        if inputs is None:
            return super().__call__(sources, **kwargs)
        one = Mapping | FILE | Image.Image | np.ndarray | torch.Tensor
        if isinstance(inputs, one):
            return super().__call__(as_sample(inputs), **kwargs)
        if not isinstance(inputs, Iterable):
            raise ValueError(f"inputs is a {type(inputs).__name__}: give a sample or a list.")
        if isinstance(inputs, list | tuple):
            return super().__call__(list(inputs), **kwargs) if inputs else []
        # transformers iterates lazily over a generator, but not over every iterable.
        return super().__call__((sample for sample in inputs), **kwargs)

    # transformers' own versions of the next two methods pad and concatenate the results of
    # `preprocess`, but clips and images have different shapes.

    def get_iterator(
        self,
        inputs: Iterable[Any],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[list[dict]]:
        ranking = self.prepare(**postprocess_params)
        if isinstance(inputs, list):
            indexed = list(enumerate(inputs))
            dataset = PipelineDataset(indexed, self.preprocess_indexed, preprocess_params)
        else:
            indexed = enumerate(inputs)
            dataset = PipelineIterator(indexed, self.preprocess_indexed, preprocess_params)
            num_workers = min(num_workers, 1)  # each worker would iterate over all samples
        loader = DataLoader(
            dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=list
        )
        return (result for items in loader for result in self.results(items, **ranking))

    def run_single(
        self,
        inputs: Mapping[str, Any],
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> list[dict]:
        ranking = self.prepare(**postprocess_params)
        [result] = self.results([self.preprocess(inputs, **preprocess_params)], **ranking)
        return result

    def preprocess_indexed(self, indexed: tuple[int, Any], **parameters: Any) -> dict[str, Any]:
        index, sample = indexed
        try:
            return self.preprocess(sample, **parameters)
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"input {index}: {error}") from error

    def preprocess(
        self, sample: Any, query: str | None = None, allow_urls: bool = False
    ) -> dict[str, Any]:
        """Return `pixels` `(T, 3, h, w)` and the `query`; by default the task's own."""
        kind, medium = medium_of(as_sample(sample))
        if query is None:
            query = self.model.config.prompts[self.prompt]
        check_string("query", query)
        if (is_url(medium) or self.processor.is_remote(medium)) and not allow_urls:
            raise ValueError(
                f"{kind} is a URL: pass allow_urls=True to let this machine fetch it, or download "
                "it first."
            )
        if is_url(medium):
            medium = fetch(medium)
        if kind == "medium":
            kind = self.processor.media_kind(medium)
        try:
            batch = self.processor(**{f"{kind}s": [medium]})
        except ValueError as error:
            raise ValueError(f"{kind}: {error}") from error
        return {"pixels": batch["pixel_values_videos"][0], "query": query}

    def _forward(self, items: list[dict[str, Any]]) -> list[torch.Tensor]:
        """Return one predicted embedding `(D,)` per item.

        Images and clips may be mixed: items with the same number of frames make one batch.
        """
        embeds = {}
        for length in {len(item["pixels"]) for item in items}:
            indices = [i for i, item in enumerate(items) if len(item["pixels"]) == length]
            pixels = torch.stack([items[i]["pixels"] for i in indices]).to(self.dtype)
            tokens = self.processor(text=[items[i]["query"] for i in indices]).to(self.device)
            predicted = self.model.base_model.predict(pixels, **tokens)  # (len(indices), D)
            check_finite("a predicted embedding", predicted)
            embeds |= dict(zip(indices, predicted, strict=True))
        return [embeds[i] for i in range(len(items))]

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Return target embeddings, unit vectors `(N, D)` on the CPU."""
        return embed_texts(self.model, self.processor, texts)

    def prepare(self, **parameters: Any) -> dict[str, Any]:
        """Return the arguments of `postprocess` that are computed once per call."""
        raise NotImplementedError

    def results(self, items: list[dict[str, Any]], **ranking: Any) -> list[list[dict]]:
        """Return the result of each item; the items are one batch."""
        return [self.postprocess(predicted, **ranking) for predicted in self.forward(items)]

    def postprocess(
        self,
        predicted: torch.Tensor,
        texts: list[str],
        text_embeds: torch.Tensor,
        top_k: int | None,
        calibrated: bool,
    ) -> list[dict]:
        ranked = self.best(text_embeds @ predicted, top_k, calibrated)
        return [{self.label: texts[index], "score": score} for index, score in ranked]

    def best(
        self, cosines: torch.Tensor, top_k: int | None, calibrated: bool
    ) -> list[tuple[int, float]]:
        """Return indices and scores of the `top_k` (`None`: all) of `(N,)`, best first.

        Equal cosines stay in their order.
        """
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ValueError(f"top_k is {top_k!r}: give a whole number of at least 1.")
        scores = cosines
        if calibrated:
            scale = check_finite("logit_scale", self.model.base_model.logit_scale().detach())
            scores = (cosines * scale.cpu()).softmax(dim=0)
        order = cosines.argsort(descending=True, stable=True).tolist()[:top_k]
        return [(index, scores[index].item()) for index in order]


# -- the tasks -----------------------------------------------------------------------------


class VLJEPAVisualQuestionAnsweringPipeline(VLJEPAPipeline):
    """Pipeline that answers a question about a video or an image.

    The answers to choose from are `candidates` or the model's own (`config.answers`), which are
    embedded once for all calls. With neither, a model with a Y-Decoder writes the answer. Its
    score is then the cosine of the predicted embedding and the written text's embedding. Several
    written answers (`num_return_sequences`) are ranked by this score.

    Calls have the form of the pipeline of this name that transformers had:

    ```python
    ask("image.jpg", "What color is the cat?", top_k=2)
    ask({"image": "image.jpg", "question": "What color is the cat?"}, candidates=["red", "black"])
    ```

    One difference: `"score"` is a cosine, not a probability. `calibrated=True` gives probabilities.
    """

    label = "answer"
    prompt = "question"
    vocabulary: tuple[list[str], tuple | None, torch.Tensor] | None = None

    def __call__(self, inputs: Any = None, question: str | None = None, **kwargs: Any):
        """Answer a question about one sample or many.

        Args:
            inputs (*optional*): a sample, a list or another iterable of samples.
            question (`str`, *optional*): the question for samples without one.
            kwargs: `video`, `image`, `batch_size` and `num_workers`, as in `VLJEPAPipeline`, and
                the parameters in `_sanitize_parameters`.

        Returns: `[{"answer", "score"}]` for one sample, best first; the score is a cosine, from -1
            to 1, or a probability with `calibrated=True`.
        """
        return super().__call__(inputs, **kwargs, **given(question=question))

    def _sanitize_parameters(
        self,
        question: str | None = None,
        candidates: Iterable[str] | None = None,
        top_k: int | None = None,
        calibrated: bool | None = None,
        allow_urls: bool | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> tuple[dict, dict, dict]:
        """Sort the parameters of a call by the step that reads them.

        Args:
            question (`str`, *optional*): the question for samples without one.
            candidates (`list[str]`, *optional*): answers to choose from.
            top_k (`int`, *optional*, defaults to 5): number of answers returned, best first.
            calibrated (`bool`, *optional*, defaults to `False`): probabilities, not cosines.
            allow_urls (`bool`, *optional*, defaults to `False`): fetch http(s) addresses.
            generate_kwargs (`dict`, *optional*): arguments of `generate`, for written answers.
        """
        before = given(question=question, allow_urls=allow_urls)
        after = given(
            candidates=candidates,
            top_k=top_k,
            calibrated=calibrated,
            generate_kwargs=generate_kwargs,
        )
        return before, {}, after

    def preprocess(
        self, sample: Any, question: str | None = None, allow_urls: bool = False
    ) -> dict[str, Any]:
        sample = as_sample(sample)
        if sample.get("question") is not None:
            question = sample["question"]
        if question is None:
            raise ValueError("question is missing: give a string.")
        # Not `format`: a question may contain braces.
        query = self.model.config.prompts[self.prompt].replace(
            "{}", check_text("question", question)
        )
        return super().preprocess(sample, query, allow_urls) | {"question": question}

    def prepare(
        self,
        candidates: Iterable[str] | None = None,
        top_k: int | None = 5,
        calibrated: bool = False,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        ranking = {"top_k": top_k, "calibrated": calibrated}
        if candidates is None and not self.model.config.answers:
            if not self.has_decoder:
                raise ValueError(
                    "candidates is missing, and this model has neither answers of its own "
                    "(config.answers) nor a Y-Decoder to write one: give candidates=[...]."
                )
            return ranking | {"generate_kwargs": generate_kwargs or {}}
        if generate_kwargs is not None:
            raise ValueError(
                "generate_kwargs is for a decoder, but answers are chosen from "
                f"{'config.answers' if candidates is None else 'candidates'}: leave it out."
            )
        if candidates is None:
            texts, text_embeds = self.stored_answers()
        else:
            texts = check_texts("candidates", candidates)
            text_embeds = self.embed_texts(texts)
        return ranking | {"texts": texts, "text_embeds": text_embeds}

    def results(
        self,
        items: list[dict[str, Any]],
        generate_kwargs: dict[str, Any] | None = None,
        **ranking: Any,
    ) -> list[list[dict]]:
        if generate_kwargs is None:
            return super().results(items, **ranking)
        predicted = self.forward(items)
        queries = [item["query"] for item in items]
        written = decode_texts(
            self.model, self.processor, torch.stack(predicted), queries=queries, **generate_kwargs
        )
        each, results = len(written) // len(items), []  # `num_return_sequences` texts per item
        for index, embeds in enumerate(predicted):
            # Beams can differ in tokens and be equal as texts.
            texts = list(dict.fromkeys(written[index * each : (index + 1) * each]))
            results.append(self.postprocess(embeds, texts, self.embed_texts(texts), **ranking))
        return results

    def stored_answers(self) -> tuple[list[str], torch.Tensor]:
        """Return the model's own answers and their embeddings `(N, D)`."""
        # Not only the cache of `embed_texts`: it holds fewer texts than a vocabulary may have.
        answers, state = self.model.config.answers, weights_state(self.model)
        vocabulary = self.vocabulary
        if vocabulary is None or state is None or vocabulary[:2] != (answers, state):
            texts = check_texts("config.answers", answers)
            self.vocabulary = vocabulary = (texts, state, self.embed_texts(texts))
        return vocabulary[0], vocabulary[2]


class VLJEPAZeroShotClassificationPipeline(VLJEPAPipeline):
    """Pipeline that classifies a video or an image by given labels."""

    label = "label"
    prompt = "action"
    target_prompt = "action"  # name in `config.target_prompts` of the default template

    def _sanitize_parameters(
        self,
        candidate_labels: Iterable[str] | None = None,
        hypothesis_template: str | None = None,
        query: str | None = None,
        top_k: int | None = None,
        calibrated: bool | None = None,
        allow_urls: bool | None = None,
    ) -> tuple[dict, dict, dict]:
        """Sort the parameters of a call by the step that reads them.

        Args:
            candidate_labels (`list[str]`): labels to choose from.
            hypothesis_template (`str`, *optional*): the text that is embedded for a label, with
                `{}`, once, in the label's position; the model's target prompt by default.
            query (`str`, *optional*): the query; the model's action prompt by default.
            top_k (`int`, *optional*): number of labels returned, best first; all by default.
            calibrated (`bool`, *optional*, defaults to `False`): probabilities, not cosines.
            allow_urls (`bool`, *optional*, defaults to `False`): fetch http(s) addresses.
        """
        after = given(
            candidate_labels=candidate_labels,
            hypothesis_template=hypothesis_template,
            top_k=top_k,
            calibrated=calibrated,
        )
        return given(query=query, allow_urls=allow_urls), {}, after

    def prepare(
        self,
        candidate_labels: Iterable[str] | None = None,
        hypothesis_template: str | None = None,
        top_k: int | None = None,
        calibrated: bool = False,
    ) -> dict[str, Any]:
        if candidate_labels is None:
            raise ValueError("candidate_labels is missing: give a list of labels.")
        labels = check_texts("candidate_labels", candidate_labels)
        if hypothesis_template is None:
            hypothesis_template = self.model.config.target_prompts[self.target_prompt]
        hypotheses = fill_template(hypothesis_template, labels)
        return {
            "texts": labels,
            "text_embeds": self.embed_texts(hypotheses),
            "top_k": top_k,
            "calibrated": calibrated,
        }


class VLJEPAZeroShotImageClassificationPipeline(VLJEPAZeroShotClassificationPipeline):
    """Pipeline with the calls and the defaults of transformers' own of this name.

    Labels are put into the model's target prompt for images, and scores are probabilities; with
    `calibrated=False` they are cosines. The default query is the model's caption prompt.
    """

    prompt = "caption"
    target_prompt = "image"

    def __call__(self, inputs: Any = None, candidate_labels: Any = None, **kwargs: Any):
        return super().__call__(inputs, **kwargs, **given(candidate_labels=candidate_labels))

    def prepare(
        self,
        candidate_labels: Iterable[str] | None = None,
        hypothesis_template: str | None = None,
        top_k: int | None = None,
        calibrated: bool = True,
    ) -> dict[str, Any]:
        return super().prepare(candidate_labels, hypothesis_template, top_k, calibrated)


class VLJEPAImageTextToTextPipeline(VLJEPAVisualQuestionAnsweringPipeline):
    """Pipeline with the calls of transformers' own of this name: the Y-Decoder writes the answer
    to a text about an image.

    Use `visual-question-answering` for answers that are chosen, and for their scores.
    """

    def __call__(
        self,
        images: Any = None,
        text: str | None = None,
        *,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        """Write the answer to a text about one image or several.

        Args:
            images: an image, a list or another iterable of images.
            text (`str`): the question.
            max_new_tokens (`int`, *optional*): a limit for the answer.
            generate_kwargs (`dict`, *optional*): other arguments of `generate`.

        Returns: `[{"input_text", "generated_text"}]` for one image; the generated text does not
            repeat the input text.
        Raises: `ValueError` for a chat: the model reads one question.
        """
        check_text("text", text)
        how = (generate_kwargs or {}) | given(max_new_tokens=max_new_tokens)
        return super().__call__(images, text, generate_kwargs=how, **kwargs)

    def prepare(self, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        # Not the answers of the configuration: this task writes.
        return {"generate_kwargs": generate_kwargs, "top_k": None, "calibrated": False}

    def results(self, items: list[dict[str, Any]], **ranking: Any) -> list[list[dict]]:
        found = super().results(items, **ranking)
        return [
            [{"input_text": item["question"], "generated_text": each["answer"]} for each in answers]
            for item, answers in zip(items, found, strict=True)
        ]


class VLJEPAImageFeatureExtractionPipeline(VLJEPAPipeline):
    """Pipeline that embeds images and videos: each result is a unit vector, a list of D numbers."""

    prompt = "retrieval"

    def _sanitize_parameters(
        self, query: str | None = None, allow_urls: bool | None = None
    ) -> tuple[dict, dict, dict]:
        """Sort the parameters of a call by the step that reads them.

        Args:
            query (`str`, *optional*): the query; the model's retrieval prompt by default.
            allow_urls (`bool`, *optional*, defaults to `False`): fetch http(s) addresses.
        """
        return given(query=query, allow_urls=allow_urls), {}, {}

    def prepare(self) -> dict[str, Any]:
        return {}

    def postprocess(self, predicted: torch.Tensor) -> list[float]:
        return predicted.tolist()


class VLJEPARetrievalPipeline(VLJEPAPipeline):
    """Pipeline that ranks texts for a video, or videos for a text.

    A library stores the embeddings of many clips, computed once:

    ```python
    pipe.build_library(glob("clips/*.mp4"), "library")
    pipe.search("pick up the blue key", "library", top_k=5)
    ```
    """

    label = "text"
    prompt = "retrieval"
    checked: ClipLibrary | None = None  # the library last found to be this model's

    def __call__(
        self,
        inputs: Any = None,
        *,
        text: str | None = None,
        videos: Iterable[Any] | None = None,
        **kwargs: Any,
    ):
        """Rank `texts` for the given samples, or `videos` for one `text`.

        Returns: for texts, the results of every pipeline; for videos,
            `[{"index", "video", "score"}]`, best first, with each video's index in the list and
            the video as given.
        """
        if text is None and videos is None:
            return super().__call__(inputs, **kwargs)
        if text is None or videos is None:
            missing = "text" if text is None else "videos"
            raise ValueError(f"{missing} is missing: give text and videos together.")
        if inputs is not None or given(**kwargs).keys() & {"video", "image", "texts"}:
            raise ValueError("give texts for a video, or videos for a text, and not both.")
        check_text("text", text)
        if isinstance(videos, FILE | Mapping) or not isinstance(videos, Iterable):
            raise ValueError(f"videos is a {type(videos).__name__}: give a list of videos.")
        samples = [{"video": video} for video in videos]
        if not samples:
            raise ValueError("videos is empty: give at least one video.")
        after = {"top_k": None, "calibrated": False} | self._postprocess_params | given(**kwargs)
        # Not calibrated per video, where one text has probability 1: `best` calibrates over videos.
        scored = super().__call__(samples, **kwargs | {"texts": [text], "calibrated": False})
        cosines = torch.tensor([best["score"] for [best] in scored])
        ranked = self.best(cosines, after["top_k"], after["calibrated"])
        return [
            {"index": index, "video": samples[index]["video"], "score": score}
            for index, score in ranked
        ]

    def _sanitize_parameters(
        self,
        texts: Iterable[str] | None = None,
        query: str | None = None,
        top_k: int | None = None,
        calibrated: bool | None = None,
        allow_urls: bool | None = None,
    ) -> tuple[dict, dict, dict]:
        """Sort the parameters of a call by the step that reads them.

        Args:
            texts (`list[str]`): texts to rank.
            query (`str`, *optional*): the query; the model's retrieval prompt by default.
            top_k (`int`, *optional*): number of results returned, best first; all by default.
            calibrated (`bool`, *optional*, defaults to `False`): probabilities among the ranked
                texts or videos, not cosines.
            allow_urls (`bool`, *optional*, defaults to `False`): fetch http(s) addresses.
        """
        before = given(query=query, allow_urls=allow_urls)
        return before, {}, given(texts=texts, top_k=top_k, calibrated=calibrated)

    def prepare(
        self,
        texts: Iterable[str] | None = None,
        top_k: int | None = None,
        calibrated: bool = False,
    ) -> dict[str, Any]:
        if texts is None:
            raise ValueError("texts is missing: give texts=[...], or text and videos.")
        texts = check_texts("texts", texts)
        return {
            "texts": texts,
            "text_embeds": self.embed_texts(texts),
            "top_k": top_k,
            "calibrated": calibrated,
        }

    def build_library(
        self,
        videos: Iterable[str | os.PathLike],
        output_dir: str | os.PathLike,
        *,
        query: str | None = None,
        batch_size: int = 1,
        allow_urls: bool = False,
    ) -> ClipLibrary:
        """Embed every clip once and save the library. Clips that cannot be read are reported.

        Args:
            videos (`Iterable[str | os.PathLike]`): paths; results name clips by these.
            output_dir (`str` or `os.PathLike`): a new folder, which `datasets` can load.
            query (`str`, *optional*): the query of every clip; the model's retrieval prompt by
                default.
            batch_size (`int`, *optional*, defaults to 1): clips per batch.
            allow_urls (`bool`, *optional*, defaults to `False`): fetch http(s) addresses.

        A killed or failed build leaves `OUTPUT_DIR.incomplete`. The same call continues it: the
        clips, in any order, may be more than before. Another query, another model, or a clip that
        has changed is refused. Two processes cannot build one library.

        Raises: `ValueError` for a folder that exists or cannot be written, for an argument of
            another type, for an incomplete library of other clips, and if no clip can be read.
        """
        check_datasets()
        if isinstance(videos, FILE) or not isinstance(videos, Iterable):
            raise ValueError(f"videos is a {type(videos).__name__}: give a list of paths.")
        if query is None:
            query = self.model.config.prompts[self.prompt]
        check_string("query", query)  # `embed_clips` would report every clip as unreadable
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}: give a whole number of at least 1.")
        paths = [as_path(f"videos[{index}]", video) for index, video in enumerate(videos)]
        probe = self.probe()
        with only_writer(output_dir) as incomplete:
            log = EmbeddingLog(incomplete, query, probe)
            missing = log.resume(paths)
            unreadable = self.embed_clips(missing, log, batch_size, allow_urls)
            if unreadable:
                logger.warning(unreadable_report(unreadable, len(paths)))
            library = ClipLibrary(log.dataset(), query, probe, unreadable)
            library.write(incomplete, Path(output_dir))
        return ClipLibrary.load(output_dir)

    def embed_clips(
        self, videos: list[str], log: EmbeddingLog, batch_size: int, allow_urls: bool
    ) -> list[dict]:
        """Embed clips in batches and log the embeddings; return the unreadable clips."""
        names, items, unreadable = [], [], []  # the batch being filled
        for video in logging.tqdm(videos, desc="clips"):
            try:
                items.append(self.preprocess({"video": video}, log.query, allow_urls))
            except ValueError as error:
                unreadable.append({"video": video, "reason": str(error)})
                continue
            names.append(video)
            if len(items) == batch_size:
                log.add(names, self.forward(items))
                names, items = [], []
        if items:
            log.add(names, self.forward(items))
        return unreadable

    def load_library(self, folder: str | os.PathLike) -> ClipLibrary:
        """Load a saved library, for several searches."""
        return ClipLibrary.load(folder)

    def search(
        self,
        text: str | list[str],
        library: str | os.PathLike | ClipLibrary,
        top_k: int = 10,
    ) -> list[dict] | list[list[dict]]:
        """Find the clips whose embeddings are nearest to a text's embedding, best first.

        Args:
            text (`str` or `list[str]`): one search, or several at once.
            library (`str`, `os.PathLike` or `ClipLibrary`): a saved library, or a loaded one.
            top_k (`int`, *optional*, defaults to 10): number of clips returned.

        Returns: `[{"video", "score"}]` with cosines as scores, or a list of such lists.
        Raises: `ValueError` if the library was made with another model.
        """
        texts = check_texts("text", [text] if isinstance(text, str) else text)
        if type(top_k) is not int or top_k < 1:
            raise ValueError(f"top_k is {top_k!r}: give a whole number of at least 1.")
        if not isinstance(library, ClipLibrary):
            library = ClipLibrary.load(library)
        if library is not self.checked:
            library.check_model(self.probe())
            self.checked = library
        found = library.nearest(self.embed_texts(texts), top_k)
        return found[0] if isinstance(text, str) else found

    def probe(self) -> torch.Tensor:
        """Return this model's embeddings of a fixed clip and a fixed text, `(2, D)`.

        Models with the same embedding space have nearly the same probe, in any precision and with
        any prompts. A checksum of the weights or of the probe would change with the precision.
        """
        pixels = np.arange(4 * 64 * 64 * 3) * 2654435761 % 2**32 // 2**24  # Knuth's hash
        clip = pixels.astype(np.uint8).reshape(4, 64, 64, 3)
        [predicted] = self.forward([self.preprocess({"video": clip}, query="")])
        return torch.stack([predicted, self.embed_texts([PROBE_TEXT])[0]])


__all__ = [
    "VLJEPAImageFeatureExtractionPipeline",
    "VLJEPAImageTextToTextPipeline",
    "VLJEPARetrievalPipeline",
    "VLJEPAStreamingCaptionPipeline",
    "VLJEPAVisualQuestionAnsweringPipeline",
    "VLJEPAZeroShotClassificationPipeline",
    "VLJEPAZeroShotImageClassificationPipeline",
]
