"""VL-JEPA, ready for `AutoConfig`, `AutoModel` and `AutoProcessor`."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from processing import VLJEPAProcessor

from .configuration_vljepa import VLJEPAConfig as VLJEPAConfig
from .modeling_vljepa import VLJEPAModel as VLJEPAModel
from .modeling_vljepa import VLJEPAOutput as VLJEPAOutput

AutoConfig.register("vljepa", VLJEPAConfig)
AutoModel.register(VLJEPAConfig, VLJEPAModel)
AutoProcessor.register(VLJEPAConfig, VLJEPAProcessor)
VLJEPAConfig.register_for_auto_class()
VLJEPAModel.register_for_auto_class("AutoModel")
