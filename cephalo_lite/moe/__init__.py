"""Several Phi-3-Vision experts in one model."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from ..phi3v import Phi3VImageProcessor, Phi3VProcessor
from .checkpoints import register_published_names
from .configuration import Phi3VMoeConfig
from .modeling import MoeBlock, Phi3VMoeForCausalLM, Phi3VMoeModel
from .routing import ROUTERS, Router, RouterOutput, routers, select_expert


def register() -> None:
    """Teach transformers' Auto classes and its checkpoint reader the model type `phi3_v_moe`."""
    AutoConfig.register("phi3_v_moe", Phi3VMoeConfig, exist_ok=True)
    AutoModel.register(Phi3VMoeConfig, Phi3VMoeModel, exist_ok=True)
    AutoModelForCausalLM.register(Phi3VMoeConfig, Phi3VMoeForCausalLM, exist_ok=True)
    AutoModelForImageTextToText.register(Phi3VMoeConfig, Phi3VMoeForCausalLM, exist_ok=True)
    AutoImageProcessor.register(
        Phi3VMoeConfig, image_processor_classes={"pil": Phi3VImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(Phi3VMoeConfig, Phi3VProcessor, exist_ok=True)
    register_published_names()


__all__ = [
    "ROUTERS",
    "MoeBlock",
    "Phi3VMoeConfig",
    "Phi3VMoeForCausalLM",
    "Phi3VMoeModel",
    "Router",
    "RouterOutput",
    "register",
    "routers",
    "select_expert",
]
