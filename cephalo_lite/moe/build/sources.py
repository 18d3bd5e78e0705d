"""Dense Phi-3-Vision checkpoints as sources of a build: found, opened and compared."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ...shards import INDEX_FILE, TORCH_DTYPES, TensorInfo, read_checkpoint

MATRICES = ("gate_up_proj", "down_proj")  # of one MLP
# No code and no pickles are fetched.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]
SHARED_EMBEDDING = "model.vision_embed_tokens.wte.weight"  # the same storage as embed_tokens
COMPARED_FIELDS = {  # config field: what it is taken to be where a config does not name it
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "vocab_size": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": None,
    "original_max_position_embeddings": None,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class DenseCheckpoint:
    """A dense Phi-3-Vision checkpoint on the disk; no tensor is in memory."""

    name: str  # what the report and the errors call it
    folder: Path
    config: dict  # its config.json
    tensors: dict[str, TensorInfo]  # published names to their places

    def mlp(self, layer: int, matrix: str) -> TensorInfo:
        """Where one matrix of one layer's MLP lies."""
        return self.tensors[mlp_key(layer, matrix)]


def mlp_key(layer: int, matrix: str) -> str:
    """Name of an MLP matrix in a dense checkpoint."""
    return f"model.layers.{layer}.mlp.{matrix}.weight"


def resolve_folder(source: str | Path) -> Path:
    """Find the folder of a checkpoint, downloading it if `source` is a hub id.

    Args:
        source: a folder, or a hub id `owner/name`, with `owner/name@revision` for a certain
            revision. Of a hub repository only configuration, tokenizer and safetensors files are
            fetched, never code or pickles.

    Raises:
        FileNotFoundError: neither a folder nor a hub model that can be had.
    """
    if Path(source).is_dir():
        return Path(source)
    if not isinstance(source, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source):
        raise FileNotFoundError(f"no checkpoint folder {str(source)!r}")
    from huggingface_hub import snapshot_download

    repository, _, revision = source.partition("@")
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source!r} is no folder here and could not be had from the hub: {error}"
        ) from error
    return Path(folder)


def open_dense(name: str, source: str | Path) -> DenseCheckpoint:
    """Open a dense Phi-3-Vision checkpoint: read its configuration and where its tensors lie.

    Args:
        name: what to call it in messages, such as "base" or an expert's name.
        source: folder or hub id.

    Raises:
        FileNotFoundError: no such folder, no config.json, no safetensors weights or a missing
            shard.
        ValueError: a mixture of experts, a text-only or quantised model, or tensors missing.
    """
    folder = resolve_folder(source)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name}: {folder} has no config.json, so it is no checkpoint")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    found = read_checkpoint(folder)
    if "num_expert_models" in config or any(".mlp.experts." in key for key in found):
        raise ValueError(
            f"{name}: {folder} is a mixture of experts already; give the dense Phi-3-Vision "
            "checkpoint that it was built from"
        )
    tensors = {_published(key): info for key, info in found.items() if key != SHARED_EMBEDDING}
    if not any(key.startswith("model.vision_embed_tokens.") for key in tensors):
        raise ValueError(
            f"{name}: {folder} is a text-only checkpoint (no model.vision_embed_tokens.* tensors); "
            "a Phi-3-Vision checkpoint is needed"
        )
    checkpoint = DenseCheckpoint(name, folder, config, tensors)
    _check_complete(checkpoint)
    return checkpoint


