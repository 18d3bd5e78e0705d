"""Phi-3-Vision, native to transformers 5."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from .checkpoints import register_published_names
from .configuration import Phi3VConfig
from .image_processing import Phi3VImageProcessor
from .modeling import Phi3VForCausalLM, Phi3VModel
from .processing import Phi3VProcessor


def register() -> None:
    """Teach transformers' Auto classes and its checkpoint reader the model type `phi3_v`."""
    AutoConfig.register("phi3_v", Phi3VConfig, exist_ok=True)
    AutoModel.register(Phi3VConfig, Phi3VModel, exist_ok=True)
    AutoModelForCausalLM.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
    AutoModelForImageTextToText.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
    AutoImageProcessor.register(
        Phi3VConfig, image_processor_classes={"pil": Phi3VImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(Phi3VConfig, Phi3VProcessor, exist_ok=True)
    # Published folders name LlamaTokenizer, which in transformers 5 rebuilds tokenizer.json.
    for model_type in ("phi3_v", "phi3_v_moe"):
        TOKENIZER_MAPPING_NAMES[model_type] = "TokenizersBackend"
    register_published_names()


__all__ = [
    "Phi3VConfig",
    "Phi3VForCausalLM",
    "Phi3VImageProcessor",
    "Phi3VModel",
    "Phi3VProcessor",
    "register",
]
