"""The model's input: files, frames and strings to tensors."""

from .frame_stream import FrameStream as FrameStream
from .frame_stream import StreamReport as StreamReport
from .processing_vljepa import VLJEPAProcessor as VLJEPAProcessor
from .rows import BadRow as BadRow
from .rows import bad_rows_report as bad_rows_report
from .rows import read_rows as read_rows
from .video_io import Clip as Clip
from .video_io import Excerpt as Excerpt
from .video_io import MediaError as MediaError
from .video_io import even_indices as even_indices
from .video_io import read_clip as read_clip
from .video_io import read_image as read_image
from .video_io import uniform_indices as uniform_indices
from .video_processing_vljepa import VLJEPAVideoProcessor as VLJEPAVideoProcessor

# The one place of the version: modeling_vljepa imports it, pyproject.toml reads this line. The
# metadata of an installation is missing in a clone, or is that of an older clone.
__version__ = "0.1.0"
from .windows import Window as Window
from .windows import WindowStream as WindowStream
from .windows import windows as windows

VLJEPAProcessor.register_for_auto_class()
VLJEPAVideoProcessor.register_for_auto_class("AutoVideoProcessor")
