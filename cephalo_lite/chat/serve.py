"""`cephalo-serve`: transformers' OpenAI-compatible server, which knows our models too.

    cephalo-serve my-mixture --port 8000

serves `/v1/chat/completions` and what else `transformers serve` offers; all of its options are
taken. It listens on this machine only, unless `--host` says otherwise. A client names the model by
the path that was served. Started without a path, the server loads whatever model a client names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from transformers import PretrainedConfig

LOOPBACK = "127.0.0.1"


def register_for_serving() -> None:
    """Let transformers' server find our classes, and the names that released files have for them.

    The server takes a class by its name from the `transformers` module, and asks tables of names
    whether it reads pictures.
    """
    import transformers  # here, not above: an earlier binding may be another object
    from transformers.models.auto import modeling_auto

    from ..moe import Phi3VMoeForCausalLM
    from ..phi3v import Phi3VForCausalLM
    from ..quantize.models import SequentialPhi3VMoeForCausalLM, SequentialPhimoeForCausalLM

    sees = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    for seeing in (Phi3VForCausalLM, Phi3VMoeForCausalLM, SequentialPhi3VMoeForCausalLM):
        sees[seeing.__name__] = seeing.__name__
    mixture = by_quantization(Phi3VMoeForCausalLM, SequentialPhi3VMoeForCausalLM)
    text_mixture = by_quantization(transformers.PhimoeForCausalLM, SequentialPhimoeForCausalLM)
    for name, served in {
        "Phi3VForCausalLM": Phi3VForCausalLM,
        "Phi3VMoeForCausalLM": mixture,
        "Phi3VForCausalLMMoE": mixture,  # as the published mixtures say
        "PhimoeForCausalLM": text_mixture,
        "PhiMoEForCausalLM": text_mixture,  # as the released Phi-3.5-MoE says
    }.items():
        setattr(transformers, name, served)


def by_quantization(fused: type, sequential: type) -> type:
    """Something to load a mixture with: experts one by one where they are in 4 bits, else fused.

    transformers leaves fused experts unquantised without a word, and cannot read packed ones.

    Args:
        fused: the class for unquantised weights.
        sequential: the class for quantised ones.
    """

    class Either:
        @staticmethod
        def from_pretrained(source: str, **options):
            stored, _ = PretrainedConfig.get_config_dict(source, revision=options.get("revision"))
            packed = options.get("quantization_config") or stored.get("quantization_config")
            return (sequential if packed else fused).from_pretrained(source, **options)

    return Either


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line.

    Args:
        arguments: those of `transformers serve`; None takes the process's own.

    Raises:
        SystemExit: when the server stops, or where the packages of the extra `serve` are missing.
    """
    from transformers.utils.import_utils import is_serve_available

    given = list(sys.argv[1:] if arguments is None else arguments)
    if not is_serve_available():
        raise SystemExit('cephalo-serve needs more packages: pip install "cephalo_lite[serve]"')
    if not any(word.split("=")[0] == "--host" for word in given):
        given += ["--host", LOOPBACK]
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.cli.transformers import app

    os.makedirs(HF_HUB_CACHE, exist_ok=True)  # /v1/models fails where it is missing
    register_for_serving()
    app(["serve", *given], prog_name="cephalo-serve")


if __name__ == "__main__":
    main()
