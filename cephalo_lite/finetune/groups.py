"""Parameters by group: what a model is made of, and which of it is trained.

Each parameter is in exactly one group, told by its name:

| group | what it holds |
| --- | --- |
| vision | the CLIP tower |
| projector | from tower to decoder: `img_projection`, and the separators `glb_GN` and `sub_GN` |
| embeddings | `embed_tokens`; with tied embeddings also the head, which is then the same tensor |
| attention | the decoder's attention |
| norms | the decoder's norms |
| experts | the experts' tensors in the layers of a mixture that have experts |
| mlp | the MLPs of layers without experts: all of a dense model's |
| gates | the routers |
| head | `lm_head` |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

GROUPS = (
    "vision", "projector", "embeddings", "attention", "norms", "experts", "mlp", "gates", "head",
)  # fmt: skip

# Part of a dotted name → group. The first line that matches counts: the tower has an attention,
# MLPs and norms of its own. "router" is what transformers' text mixtures call their gates.
RULES = (
    ({"img_processor"}, "vision"),
    ({"img_projection", "glb_GN", "sub_GN"}, "projector"),
    ({"gating_layer", "router"}, "gates"),
    ({"experts"}, "experts"),
    ({"self_attn"}, "attention"),
    ({"mlp"}, "mlp"),
    ({"embed_tokens"}, "embeddings"),
    ({"input_layernorm", "post_attention_layernorm", "norm"}, "norms"),
    ({"lm_head"}, "head"),
)


class Count(NamedTuple):
    """How much of something there is."""

    tensors: int
    parameters: int  # elements; packed 4-bit weights count as they are stored


@dataclass(frozen=True)
class FreezeReport:
    """What is trained and what is not; groups that the model does not have are left out."""

    trainable: dict[str, Count]  # group → what is trained of it
    frozen: dict[str, Count]  # group → what is not

    @property
    def total(self) -> tuple[Count, Count]:
        """Trained and frozen, over all groups."""
        both = []
        for counts in (self.trainable.values(), self.frozen.values()):
            both.append(Count(sum(c.tensors for c in counts), sum(c.parameters for c in counts)))
        return both[0], both[1]

    def table(self) -> str:
        """The counts as aligned text, a group per line and their sum."""
        none = Count(0, 0)
        names = [name for name in GROUPS if name in self.trainable or name in self.frozen]
        rows = [(n, self.trainable.get(n, none), self.frozen.get(n, none)) for n in names]
        lines = [f"{'group':<12}{'trainable':>15}{'tensors':>9}{'frozen':>15}{'tensors':>9}"]
        for name, one, two in [*rows, ("all", *self.total)]:
            lines.append(
                f"{name:<12}{one.parameters:>15,}{one.tensors:>9,}"
                f"{two.parameters:>15,}{two.tensors:>9,}"
            )
        return "\n".join(lines)


def parameter_groups(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Sort a model's parameters into groups.

    Args:
        model: a Phi-3-Vision, a mixture, or one of these with adapters (an adapter belongs to the
            group of what it adapts).

    Returns:
        Group → (name, parameter), for the groups that the model has, in the order of `GROUPS`. A
        tensor that is used in two places stands where `model.named_parameters()` names it first.

    Raises:
        ValueError: a parameter belongs to no group.
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        groups[group_of(name)].append((name, parameter))
    return {group: members for group, members in groups.items() if members}


def freeze(model: nn.Module, except_groups: Iterable[str] = ("gates",)) -> FreezeReport:
    """Train these groups and nothing else.

    Args:
        model: see `parameter_groups`.
        except_groups: the groups that are trained, whatever was frozen before; none freezes all.

    Returns:
        What is trained now and what is not.

    Raises:
        ValueError: there is no such group, the model has nothing in it, or its weights are
            quantized; the model is then left as it was.

    Example:
        >>> print(freeze(model, except_groups=("gates", "projector")).table())  # doctest: +SKIP
    """
    groups = parameter_groups(model)
    chosen = _check(groups, except_groups)
    for group, members in groups.items():
        for _, parameter in members:
            parameter.requires_grad_(group in chosen)
    return _report(groups)


def unfreeze(model: nn.Module, groups: Iterable[str] | None = None) -> FreezeReport:
    """Train these groups as well; what else is trained or frozen stays so.

    Args:
        model: see `parameter_groups`.
        groups: None is all of them, but for quantized weights, which cannot be trained.

    Returns:
        What is trained now and what is not.

    Raises:
        ValueError: as `freeze`.
    """
    found = parameter_groups(model)
    chosen = found if groups is None else _check(found, groups)
    for group in chosen:
        for _, parameter in found[group]:
            if _can_train(parameter):
                parameter.requires_grad_(True)
    return _report(found)


def group_of(name: str) -> str:
    """The group of a parameter, by its dotted name; raises ValueError where it has none."""
    parts = set(name.split("."))
    for words, group in RULES:
        if parts & words:
            return group
    raise ValueError(
        f"{name} belongs to none of the groups {', '.join(GROUPS)}: is this a Phi-3-Vision or a "
        "mixture of them?"
    )


def _check(groups: dict[str, list], wanted: Iterable[str]) -> set[str]:
    """The wanted groups; raises ValueError unless each is there and can be trained."""
    chosen = {wanted} if isinstance(wanted, str) else set(wanted)
    unknown = sorted(chosen - set(GROUPS))
    if unknown:
        raise ValueError(f"No group is called {unknown[0]!r}; groups are {', '.join(GROUPS)}.")
    for group in sorted(chosen):
        if group not in groups:
            tied = " Its head is tied to the embeddings: name these." if group == "head" else ""
            raise ValueError(
                f"The model has nothing in group {group!r}; it has {', '.join(groups)}.{tied}"
            )
        packed = [name for name, parameter in groups[group] if not _can_train(parameter)]
        if packed:
            raise ValueError(
                f"Group {group!r} holds quantized weights, such as {packed[0]}, which cannot be "
                "trained: train adapters on them instead."
            )
    return chosen


def _can_train(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point()


def _report(groups: dict[str, list[tuple[str, nn.Parameter]]]) -> FreezeReport:
    counts: tuple[dict[str, Count], dict[str, Count]] = ({}, {})
    for group, members in groups.items():
        for wanted, result in zip((True, False), counts, strict=True):
            sizes = [p.numel() for _, p in members if p.requires_grad is wanted]
            if sizes:
                result[group] = Count(len(sizes), sum(sizes))
    return FreezeReport(*counts)
