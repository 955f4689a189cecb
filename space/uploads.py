"""What an upload may be, found out before it is decoded; every refusal is a sentence for people."""

from html import escape
from pathlib import Path

import av
import gradio as gr
from PIL import Image, UnidentifiedImageError
from transformers import ProcessorMixin

# What an upload may cost. All of it is known before a frame is decoded.
MAX_MEGABYTES = 50
MAX_SECONDS = 120
MAX_FRAMES = 60 * MAX_SECONDS
MAX_VIDEO_PIXELS = 4096 * 2304  # of one frame
MAX_IMAGE_PIXELS = 50_000_000

# FFmpeg also opens playlists, which name other files and addresses, and plays text as terminal art.
IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
VIDEO_FORMATS = "mov,matroska,avi,gif,mpegts,ogg"


def examine(path: str | Path) -> str:
    """Which argument of the processor a file is, `"images"` or `"videos"`, decoding nothing.

    Raises: `gr.Error` for a file that is none of them, or above a bound.
    """
    path = Path(path)
    name = escape(path.name)
    if not path.is_file():
        raise sorry("This file is gone: uploads are kept for an hour. Upload it again.")
    megabytes = path.stat().st_size / 1e6
    if megabytes > MAX_MEGABYTES:
        raise sorry(
            f"{name} has {megabytes:.0f} MB, and this app takes up to {MAX_MEGABYTES}. "
            "Cut it, or save it smaller."
        )
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            check_pixels(name, image.size, MAX_IMAGE_PIXELS)
        return "images"
    except UnidentifiedImageError:
        pass  # then it has to be a video
    except (OSError, Image.DecompressionBombError) as error:
        raise unreadable(name) from error
    try:
        with av.open(path, options={"format_whitelist": VIDEO_FORMATS}) as container:
            if not container.streams.video:
                raise unreadable(name)
            stream = container.streams.video[0]
            check_pixels(name, (stream.width, stream.height), MAX_VIDEO_PIXELS)
            frames, seconds = measure(container)
    except av.FFmpegError as error:
        raise unreadable(name) from error
    if seconds > MAX_SECONDS:
        raise sorry(
            f"{name} lasts {seconds:.0f} seconds, and this app takes up to {MAX_SECONDS}. "
            "Cut out the part that you want to ask about."
        )
    if frames > MAX_FRAMES:
        raise sorry(
            f"{name} has {frames} frames, and this app takes up to {MAX_FRAMES}. "
            "Save it with fewer frames per second."
        )
    return "videos"


def seconds_of(path: str | Path) -> float:
    """The length of a video that `examine` let through."""
    with av.open(path, options={"format_whitelist": VIDEO_FORMATS}) as container:
        return measure(container)[1]


def measure(container: "av.container.InputContainer") -> tuple[int, float]:
    """Frames and seconds by the packets that are there: a header may be absent or wrong."""
    stream = container.streams.video[0]
    frames, first, last = 0, float("inf"), float("-inf")
    for packet in container.demux(stream):
        if packet.size:
            frames += 1
            time = packet.dts if packet.pts is None else packet.pts
            first, last = min(first, time or 0), max(last, (time or 0) + (packet.duration or 0))
    return frames, float((last - first) * stream.time_base) if frames else 0.0


def check_pixels(name: str, size: tuple[int, int], limit: int) -> None:
    """Refuse pictures of more pixels than `limit`."""
    if size[0] * size[1] > limit:
        raise sorry(
            f"{name} is {size[0]} x {size[1]} pixels large, and this app takes up to "
            f"{limit / 1e6:.0f} million pixels. Save it smaller."
        )


def sorry(sentence: str) -> gr.Error:
    """An error for people: shown in the browser, and not logged as a fault of the app."""
    return gr.Error(sentence, print_exception=False)


def unreadable(name: str) -> gr.Error:
    return sorry(
        f"{name} cannot be read: it is no video or image, or it is damaged. "
        "Save it again, for example as MP4 or PNG, and upload that."
    )


def read(processor: ProcessorMixin, path: str | Path, **texts: str) -> dict:
    """The processor's batch of one file. Raises: `gr.Error`, also for damage inside of it."""
    kind = examine(path)
    try:
        return processor(**{kind: str(path)}, **texts)
    except ValueError as error:  # the processor's MediaError is one
        raise unreadable(escape(Path(path).name)) from error


def uploads_only(file: gr.File) -> None:
    """gradio would also fetch an address that stands for a file, of any size: refuse it."""
    move = file.async_move_resource_to_block_cache

    async def move_file(path: str | Path | None) -> str | None:
        if str(path).startswith(("http:", "https:")):
            raise sorry("Upload a file: this app fetches no addresses.")
        return await move(path)

    file.async_move_resource_to_block_cache = move_file
