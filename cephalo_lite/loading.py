"""From a checkpoint to a model and its processor that fit each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from .moe import Phi3VMoeForCausalLM
from .phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor

STOP_MARKS = ("<|end|>", "<|endoftext|>")  # what ends an answer in Phi-3's chats
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
DENSE, MIXTURE = "phi3_v", "phi3_v_moe"


def load(
    path_or_id: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str = "auto",
    **kwargs: Any,
) -> tuple[Phi3VForCausalLM | Phi3VMoeForCausalLM, Phi3VProcessor]:
    """Load a Phi-3-Vision or a mixture, ready to answer, with its processor.

    Args:
        path_or_id: a checkpoint folder (never looks at the network) or the name of a hub
            repository.
        dtype: of the weights; None is float32 on a CPU, and the checkpoint's own elsewhere.
        device: None is the first CUDA GPU, or the CPU where there is none.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ..., or "auto"; see
            `pick_attention`.
        kwargs: further options of `from_pretrained`, such as `revision`, `device_map`,
            `quantization_config`, or fields of the configuration.

    Returns:
        The model in eval mode, which stops at `<|end|>` and `<|endoftext|>`, and the processor.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the checkpoint is of another kind, its weights are incomplete, or model and
            processor do not fit each other.

    Example:
        >>> model, processor = load("my-mixture")  # doctest: +SKIP
        >>> ask(model, processor, "What is shown?", images="fibres.png").text  # doctest: +SKIP
    """
    source = _source(path_or_id)
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    if Path(source).is_dir():
        hub["local_files_only"] = True
    published, _ = PretrainedConfig.get_config_dict(source, **hub)
    model_class = _model_class(published, source)
    fields = {**published, "model_type": model_class.config_class.model_type}
    config, rest = model_class.config_class.from_dict(fields, return_unused_kwargs=True, **kwargs)
    processor = Phi3VProcessor.from_pretrained(source, **hub)
    if kwargs.get("image_token_id", published.get("image_token_id")) is None:
        config.image_token_id = processor.image_token_id  # published files do not say it
    check_fit(config, processor)
    device, place = _place(device, rest)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else "auto"
    if attn_implementation == "auto":
        asked = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        attn_implementation = pick_attention(device, asked or getattr(config, "dtype", None))
    model = model_class.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        **hub,
        **place,
        **rest,
    )
    prepare(model, processor)
    return model.eval(), processor


def check_fit(config: Phi3VConfig, processor: Phi3VProcessor) -> None:
    """Check that a processor makes what a model reads.

    Raises:
        ValueError: vocabulary, image token, crop size or tokens per crop differ.
    """
    highest = max(processor.tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer writes ids up to {highest}, the model reads ids below "
            f"{config.vocab_size} (vocab_size): load the tokenizer of this model, or "
            "call model.resize_token_embeddings."
        )
    if config.image_token_id != processor.image_token_id:
        raise ValueError(
            f"<|image|> is {processor.image_token_id} in the tokenizer, and the model looks for "
            f"{config.image_token_id} (image_token_id): correct image_token_id in config.json."
        )
    pictures, tower = processor.image_processor, config.vision_config
    if pictures.crop_size != tower.image_size:
        raise ValueError(
            f"The processor cuts crops of {pictures.crop_size} pixels, the vision tower reads "
            f"{tower.image_size}: set crop_size to it in the preprocessor's configuration."
        )
    if pictures.num_img_tokens != config.image_tokens_per_crop:
        raise ValueError(
            f"The processor counts {pictures.num_img_tokens} tokens a crop, the model makes "
            f"{config.image_tokens_per_crop}: set num_img_tokens to it in "
            "the preprocessor's configuration."
        )


def pick_attention(device: str | torch.device, dtype: torch.dtype | str | None) -> str:
    """FlashAttention 2 where it can run, else "sdpa".

    It needs its package, an Ampere or later GPU, and weights in half precision.

    Args:
        device: where the model will be.
        dtype: of its weights; None where that is not known, which picks "sdpa".
    """
    from transformers.utils import is_flash_attn_2_available

    device = torch.device(device)
    name = str(dtype).removeprefix("torch.")
    if device.type != "cuda" or name not in ("float16", "bfloat16"):
        return "sdpa"
    if torch.cuda.get_device_capability(device)[0] < 8 or not is_flash_attn_2_available():
        return "sdpa"
    return "flash_attention_2"


def stop_ids(model, processor: Phi3VProcessor) -> list[int]:
    """Ids that end an answer: the generation configuration's, `<|end|>` and `<|endoftext|>`."""
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    vocabulary = processor.tokenizer.get_vocab()
    marks = [vocabulary[mark] for mark in STOP_MARKS if mark in vocabulary]
    return sorted({stop for stop in known if stop < model.config.vocab_size} | set(marks))


def pad_id(model, processor: Phi3VProcessor) -> int:
    """The id that fills rows up: the tokenizer's, or else one that ends an answer."""
    own = processor.tokenizer.pad_token_id
    return stop_ids(model, processor)[-1] if own is None else own


def default_device() -> torch.device:
    """The GPU of this process if there is one, under torchrun its own; else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def prepare(model, processor: Phi3VProcessor) -> None:
    """Say where answers stop and what pads, and give both chat templates to one tokenizer."""
    model.generation_config.eos_token_id = stop_ids(model, processor)
    model.generation_config.pad_token_id = pad_id(model, processor)
    if processor.tokenizer.pad_token_id is None:
        pad = processor.tokenizer.convert_ids_to_tokens(pad_id(model, processor))
        processor.tokenizer.pad_token = pad
    if processor.tokenizer.chat_template is None:
        processor.tokenizer.chat_template = processor.chat_template


def _source(path_or_id: str | Path) -> str:
    """The folder, or the name of a repository; a missing folder is never looked up online."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return str(path)
    name = str(path_or_id)
    is_name = isinstance(path_or_id, str) and name.count("/") == 1 and name[0] not in "./~"
    if path.exists() or not is_name:
        raise FileNotFoundError(
            f"{name!r} is no folder on this machine. Pass a checkpoint folder, or a hub repository "
            "as 'owner/name'."
        )
    return name


def _model_class(published: dict[str, Any], source: str) -> type:
    """Dense or mixture; a mixture of 2024 may call itself dense, but it has a number of experts."""
    kind = published.get("model_type")
    if kind == MIXTURE or (kind == DENSE and "num_expert_models" in published):
        return Phi3VMoeForCausalLM
    if kind == DENSE:
        return Phi3VForCausalLM
    raise ValueError(
        f"{source} is a {kind or 'model of no known type'}; load reads Phi-3-Vision ({DENSE}) and "
        f"mixtures of it ({MIXTURE})."
    )


def _place(
    device: str | torch.device | None, rest: dict[str, Any]
) -> tuple[torch.device, dict[str, Any]]:
    """The device that dtype and attention are for, and what `from_pretrained` needs for it."""
    if rest.get("device_map") is not None:
        if device is not None:
            raise ValueError(f"Pass device={str(device)!r} or device_map, not both.")
        places = rest.pop("device_map")
        targets = places.values() if isinstance(places, dict) else [places]
        on_gpu = torch.cuda.is_available() and any(str(t) not in ("cpu", "disk") for t in targets)
        return torch.device("cuda" if on_gpu else "cpu"), {"device_map": places}
    if device is None:
        device = default_device()
    device = torch.device(device)
    return device, {} if device.type == "cpu" else {"device_map": {"": device}}
