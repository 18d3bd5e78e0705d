"""What the gates see: hidden states at the routers, token by token, and whose they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from ..routing import routers, select_expert

KINDS = ("image", "prompt", "answer")
SOURCES = ("own", "mixture")  # or the name of an expert
Sample = tuple[Any, Any]  # (text or messages, pictures or None)


@dataclass
class GateInputs:
    """Hidden states at the gates of all mixed layers, for N tokens."""

    hidden: torch.Tensor  # (L, N, D) float32, after post_attention_layernorm
    expert: torch.Tensor  # (N,) the expert whose sample the token comes from
    kind: torch.Tensor  # (N,) index into KINDS
    sample: torch.Tensor  # (N,) number of the sample, counted over all experts

    def take(self, where: torch.Tensor) -> GateInputs:
        """The tokens at which `where` (N,) is true."""
        parts = (self.expert[where], self.kind[where], self.sample[where])
        return GateInputs(self.hidden[:, where], *parts)


@contextmanager
def recorded_inputs(model) -> Iterator[list[torch.Tensor]]:
    """Within this context the list holds the router inputs (B * T, D) of the last forward pass."""
    found = routers(model)
    seen: list = [None] * len(found)

    def keep(number):
        def hook(module, args):
            seen[number] = args[0].detach()

        return hook

    handles = [router.register_forward_pre_hook(keep(n)) for n, router in enumerate(found)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_mode(model, training: bool) -> Iterator[None]:
    """Within this context the model trains or evaluates; then each module is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def encode(processor, samples: Sequence[Sample], **options) -> dict[str, torch.Tensor]:
    """A padded batch with labels from samples of (text or messages, pictures)."""
    texts = []
    for content, _ in samples:
        plain = isinstance(content, str)
        texts.append(content if plain else processor.apply_chat_template(content))
    pictures = [[] if images is None else images for _, images in samples]
    pictures = [list(p) if isinstance(p, (list, tuple)) else [p] for p in pictures]
    inputs = processor(
        images=pictures,
        text=texts,
        padding=True,
        padding_side="right",
        return_labels=True,
        **options,
    )
    return dict(inputs)


def check_samples(model, samples_per_expert: Sequence[Sequence[Sample]]) -> None:
    """Raise a ValueError unless there are samples for every expert."""
    experts = routers(model)[0].gate.out_features
    if len(samples_per_expert) != experts:
        raise ValueError(
            f"samples_per_expert has {len(samples_per_expert)} lists; the model has {experts} "
            "experts and needs one list for each, in their order."
        )
    empty = [number for number, samples in enumerate(samples_per_expert) if len(samples) == 0]
    if empty:
        raise ValueError(
            f"No samples for expert {empty[0]}: a gate can only learn what it is shown."
        )


def check_source(model, source: str) -> None:
    """Raise a ValueError unless there is such a source of gate inputs."""
    known = (*SOURCES, *model.config.expert_names)
    if source not in known:
        raise ValueError(f"source={source!r} is not one of {', '.join(map(repr, known))}.")


@torch.no_grad()
def collect_gate_inputs(
    model,
    processor,
    samples_per_expert: Sequence[Sequence[Sample]],
    source: str = "own",
    tokens_per_sample: int | None = 64,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> GateInputs:
    """Run samples through the model and keep what reaches the routers.

    Why `source="own"`: what a gate sees depends on what the layers before it did. Once the gates
    are right, a sample passes through its own expert, so these are the hidden states that right
    gates will see. They depend on the experts alone; under the gates at hand ("mixture") they
    change with every random start, and no longer exist as soon as the gates are replaced.

    Args:
        model: a mixture.
        processor: its processor.
        samples_per_expert: per expert a list of (text or messages, pictures), any number each.
            Texts may end with the answer; then answer tokens are collected too.
        source: who computes the hidden states.
            "own": each sample's own expert, in every layer.
            "mixture": the experts that the present gates choose; of use to train gates anew on what
            fairly good gates let through.
            The name of an expert (`model.config.expert_names`, such as "general"): that one, for
            all samples. Where an expert equals the base, this gives the states of the dense base.
        tokens_per_sample: at most so many tokens of a sample, drawn at random; None keeps all. A
            token takes 4 * L * D bytes (393 kB at the released size).
        batch_size: samples per forward pass.
        seed: of the draw.
        progress: show a progress bar.

    Returns:
        The gate inputs, on the CPU, in the order of the samples; padding is never among them.

    Raises:
        ValueError: a list is missing or empty, or the source is unknown.
    """
    check_samples(model, samples_per_expert)
    check_source(model, source)
    names, generator = list(model.config.expert_names), torch.Generator().manual_seed(seed)
    fixed = None if source in SOURCES else names.index(source)
    jobs = [
        (expert, own[first : first + batch_size])
        for expert, own in enumerate(samples_per_expert)
        for first in range(0, len(own), batch_size)
    ]
    parts: list[GateInputs] = []
    with in_mode(model, training=False), recorded_inputs(model) as seen:
        for expert, samples in tqdm(jobs, desc="gate inputs", disable=not progress, leave=False):
            inputs = encode(processor, samples)
            kinds = token_kinds(inputs, model.config.image_token_id)  # (B, T), -1 where padded
            labels = inputs.pop("labels")
            inputs = {key: value.to(model.device) for key, value in inputs.items()}
            with select_expert(model, expert if source == "own" else fixed):
                model.model(**inputs, use_cache=False)
            for row in range(len(labels)):
                where = (kinds[row] >= 0).nonzero()[:, 0]
                if tokens_per_sample is not None and len(where) > tokens_per_sample:
                    drawn = torch.randperm(len(where), generator=generator)[:tokens_per_sample]
                    where = where[drawn.sort().values]
                flat = row * labels.shape[1] + where
                hidden = torch.stack(
                    [x[flat.to(x.device)].float().cpu() for x in seen]
                )  # (L, n, D)
                zero = torch.zeros_like(where)
                parts.append(
                    GateInputs(hidden, zero + expert, kinds[row, where], zero + len(parts))
                )
    return GateInputs(
        torch.cat([part.hidden for part in parts], dim=1),
        *(torch.cat([getattr(p, name) for p in parts]) for name in ("expert", "kind", "sample")),
    )


def token_kinds(inputs: dict[str, torch.Tensor], image_token_id: int | None) -> torch.Tensor:
    """Index into KINDS of every token (B, T); -1 where a row is padded."""
    ids = inputs["input_ids"]
    kinds = torch.full_like(ids, KINDS.index("prompt"))
    if image_token_id is not None:
        kinds[ids == image_token_id] = KINDS.index("image")
    kinds[ids < 0] = KINDS.index("image")
    if "labels" in inputs:
        kinds[inputs["labels"] >= 0] = KINDS.index("answer")
    return kinds.masked_fill(inputs["attention_mask"] == 0, -1)
