"""What goes in: files, frames and strings to the tensors of a VL-JEPA model."""

from .processing_vljepa import VLJEPAProcessor as VLJEPAProcessor
from .rows import BadRow as BadRow
from .rows import bad_rows_report as bad_rows_report
from .rows import read_rows as read_rows
from .streaming import FrameStream as FrameStream
from .streaming import StreamReport as StreamReport
from .streaming import Window as Window
from .streaming import WindowStream as WindowStream
from .streaming import windows as windows
from .video_io import Clip as Clip
from .video_io import Excerpt as Excerpt
from .video_io import MediaError as MediaError
from .video_io import even_indices as even_indices
from .video_io import read_clip as read_clip
from .video_io import read_image as read_image
from .video_io import uniform_indices as uniform_indices
from .video_processing_vljepa import VLJEPAVideoProcessor as VLJEPAVideoProcessor

VLJEPAProcessor.register_for_auto_class()
VLJEPAVideoProcessor.register_for_auto_class("AutoVideoProcessor")
