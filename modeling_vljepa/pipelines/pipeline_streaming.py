"""Captions of a stream, each as soon as its segment is over.

    watch = pipeline("streaming-caption", model="user/name", trust_remote_code=True)
    captions = watch("kitchen.mp4", fps=4)
    for caption in captions:
        print(caption)  # {"start": 0.0, "end": 3.2, "text": "cuts an onion", "confidence": 0.97}
    captions.session.ask(["an onion", "a carrot"], query="What is cut?")

The source is a file (path or content), the number of a camera, an http(s) or rtsp address with
`allow_urls=True`, or an iterator of pairs: seconds and a uint8 array `(H, W, 3)`.

Shapes: B segments, N texts, D embedding size.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .decoding import decode_texts
from .pipeline_base import PipelineBase, given
from .segmentation import OnlineSegmenter, Segment
from .stream_session import EmbeddedWindow, FrameWindow, StreamSession, stream
from .text_checks import check_texts


class Writer:
    """Writer of the texts of one stream's segments, one after the other.

    The text of the segment before is passed to the decoder, which may read it.

    Args:
        pipe ([`VLJEPAStreamingCaptionPipeline`]): a pipeline whose model has a Y-Decoder.
        query (`str`): the query of the stream.
        generate_kwargs (`dict`): arguments of `generate`.
    """

    def __init__(self, pipe: PipelineBase, query: str, generate_kwargs: dict[str, Any]):
        if generate_kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError("generate_kwargs: a segment has one text; drop num_return_sequences.")
        self.pipe = pipe
        self.query = query
        self.generate_kwargs = generate_kwargs
        self.previous = ""

    def __call__(self, embeds: torch.Tensor) -> list[str]:
        """Decode embeddings `(B, D)` to B texts."""
        # Not as a batch: each text depends on the one before.
        return [self.write(embedding) for embedding in embeds]

    def write(self, embedding: torch.Tensor) -> str:
        [self.previous] = decode_texts(
            self.pipe.model,
            self.pipe.processor,
            embedding[None],
            queries=[self.query],
            previous=[self.previous],
            **self.generate_kwargs,
        )
        return self.previous


class CaptionStream:
    """Captions of one stream, which is read once.

    Attributes:
        session ([`StreamSession`]): its `ask` answers questions about the stream so far, at any
            time.
        report (`StreamReport`): counts and events of the source so far.
    """

    def __init__(self, captions: Iterator[dict], session: StreamSession, windows: Any):
        self.captions = captions
        self.session = session
        self.windows = windows

    @property
    def report(self) -> Any:
        return self.windows.report

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self.captions)

    def __enter__(self) -> "CaptionStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching. The session still answers questions about the stream so far."""
        self.captions.close()


