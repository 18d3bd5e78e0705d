"""Names of a package that are imported when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def later(
    package: str, places: Mapping[str, Sequence[str]], present: Mapping[str, Any]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's `__getattr__` and `__dir__` (https://peps.python.org/pep-0562/).

    Args:
        package: its `__name__`.
        places: module of the package → names that it has.
        present: the package's `globals()`.

    Example:
        >>> __getattr__, __dir__ = later(__name__, {"a": ("b",)}, globals())  # doctest: +SKIP
    """
    modules = {name: module for module, names in places.items() for name in names}

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{modules[name]}", package), name)

    return get, lambda: sorted([*present, *modules])
