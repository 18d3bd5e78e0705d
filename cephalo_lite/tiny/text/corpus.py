"""What every Python brings along to read: the functions and docstrings of its standard library.

The text is the running Python's own (PSF licence), so it needs no download, and it differs a
little from one version of Python to the next.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

LINES = range(3, 25)  # of a function: shorter says little, longer does not fit a block
# Not prose or code to learn from: tests, tables, generated files, graphical programs.
LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings",
    "turtledemo", "ensurepip", "pydoc_data", "__pycache__", "distutils", "config", "_pyrepl",
}  # fmt: skip


def library_texts(most: int | None = None) -> list[str]:
    """Short functions and docstrings of the standard library.

    Args:
        most: read files only until there are this many; None reads all (about 15,000 texts).

    Returns:
        Sources of functions, and docstrings of modules and classes, in the order of file names.

    Raises:
        FileNotFoundError: this Python keeps no source files of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in LEFT_OUT or part.startswith("config-") for part in parts):
            continue
        texts += _texts_of(path)
        if most is not None and len(texts) >= most:
            return texts[:most]
    if not texts:
        raise FileNotFoundError(
            f"No Python sources in {root}: the standard library of this Python is packed or "
            "stripped. Use a Python from python.org, conda, uv or a Linux distribution."
        )
    return texts


def _texts_of(path: Path) -> Iterator[str]:
    """Functions, and docstrings of what is no function."""
    try:
        source = path.read_text("utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # a few files of the library are templates
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            if node.end_lineno - node.lineno + 1 in LINES:
                yield dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        elif isinstance(node, ast.Module | ast.ClassDef):
            text = ast.get_docstring(node)
            if text and len(text) > 80:
                yield text
