"""SmolDriver: a six-camera driving vision-language model for transformers.

Importing this package registers the architecture with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .budgets_smoldriver import parse_budget
from .chat_smoldriver import CameraPrompts, chat_template_for, user_message
from .configuration_smoldriver import CAMERAS, SmolDriverConfig, SmolDriverProjectorConfig
from .image_processing_smoldriver import SmolDriverImageProcessor
from .loading_smoldriver import load, load_strictly, read_config
from .modeling_smoldriver import SmolDriverForConditionalGeneration, SmolDriverModel
from .processing_smoldriver import SmolDriverProcessor

AutoConfig.register("smoldriver", SmolDriverConfig)
AutoModel.register(SmolDriverConfig, SmolDriverModel)
AutoModelForImageTextToText.register(SmolDriverConfig, SmolDriverForConditionalGeneration)
AutoModelForMultimodalLM.register(SmolDriverConfig, SmolDriverForConditionalGeneration)
AutoImageProcessor.register(SmolDriverConfig, SmolDriverImageProcessor)
AutoProcessor.register(SmolDriverConfig, SmolDriverProcessor)

# So that save_pretrained puts the code beside the weights, and a saved folder loads anywhere.
SmolDriverConfig.register_for_auto_class()
SmolDriverModel.register_for_auto_class("AutoModel")
SmolDriverForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
SmolDriverImageProcessor.register_for_auto_class("AutoImageProcessor")
SmolDriverProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "CAMERAS",
    "CameraPrompts",
    "SmolDriverConfig",
    "SmolDriverForConditionalGeneration",
    "SmolDriverImageProcessor",
    "SmolDriverModel",
    "SmolDriverProcessor",
    "SmolDriverProjectorConfig",
    "chat_template_for",
    "load",
    "load_strictly",
    "parse_budget",
    "read_config",
    "user_message",
]
