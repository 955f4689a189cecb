"""Check uploads before they are decoded; every refusal is a sentence for the user."""

from html import escape
from pathlib import Path

import av
import gradio as gr
from PIL import Image, UnidentifiedImageError
from transformers import ProcessorMixin

from processing.containers import gap_before, video_stream
from processing.images import open_image

# Limits of an upload. Each is checked before a frame is decoded.
MAX_MEGABYTES = 50
MAX_SECONDS = 120
MAX_FRAMES = 60 * MAX_SECONDS
MAX_VIDEO_PIXELS = 4096 * 2304  # per frame
MAX_IMAGE_PIXELS = 50_000_000

# A list of formats, because FFmpeg also opens playlists, which name other files and addresses, and
# renders text files as terminal art.
IMAGE_FORMATS = ("AVIF", "BMP", "JPEG", "PNG", "WEBP")
VIDEO_FORMATS = "mov,matroska,avi,gif,mpegts,ogg"


def examine(path: str | Path) -> str:
    """Return the processor's argument for a file, `"images"` or `"videos"`; decode nothing.

    Raises: `gr.Error` for a file that is neither, or that exceeds a limit.
    """
    path = Path(path)
    name = escape(path.name)
    if not path.is_file():
        raise user_error(f"{name} was deleted: uploads are stored for an hour. Upload it again.")
    megabytes = path.stat().st_size / 1e6
    if megabytes > MAX_MEGABYTES:
        raise user_error(
            f"{name} has {megabytes:.0f} MB; the limit is {MAX_MEGABYTES} MB. "
            "Cut it, or save it smaller."
        )
    try:
        with open(path, "rb") as file, open_image(file, IMAGE_FORMATS) as image:
            check_pixels(name, image.size, MAX_IMAGE_PIXELS)
        return "images"
    except UnidentifiedImageError:
        pass  # then it must be a video
    except (OSError, Image.DecompressionBombError) as error:
        raise unreadable(name) from error
    try:
        with opened(path) as container:
            stream = video_stream(container, name, lambda: opened(path))
            check_pixels(name, (stream.width, stream.height), MAX_VIDEO_PIXELS)
            frames, seconds = measure(stream)
    except (av.FFmpegError, ValueError) as error:  # ValueError includes MediaError
        raise unreadable(name) from error
    if seconds > MAX_SECONDS:
        raise user_error(
            f"{name} lasts {seconds:.0f} seconds; the limit is {MAX_SECONDS} seconds. "
            "Cut out the part that you want to ask about."
        )
    if frames > MAX_FRAMES:
        raise user_error(
            f"{name} has {frames} frames; the limit is {MAX_FRAMES} frames. "
            "Save it with fewer frames per second."
        )
    return "videos"


def seconds_of(path: str | Path) -> float:
    """Return the length of a video that `examine` accepted."""
    with opened(path) as container:
        return measure(video_stream(container, Path(path).name, lambda: opened(path)))[1]


def opened(path: str | Path) -> "av.container.InputContainer":
    return av.open(path, options={"format_whitelist": VIDEO_FORMATS})


def measure(stream: "av.VideoStream") -> tuple[int, float]:
    """Count frames and seconds from the packets: the header's numbers may be absent or wrong."""
    frames, first, last = 0, float("inf"), float("-inf")
    for packet in stream.container.demux(stream):
        if packet.size:  # the last packet is empty: it flushes the decoder
            frames += 1
            time = packet.dts if packet.pts is None else packet.pts
            first, last = min(first, time or 0), max(last, (time or 0) + (packet.duration or 0))
    if not frames:
        return 0, 0.0
    # The player's clock begins with the file, which may be before the first picture.
    gap = gap_before(stream, float(first * stream.time_base))
    return frames, gap + float((last - first) * stream.time_base)


def check_pixels(name: str, size: tuple[int, int], limit: int) -> None:
    """Raise `gr.Error` if a picture has more pixels than `limit`."""
    if size[0] * size[1] > limit:
        raise user_error(
            f"{name} has {size[0]} x {size[1]} pixels; the limit is {limit / 1e6:.0f} million. "
            "Save it smaller."
        )


def user_error(sentence: str) -> gr.Error:
    """Return an error that the browser shows and that is not logged as a fault of the app."""
    return gr.Error(sentence, print_exception=False)


def unreadable(name: str) -> gr.Error:
    """Return the error for a file that cannot be decoded."""
    return user_error(
        f"{name} cannot be read: it is not a video or an image, or it is damaged. "
        "Save it again, for example as MP4 or PNG, and upload the new file."
    )


def read(processor: ProcessorMixin, path: str | Path, **texts: str) -> dict:
    """Return the processor's batch of one file. Raises: `gr.Error`, also for damaged packets."""
    kind = examine(path)
    try:
        return processor(**{kind: str(path)}, **texts)
    except ValueError as error:  # includes the processor's MediaError
        raise unreadable(escape(Path(path).name)) from error


def uploads_only(file: gr.File) -> None:
    """Make a file field refuse addresses: gradio would download them, whatever their size."""
    move = file.async_move_resource_to_block_cache

    async def move_file(path: str | Path | None) -> str | None:
        if str(path).startswith(("http:", "https:")):
            raise user_error("This app does not download from addresses: upload a file.")
        return await move(path)

    file.async_move_resource_to_block_cache = move_file
