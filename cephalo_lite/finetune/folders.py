"""New folders that are complete or not there."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder beside its final name, which it gets when the block ends without an error.

    Args:
        target: the final name.
        overwrite: replace a folder that is there, once the new one is complete.

    Yields:
        An empty folder to write to.

    Raises:
        FileExistsError: something is at `target`; an empty folder may be.
    """
    target = Path(target).expanduser().resolve()
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} is there already: choose another name or overwrite=True.")
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
            os.rename(target, old)
            os.rename(partial, target)
            shutil.rmtree(old)
        else:
            os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
