"""Watching the routers of a mixture at work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ...phi3v import Phi3VModel, Phi3VProcessor
from ...phi3v.image_processing import CLIP_MEAN, CLIP_STD
from ...phi3v.labels import IGNORED, answer_labels
from ..routing import RouterOutput, routers
from .picture import TracedPicture, find_pictures, rebuild
from .record import RoutingTrace
from .text import pieces

ROUTED = ("probs", "weights", "chosen")


class RoutingRecord:
    """What a mixture read while it was watched, and how its routers decided; made by `tracing`."""

    def __init__(self, model, processor: Phi3VProcessor | None, stops: list[int] | None):
        self.config = model.config
        self.processor = processor
        known = model.generation_config.eos_token_id if stops is None else stops
        self.stops = torch.tensor([known] if isinstance(known, int) else known or [])
        self.calls: list[tuple[int, dict[str, torch.Tensor]]] = []  # first column, what happened
        self.pictures: dict[tuple[int, int], TracedPicture] = {}  # (row, column) → picture
        self.prompt_end: int | None = None  # first column after the first call
        self._routed: list[RouterOutput] = []

    def before_call(self, module, args, kwargs) -> None:
        """Note what the model is about to read (hook of `Phi3VModel`)."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise ValueError("Routing is traced by token: pass input_ids, not inputs_embeds.")
        cache = kwargs.get("past_key_values")
        self._start = 0 if cache is None else int(cache.get_seq_length())
        self._ids = ids.detach()
        mask, end = kwargs.get("attention_mask"), self._start + ids.shape[1]
        fits = isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= end
        self._mask = (
            mask[:, self._start : end].bool() if fits else torch.ones_like(ids, dtype=torch.bool)
        )
        self._routed = []
        if kwargs.get("pixel_values") is not None:
            self._add_pictures(kwargs["pixel_values"], kwargs["image_sizes"])

    def routed(self, module, args, output: RouterOutput) -> None:
        """Note what a router decided (hook of `Router`)."""
        self._routed.append(output)

    def after_call(self, module, args, output) -> None:
        """File the decisions under the columns they belong to (hook of `Phi3VModel`)."""
        call = {"ids": self._ids, "mask": self._mask}
        for name in ROUTED:
            parts = [getattr(one, name).detach().to(self._ids.device) for one in self._routed]
            flat = torch.stack(parts)  # (L, B * T, E or K)
            call[name] = flat.unflatten(1, self._ids.shape)
        self.calls.append((self._start, call))
        if self.prompt_end is None:
            self.prompt_end = self._start + self._ids.shape[1]

    def trace(
        self, labels: torch.Tensor | None = None, before: list[int] | None = None
    ) -> RoutingTrace:
        """The trace of all that was read.

        Args:
            labels: (B, T) as for training; where they are not -100 is an answer. Without labels,
                answers are the assistant's turns where a processor was given, else what was
                generated.
            before: ids that a cache held already, in front of what was read (one row).

        Raises:
            ValueError: the model was not called.
        """
        if not self.calls:
            raise ValueError("Nothing was traced: call the model inside `with tracing(model)`.")
        first, one = self._joined()
        ids, columns = one["ids"], torch.arange(first, first + one["ids"].shape[1])
        if labels is not None and labels.shape != ids.shape:
            raise ValueError(
                f"labels {tuple(labels.shape)} do not fit input_ids {tuple(ids.shape)}."
            )
        generated = columns >= self.prompt_end  # (T,)
        stopped = torch.isin(ids, self.stops) & generated
        keep = one["mask"] & (stopped.cumsum(dim=1) == 0)  # (B, T): a finished row only pads
        image = (ids < 0) | (ids == self.config.image_token_id)
        answer = self._answers(ids, keep, generated, labels, (before or [])[:first])
        where = keep.nonzero()  # (N, 2)
        rows, steps = where[:, 0], where[:, 1]
        kinds = [
            "image" if i else "answer" if a else "prompt"
            for i, a in zip(image[rows, steps].tolist(), answer[rows, steps].tolist(), strict=True)
        ]
        return RoutingTrace(
            probs=one["probs"][:, rows, steps].float(),
            weights=one["weights"][:, rows, steps].float(),
            chosen=one["chosen"][:, rows, steps],
            ids=ids[rows, steps],
            rows=rows,
            positions=columns[steps],
            kinds=kinds,
            layers=list(self.config.mixed_layers),
            expert_names=list(self.config.expert_names),
            pieces=self._pieces(ids[rows, steps], rows, kinds),
            pictures=[self.pictures[place] for place in sorted(self.pictures)],
        )

    def _joined(self) -> tuple[int, dict[str, torch.Tensor]]:
        """First column, and all calls joined along T; what was read again counts as read last."""
        first = min(start for start, _ in self.calls)
        last = max(start + call["ids"].shape[1] for start, call in self.calls)
        joined = {}
        for name, like in self.calls[0][1].items():
            along = 2 if name in ROUTED else 1
            shape = (*like.shape[:along], last - first, *like.shape[along + 1 :])
            joined[name] = torch.zeros(shape, dtype=like.dtype)
            for start, call in self.calls:
                part = call[name]
                joined[name].narrow(along, start - first, part.shape[along]).copy_(part)
        return first, joined

    def _answers(self, ids, keep, generated, labels, before: list[int]) -> torch.Tensor:
        """Which tokens are an assistant's (B, T)."""
        if labels is not None:
            return labels.cpu() != IGNORED
        if self.processor is None:
            return generated.expand_as(ids)
        answer = torch.zeros_like(keep)
        for row in range(len(ids)):
            own = answer_labels(before + ids[row][keep[row]].tolist(), self.processor.tokenizer)
            answer[row, keep[row]] = torch.tensor(own[len(before) :]) != IGNORED
        return answer

    def _pieces(self, ids: torch.Tensor, rows: torch.Tensor, kinds: list[str]) -> list[str] | None:
        if self.processor is None:
            return None
        texts = []
        for row in rows.unique().tolist():
            own = (rows == row).nonzero()[:, 0].tolist()
            line = [None if kinds[i] == "image" else int(ids[i]) for i in own]
            texts += pieces(line, self.processor.tokenizer)
        return texts

    def _add_pictures(self, pixels: torch.Tensor, sizes: torch.Tensor) -> None:
        size = self.config.vision_config.image_size
        side = int(self.config.image_tokens_per_crop**0.5)
        given = None if self.processor is None else self.processor.image_processor
        mean = list(CLIP_MEAN) if given is None else given.image_mean
        std = list(CLIP_STD) if given is None else given.image_std
        for row, column, number in find_pictures(self._ids, sizes, self.config):
            grid = tuple(int(pixel) // size for pixel in sizes[number])
            detail, overview = rebuild(pixels[number], grid, mean, std)
            start = self._start + column
            self.pictures[row, start] = TracedPicture(
                row, start, grid, side, self.config.hd_transform_order, detail, overview
            )


@contextmanager
def tracing(
    model, processor: Phi3VProcessor | None = None, stops: list[int] | None = None
) -> Iterator[RoutingRecord]:
    """Watch a mixture while it reads or generates; one prompt or one batch, without beams.

    Args:
        model: a mixture.
        processor: gives the tokens' texts and tells the assistant's turns from the rest.
        stops: ids that end a generated row; None is the generation configuration's.

    Yields:
        The record; its `trace()` is the `RoutingTrace`.

    Raises:
        ValueError: the model is no mixture.

    Example:
        >>> with tracing(model, processor) as record:  # doctest: +SKIP
        ...     model.generate(**inputs)
        >>> record.trace().shares("answer")  # doctest: +SKIP
    """
    found = routers(model)
    inner = next(module for module in model.modules() if isinstance(module, Phi3VModel))
    record = RoutingRecord(model, processor, stops)
    hooks = [router.register_forward_hook(record.routed) for router in found]
    hooks.append(inner.register_forward_pre_hook(record.before_call, with_kwargs=True))
    hooks.append(inner.register_forward_hook(record.after_call))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def trace_routing(
    model, inputs: Mapping[str, Any], processor: Phi3VProcessor | None = None
) -> RoutingTrace:
    """Which expert sees which token of a prompt, a conversation or a batch.

    Args:
        model: a mixture.
        inputs: what the processor made; padded left or right. With `labels`, the tokens that have
            one are the answers.
        processor: gives the tokens' texts and tells the assistant's turns from the rest.

    Returns:
        The trace of all tokens but padding.

    Raises:
        ValueError: the model is no mixture, or inputs lack input_ids.

    Example:
        >>> inputs = processor(images=picture, text=prompt)  # doctest: +SKIP
        >>> trace = trace_routing(model, inputs, processor)  # doctest: +SKIP
        >>> trace.shares("image")  # doctest: +SKIP
        {'materials': 0.91, 'general': 0.06, 'latex': 0.03}
    """
    if inputs.get("input_ids") is None:
        raise ValueError(
            "Routing is traced by token: inputs need input_ids, as the processor makes them."
        )
    routers(model)  # or say that this is no mixture
    inputs = {
        key: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
    }
    labels = inputs.pop("labels", None)
    was_training = model.training
    with tracing(model, processor) as record:
        model.eval()
        try:
            model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            model.train(was_training)
    return record.trace(labels)
