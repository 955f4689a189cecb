"""transformers' own common model tests, run on VLJEPAModel.

They come from the source distribution of the installed version. `make env` fetches them
(`python -m tests.fetch_common`); this repository holds no copy.
"""

import unittest
from unittest import mock

import pytest
import torch

from modeling_vljepa import (
    PerceptionEncoderVisionConfig,
    PerceptionEncoderVisionModel,
    VJEPA21Config,
    VJEPA21Model,
    VLJEPAConfig,
    VLJEPAModel,
)
from tests.fetch_common import upstream
from tests.tiny import PERCEPTION, tiny_batch, tiny_config

pytestmark = pytest.mark.slow  # half a minute
MODELING = upstream("test_modeling_common")
ModelTesterMixin = MODELING.ModelTesterMixin
ConfigTester = upstream("test_configuration_common").ConfigTester


def set_known_epsilons(config: VLJEPAConfig) -> None:
    """Set the norms' epsilons to 1, as `set_config_for_less_flaky_test` of transformers does.

    It gives every configuration all names of epsilons that any model has, and an X-Encoder refuses
    settings that it would ignore.
    """
    for each in (config.vision_config, config.predictor_config, config.text_config):
        for name in ("rms_norm_eps", "layer_norm_eps"):
            if name in type(each).__dataclass_fields__:
                setattr(each, name, 1.0)


class Tester:
    """The attributes and methods that `ModelTesterMixin` reads."""

    is_training = True
    batch_size = 3
    seq_length = 8 + 5  # visual tokens and query
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def get_config(self):
        return tiny_config(freeze_vision=False)  # a frozen X-Encoder would record no graph

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {**tiny_batch(), "return_loss": True}


class VLJEPAModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (VLJEPAModel,)
    _is_composite = True

    def setUp(self):
        self.enterContext(
            mock.patch.object(MODELING, "set_config_for_less_flaky_test", set_known_epsilons)
        )
        self.model_tester = Tester()
        self.config_tester = ConfigTester(
            self,
            config_class=VLJEPAConfig,
            has_text_modality=False,
            common_properties=["embedding_dim"],
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def _text_features_prepare_config_and_inputs(self):
        config, batch = self.model_tester.prepare_config_and_inputs_for_common()
        names = {"input_ids": "target_input_ids", "attention_mask": "target_attention_mask"}
        return config, {name: batch[target] for name, target in names.items()}

    def _image_features_prepare_config_and_inputs(self):
        config, batch = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {"pixel_values": batch["pixel_values_videos"][:, 0]}

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Add query tokens to inputs with a mask: some tests give the main input and a mask only,
        but the mask belongs to the query."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        mask = inputs.get("attention_mask")
        if mask is not None and "input_ids" not in inputs:
            generator = torch.Generator().manual_seed(0)
            inputs["input_ids"] = torch.randint(3, 300, mask.shape, generator=generator)
        return inputs


class VJEPA21Tester:
    """As `Tester`, for the encoder alone."""

    is_training = False  # it has no loss; test_vjepa21.py compares gradients
    batch_size = 3
    seq_length = 8
    hidden_size = 48
    num_hidden_layers = 2
    num_attention_heads = 4

    def get_config(self):
        return VJEPA21Config(
            crop_size=32, hidden_size=48, num_hidden_layers=2, num_attention_heads=4
        )

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values_videos": tiny_batch()["pixel_values_videos"]}


class VJEPA21ModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (VJEPA21Model,)
    test_resize_embeddings = False  # it has no table of tokens

    def setUp(self):
        self.model_tester = VJEPA21Tester()
        self.config_tester = ConfigTester(self, config_class=VJEPA21Config, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        self.skipTest("the stem is a convolution, not a table of tokens")

    def test_inputs_embeds(self):
        self.skipTest("it reads pixels only")


class PerceptionEncoderTester:
    """As `Tester`, for the image tower alone."""

    is_training = False  # it has no loss; test_perception_encoder.py compares gradients
    batch_size = 3
    seq_length = 4 + 1  # patches and the class token
    hidden_size = 48
    num_hidden_layers = 2
    num_attention_heads = 4

    def get_config(self):
        return PerceptionEncoderVisionConfig(**PERCEPTION)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": tiny_batch()["pixel_values_videos"][:, 0]}


class PerceptionEncoderVisionModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (PerceptionEncoderVisionModel,)
    test_resize_embeddings = False  # it has no table of tokens

    def setUp(self):
        self.model_tester = PerceptionEncoderTester()
        self.config_tester = ConfigTester(
            self, config_class=PerceptionEncoderVisionConfig, has_text_modality=False
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        self.skipTest("the stem is a convolution, not a table of tokens")

    def test_inputs_embeds(self):
        self.skipTest("it reads pixels only")