class VLJEPAStreamingCaptionPipeline(PipelineBase):
    """Pipeline that captions a stream, one text per segment.

    A Y-Decoder writes the texts. With `candidates`, the text is the nearest candidate, and no
    decoder is needed.
    """

    def __call__(
        self, source: Any, *, batch_size: int | None = None, **parameters: Any
    ) -> CaptionStream:
        """Caption one source while it runs.

        Args:
            source: see the module.
            batch_size (`int`, *optional*, defaults to 1): windows per batch; a larger one is
                faster on a file and delays a live source.
            parameters: see `_sanitize_parameters`.

        Returns: an iterator of `{"start", "end", "text", "confidence"}`, one for each segment when
            it closes. Segments tile the stream; `start` and `end` are seconds. The confidence
            measures how much the embeddings of a segment agree, not whether the text is true.
        Raises: `ValueError` for a model that has neither a Y-Decoder nor `candidates`, and for
            invalid options; `MediaError`, at the first caption, for a source that cannot be
            opened.
        """
        watched, asked, _ = self._sanitize_parameters(**parameters)
        asked = (
            self._forward_params
            | asked
            | given(batch_size=self._batch_size if batch_size is None else batch_size)
        )
        windows = self.preprocess(source, **self._preprocess_params | watched)
        session = self.session(**asked)
        return CaptionStream(self.captions(windows, session), session, windows)

    def _sanitize_parameters(
        self,
        query: str | None = None,
        candidates: Iterable[str] | None = None,
        window: int | None = None,
        stride: int | None = None,
        fps: float | None = None,
        live: bool | None = None,
        allow_urls: bool | None = None,
        segmenter_kwargs: dict[str, Any] | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> tuple[dict, dict, dict]:
        """Sort the parameters of a call by the step that reads them.

        Args:
            query (`str`, *optional*): the query of every window; the model's caption prompt by
                default.
            candidates (`list[str]`, *optional*): texts to choose from.
            window, stride (`int`, *optional*): frames of a window, and from one window's start to
                the next; default to the video processor's `num_frames` and half of it.
            fps (`float`, *optional*): frames read per second; all by default.
            live (`bool`, *optional*): with `True` a slow reader loses frames, with `False` the
                source waits; `True` for cameras and addresses by default.
            allow_urls (`bool`, *optional*, defaults to `False`): open addresses.
            segmenter_kwargs (`dict`, *optional*): arguments of `OnlineSegmenter`, its thresholds
                and decode limits.
            generate_kwargs (`dict`, *optional*): arguments of `generate`.
        """
        watched = given(window=window, stride=stride, fps=fps, live=live, allow_urls=allow_urls)
        asked = given(
            query=query,
            candidates=candidates,
            segmenter_kwargs=segmenter_kwargs,
            generate_kwargs=generate_kwargs,
        )
        return watched, asked, {}

    def preprocess(self, source: Any, **options: Any) -> Any:
        """Return the source as windows of frames, a `WindowStream`."""
        return self.processor.watch(source, **options)

    def captions(self, windows: Any, session: StreamSession) -> Iterator[dict[str, Any]]:
        with windows:
            for segment in self._forward(windows, session):
                yield self.postprocess(segment)

    def _forward(self, windows: Iterable[FrameWindow], session: StreamSession) -> Iterator[Segment]:
        return session.run(windows)

    def postprocess(self, segment: Segment) -> dict[str, Any]:
        return {
            "start": segment.start_time,
            "end": segment.end_time,
            "text": segment.text,
            "confidence": segment.confidence,
        }

    def session(
        self,
        *,
        query: str | None = None,
        candidates: Iterable[str] | None = None,
        segmenter_kwargs: dict[str, Any] | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        batch_size: int = 1,
    ) -> StreamSession:
        """Return a new session; the arguments are those of a call."""
        session = StreamSession(
            self.model,
            self.processor,
            query=query,
            segmenter=OnlineSegmenter(**segmenter_kwargs or {}),
            batch_size=batch_size,
        )
        if candidates is not None:
            if generate_kwargs is not None:
                raise ValueError(
                    "generate_kwargs is for a decoder, but texts are chosen from candidates: leave "
                    "it out."
                )
            session.decode = self.chooser(session, check_texts("candidates", candidates))
        elif self.has_decoder:
            session.decode = Writer(self, session.encoder.prompt, generate_kwargs or {})
        else:
            raise ValueError(
                "candidates is missing, and this model has no Y-Decoder to write a text: give "
                "candidates=[...], or train a decoder with `python -m training.train_decoder`."
            )
        return session

    def chooser(
        self, session: StreamSession, texts: list[str]
    ) -> Callable[[torch.Tensor], list[str]]:
        """Return a function that maps embeddings `(B, D)` to their nearest texts."""
        text_embeds = session.encoder.embed_texts(texts)  # (N, D)
        return lambda embeds: [
            texts[index] for index in (embeds @ text_embeds.T).argmax(1).tolist()
        ]

    def stream(
        self,
        source: Any,
        query: str | None = None,
        window: int | None = None,
        stride: int | None = None,
        **options: Any,
    ) -> Iterator[EmbeddedWindow]:
        """Yield the embeddings of a source's windows; `options` are those of [`stream`]."""
        return stream(self.model, self.processor, source, query, window, stride, **options)


__all__ = ["CaptionStream", "VLJEPAStreamingCaptionPipeline"]
