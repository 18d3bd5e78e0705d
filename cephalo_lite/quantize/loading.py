"""From a checkpoint to a model in 4 bits, matrix by matrix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Phi3ForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..loading import check_fit, default_device, pick_attention, prepare
from ..moe.build.sources import resolve_folder
from ..phi3v import Phi3VForCausalLM, Phi3VProcessor
from ..phi3v.checkpoints import StrictLoading
from .cpu_guard import guard_cpu
from .cpu_linear import use_cpu_linear
from .models import SequentialPhi3VMoeForCausalLM, SequentialPhimoeForCausalLM
from .preflight import check_weights
from .sizes import SKIPPED, is_4bit

CLASSES: dict[str, type[PreTrainedModel]] = {  # model type → the class that is quantised
    "phi3": Phi3ForCausalLM,
    "phimoe": SequentialPhimoeForCausalLM,
    "phi3_v": Phi3VForCausalLM,
    "phi3_v_moe": SequentialPhi3VMoeForCausalLM,
}
VISION = ("phi3_v", "phi3_v_moe")


def load_4bit(
    model_id_or_path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    attn_implementation: str = "auto",
    progress: bool = True,
) -> tuple[PreTrainedModel, Any]:
    """Load a model with every large matrix in NF4 with double quantisation, experts included.

    In half precision stay embeddings, head, norms, routers and, of the vision models, the whole
    tower and projector. Each matrix is quantised as it is read, so at no time is more than one of
    them in memory unquantised. All weights are frozen: add adapters, or unfreeze groups, to train.

    Args:
        model_id_or_path: a Phi-3, Phi-3.5-MoE, Phi-3-Vision or mixture of these: a folder, or a hub
            id (`owner/name`, `owner/name@revision`); or what `convert_4bit` made of one.
        dtype: of what is not quantised, and of the computation.
        device: None is the first CUDA GPU, or the CPU where there is none.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ..., or "auto"; see
            `pick_attention`.
        progress: show transformers' progress bar.

    Returns:
        The model in eval mode, and its tokenizer (text) or processor (vision).

    Raises:
        FileNotFoundError: no such folder, or no config.json or weights in it.
        ValueError: another kind of model, one quantised otherwise, or weights that do not fit.
        PreflightError: something large was not quantised after all.

    Source: QLoRA (arXiv 2305.14314); bitsandbytes' `Linear4bit`.
    """
    folder = resolve_folder(model_id_or_path)
    published = read_config(folder)
    kind = model_kind(published, folder)
    model_class = CLASSES[kind]
    config = model_class.config_class.from_dict(_without_code(published, kind, dtype))
    if kind in VISION:
        reader = Phi3VProcessor.from_pretrained(folder, local_files_only=True)
        if published.get("image_token_id") is None:
            config.image_token_id = reader.image_token_id  # published files do not say it
        check_fit(config, reader)
    else:
        reader = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if device is None:
        device = default_device()
    if attn_implementation == "auto":
        attn_implementation = pick_attention(device, dtype)
    is_converted = "quantization_config" in published
    with _progress_bar(progress):
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map={"": torch.device(device)},
            attn_implementation=attn_implementation,
            local_files_only=True,
            output_loading_info=True,
            **({} if is_converted else {"quantization_config": nf4_config(dtype)}),
        )
    problems = StrictLoading._loading_problems(info)
    if problems:
        raise ValueError(f"{folder} does not fit {model_class.__name__}: {problems}")
    if is_converted:
        _forget_unpacking(model)
        for parameter in model.parameters():  # they come as they were stored
            if parameter.is_floating_point() and not is_4bit(parameter):
                parameter.data = parameter.data.to(dtype)
    if kind in VISION:
        prepare(model, reader)
    guard_cpu(model)
    use_cpu_linear(model)
    check_weights(model)
    return model.requires_grad_(False).eval(), reader


def _forget_unpacking(model: PreTrainedModel) -> None:
    """Let a model that was read in 4 bits be saved.

    transformers 5.23 keeps the rules by which it was read, to turn them round in `save_pretrained`,
    and that of packed weights cannot be turned (NotImplementedError). Their names are right as is.
    """
    from transformers.integrations.bitsandbytes import Bnb4bitDeserialize

    model._weight_conversions = [
        rule
        for rule in model._weight_conversions or []
        if not any(isinstance(op, Bnb4bitDeserialize) for op in getattr(rule, "operations", ()))
    ]


def nf4_config(dtype: torch.dtype):
    """The `BitsAndBytesConfig` of NF4 with double quantisation.

    `llm_int8_skip_modules`, whose name is older than 4 bits, says what is not quantised; written
    out, because releases of transformers differ in what they leave out by themselves.

    Args:
        dtype: of the computation.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(SKIPPED),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder.

    Raises:
        FileNotFoundError: there is none.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is no checkpoint.")
    return json.loads((folder / "config.json").read_text("utf-8"))


def model_kind(published: dict[str, Any], folder: Path) -> str:
    """The model type, by which the class is chosen.

    Raises:
        ValueError: none that is quantised here, or quantised in another way already.
    """
    kind = published.get("model_type")
    if kind == "phi3_v" and "num_expert_models" in published:
        kind = "phi3_v_moe"  # mixtures of 2024 call themselves dense
    if kind not in CLASSES:
        raise ValueError(
            f"{folder} is a {kind or 'model of no known type'}; read here are {', '.join(CLASSES)}."
        )
    stored = published.get("quantization_config")
    if stored is not None and not (
        stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_type") == "nf4"
    ):
        raise ValueError(
            f"{folder} is quantised already, but not in NF4 by bitsandbytes "
            f"({stored.get('quant_method', 'no method named')}): load the unquantised checkpoint."
        )
    return kind


def _without_code(published: dict[str, Any], kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration without pointers to remote code; a converted one computes in `dtype`."""
    fields = {key: value for key, value in published.items() if key != "auto_map"}
    if "quantization_config" in fields:
        compute = {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
        fields["quantization_config"] = fields["quantization_config"] | compute
    return fields | {"model_type": kind}


@contextmanager
def _progress_bar(shown: bool) -> Iterator[None]:
    """Within this context transformers shows its bar, or not; then what was set before holds."""
    before = transformers_logging.is_progress_bar_enabled()
    _show_progress(shown)
    try:
        yield
    finally:
        _show_progress(before)


def _show_progress(shown: bool) -> None:
    if shown:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
