"""transformers' own common tests, run on the processor and the video processor.

They come from the source distribution of the installed version, as those of the model do
(`tests/model/test_common.py`). `SKIPPED` has the reason of each test that does not fit.
"""

import sys
import unittest
from types import ModuleType
from unittest.mock import patch

import numpy as np
from transformers.processing_utils import MODALITY_TO_AUTOPROCESSOR_MAPPING

import processing
from processing import VLJEPAProcessor, VLJEPAVideoProcessor
from tests.fetch_common import upstream
from tests.tiny import tiny_tokenizer

# A module of transformers' own CI, with which it stores files of the Hub.
hub_objects = ModuleType("fetch_hub_objects_for_ci")
hub_objects.url_to_local_path = lambda url: url
with patch.dict(sys.modules, fetch_hub_objects_for_ci=hub_objects):
    processor_tests = upstream("test_processing_common")
video_tests = upstream("test_video_processing_common")

TURNS = "apply_chat_template takes one user turn: the Predictor reads one question"
SKIPPED = {
    "test_chat_template_jinja_kwargs": TURNS,
    "test_apply_chat_template_assistant_mask": TURNS,
    "test_apply_chat_template_decoded_video_0": TURNS,
    "test_apply_chat_template_video_0": TURNS,
    "test_apply_chat_template_video_1": TURNS,
    "test_apply_chat_template_video_frame_sampling": "needs the Hub, and sampling by fps",
    "test_call_numpy_4_channels": "pixels are RGB; input_data_format is refused: layouts are fixed",
    "test_call_sample_frames": "fps and video_metadata are refused; short clips repeat frames",
    "test_video_processor_from_dict_with_kwargs": "an int `size` squashes, as in transformers",
    "test_video_processor_save_load_with_autovideoprocessor": "needs torchvision",
}


def skip(name: str) -> None:
    if name in SKIPPED:
        raise unittest.SkipTest(SKIPPED[name])


class VLJEPAProcessorTest(processor_tests.ProcessorTesterMixin, unittest.TestCase):
    processor_class = VLJEPAProcessor

    @classmethod
    def _setup_video_processor(cls):
        return VLJEPAVideoProcessor(crop_size=32)

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer()

    @classmethod
    def _setup_target_tokenizer(cls):
        return tiny_tokenizer(eos=True)

    def setUp(self):
        skip(self._testMethodName)
        # AutoVideoProcessor raises without torchvision, which this project does not need.
        names = type(MODALITY_TO_AUTOPROCESSOR_MAPPING)._MAPPING_NAMES
        ours = patch.dict(names, video_processor=(processing.__name__, "VLJEPAVideoProcessor"))
        self.addCleanup(ours.stop)
        ours.start()

    def prepare_videos_inputs(self, batch_size: int | None = None):
        """Return upstream's clips, 8 frames of 30 x 400, with arrays in this project's layout."""
        clips = super().prepare_videos_inputs(batch_size)
        if batch_size is None:
            return np.moveaxis(clips, 1, -1)
        return [np.moveaxis(clip, 1, -1) for clip in clips]

    def prepare_images_inputs(self, batch_size: int | None = None, nested: bool = False):
        """Return no images: upstream gives them together with videos."""
        return None


class Tester:
    """The attributes and methods that `VideoProcessingTestMixin` reads."""

    batch_size = 5
    num_frames = 8
    num_channels = 3

    def expected_output_video_shape(self, videos):
        return self.num_frames, self.num_channels, 18, 18

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return video_tests.prepare_video_inputs(
            batch_size=self.batch_size,
            num_frames=self.num_frames,
            num_channels=self.num_channels,
            min_resolution=30,
            max_resolution=80,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )


class VLJEPAVideoProcessorTest(video_tests.VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = VLJEPAVideoProcessor
    test_cast_dtype = True
    video_processor_dict = {
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 18, "width": 18},
    }

    def setUp(self):
        skip(self._testMethodName)
        super().setUp()
        self.video_processor_tester = Tester()


def test_skipped_tests_of_transformers_exist():
    """A reason for a test that upstream has renamed would hide nothing, but mislead."""
    tests = {*dir(VLJEPAProcessorTest), *dir(VLJEPAVideoProcessorTest)}
    assert set(SKIPPED) <= tests