def check_same_architecture(base: DenseCheckpoint, expert: DenseCheckpoint) -> None:
    """Refuse an expert whose MLPs do not fit into the base.

    Raises:
        ValueError: configuration fields, keys, shapes or dtypes differ; the message names the first
            of them.
    """
    for field, default in COMPARED_FIELDS.items():
        ours, theirs = base.config.get(field, default), expert.config.get(field, default)
        if ours != theirs and ours is not None and theirs is not None:
            raise ValueError(
                f"{expert.name}: {field} is {theirs}, but {ours} in {base.name}; experts and base "
                "must be fine-tunes of one model"
            )
    if _rope(base.config) != _rope(expert.config):
        raise ValueError(
            f"{expert.name}: its rotary position settings (rope_theta, rope_scaling) differ from "
            f"those of {base.name}; experts and base must be fine-tunes of one model"
        )
    missing = base.tensors.keys() - expert.tensors.keys()
    extra = expert.tensors.keys() - base.tensors.keys()
    if missing or extra:
        raise ValueError(
            f"{expert.name}: its tensors are not those of {base.name}: "
            f"missing {sorted(missing)[:3]}, not expected {sorted(extra)[:3]}"
        )
    for key, ours in base.tensors.items():
        theirs = expert.tensors[key]
        if theirs.shape != ours.shape:
            raise ValueError(
                f"{expert.name}: {key} has shape {list(theirs.shape)}, "
                f"but {list(ours.shape)} in {base.name}"
            )
        if theirs.dtype != ours.dtype and re.search(r"^model\.layers\.\d+\.mlp\.", key):
            raise ValueError(
                f"{expert.name}: {key} is {theirs.dtype}, but {ours.dtype} in {base.name}; tensors "
                "are copied bit by bit, so save both in one dtype first"
            )


def check_same_vocabulary(base: DenseCheckpoint, expert: DenseCheckpoint) -> None:
    """Refuse an expert whose tokenizer.json, if both have one, gives other ids than the base's.

    Raises:
        ValueError: the vocabularies differ; the message names the first differing token.
    """
    files = [source.folder / "tokenizer.json" for source in (base, expert)]
    if not all(file.is_file() for file in files):
        return
    ours, theirs = (_vocabulary(file) for file in files)
    if ours != theirs:
        token = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))[0]
        raise ValueError(
            f"{expert.name}: its vocabulary differs from that of {base.name}: token {token!r} has "
            f"id {theirs.get(token)} instead of {ours.get(token)}"
        )


def _published(key: str) -> str:
    """The published name; transformers 5's own tower lacks the `vision_model.` level."""
    tower = "model.vision_embed_tokens.img_processor."
    if key.startswith(tower) and not key.startswith(tower + "vision_model."):
        return tower + "vision_model." + key.removeprefix(tower)
    return key


def _check_complete(checkpoint: DenseCheckpoint) -> None:
    name, config, tensors = checkpoint.name, checkpoint.config, checkpoint.tensors
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers")
    fields = [field for field in needed if field not in config]
    if fields:
        raise ValueError(f"{name}: config.json lacks {', '.join(fields)}")
    width, inner = config["hidden_size"], config["intermediate_size"]
    expected = {"gate_up_proj": (2 * inner, width), "down_proj": (width, inner)}  # (2F, D), (D, F)
    wanted = ["model.embed_tokens.weight", "model.norm.weight"]
    if not config.get("tie_word_embeddings", False):
        wanted.append("lm_head.weight")
    first = {k.removeprefix("model.layers.0.") for k in tensors if k.startswith("model.layers.0.")}
    first |= {f"mlp.{matrix}.weight" for matrix in MATRICES}
    layers = range(config["num_hidden_layers"])
    wanted += [f"model.layers.{layer}.{part}" for layer in layers for part in sorted(first)]
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise ValueError(
            f"{name}: {checkpoint.folder} lacks {len(missing)} tensors, among them {missing[0]}; "
            f"the weights are incomplete (an old {INDEX_FILE}?) or of another architecture"
        )
    for layer in layers:
        for matrix, shape in expected.items():
            info = checkpoint.mlp(layer, matrix)
            if info.dtype not in TORCH_DTYPES:
                raise ValueError(
                    f"{name}: {mlp_key(layer, matrix)} is {info.dtype}: a quantised checkpoint; "
                    "give the float or bfloat16 one"
                )
            if info.shape != shape:
                raise ValueError(
                    f"{name}: {mlp_key(layer, matrix)} has shape {list(info.shape)}, "
                    f"but config.json says {list(shape)}"
                )


def _rope(config: dict) -> tuple:
    """Rotary settings in one form, from published fields or transformers 5's `rope_parameters`."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = config.get("rope_theta", scaling.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # one method, two names
    factors = (scaling.get("short_factor"), scaling.get("long_factor"))
    return float(theta), kind, factors


def _vocabulary(file: Path) -> dict[str, int]:
    tokenizer = json.loads(file.read_text("utf-8"))
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}
    return {**vocabulary, **added}
