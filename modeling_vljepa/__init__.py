"""VL-JEPA's public names, registered with `AutoConfig`, `AutoModel` and `AutoProcessor`."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from processing import VLJEPAProcessor
from processing import __version__ as __version__

from .configuration_vljepa import VLJEPAConfig as VLJEPAConfig
from .modeling_vljepa import LORA_MODULES_TO_SAVE as LORA_MODULES_TO_SAVE
from .modeling_vljepa import LORA_TARGET_MODULES as LORA_TARGET_MODULES
from .modeling_vljepa import VLJEPAForConditionalGeneration as VLJEPAForConditionalGeneration
from .modeling_vljepa import (
    VLJEPAForZeroShotImageClassification as VLJEPAForZeroShotImageClassification,
)
from .modeling_vljepa import VLJEPAModel as VLJEPAModel
from .modeling_vljepa import VLJEPAOutput as VLJEPAOutput
from .perception_encoder import PerceptionEncoderVisionConfig as PerceptionEncoderVisionConfig
from .perception_encoder import PerceptionEncoderVisionModel as PerceptionEncoderVisionModel
from .pipelines.decoding import decode_texts as decode_texts
from .pipelines.segmentation import OnlineSegmenter as OnlineSegmenter
from .pipelines.segmentation import Segment as Segment
from .pipelines.segmentation import WardSegmenter as WardSegmenter
from .pipelines.stream_session import StreamEncoder as StreamEncoder
from .pipelines.stream_session import StreamSession as StreamSession
from .pipelines.stream_session import stream as stream
from .token_model import VLJEPATokenConfig as VLJEPATokenConfig
from .token_model import VLJEPATokenModel as VLJEPATokenModel
from .vjepa21 import VJEPA21Config as VJEPA21Config
from .vjepa21 import VJEPA21Model as VJEPA21Model

# Registered here, because this file is not shipped to the Hub; shipped files only define classes.
AutoConfig.register("vljepa", VLJEPAConfig)
# `exist_ok`, because a later transformers may have models of the same names.
AutoConfig.register(VJEPA21Config.model_type, VJEPA21Config, exist_ok=True)
AutoConfig.register(
    PerceptionEncoderVisionConfig.model_type, PerceptionEncoderVisionConfig, exist_ok=True
)
AutoModel.register(VLJEPAConfig, VLJEPAModel)
AutoModelForZeroShotImageClassification.register(VLJEPAConfig, VLJEPAForZeroShotImageClassification)
AutoModelForImageTextToText.register(VLJEPAConfig, VLJEPAForConditionalGeneration)
AutoProcessor.register(VLJEPAConfig, VLJEPAProcessor)
AutoConfig.register(VLJEPATokenConfig.model_type, VLJEPATokenConfig)
AutoModel.register(VLJEPATokenConfig, VLJEPATokenModel)
AutoProcessor.register(VLJEPATokenConfig, VLJEPAProcessor)
VLJEPAConfig.register_for_auto_class()
VLJEPAModel.register_for_auto_class("AutoModel")
VLJEPAForZeroShotImageClassification.register_for_auto_class(
    "AutoModelForZeroShotImageClassification"
)
VLJEPAForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
VLJEPATokenConfig.register_for_auto_class()
VLJEPATokenModel.register_for_auto_class("AutoModel")
