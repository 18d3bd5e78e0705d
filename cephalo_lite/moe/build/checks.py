"""What is checked before the first byte of a new mixture of experts is written."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..routing import ROUTERS


def name_experts(
    experts: Sequence[str | Path] | Mapping[str, str | Path],
) -> dict[str, str | Path]:
    """Name the experts: by the mapping's keys, or the last part of their folder or hub id.

    Returns:
        Name to source, in the order given.

    Raises:
        ValueError: fewer than two experts.
    """
    if isinstance(experts, (str, Path)):
        raise ValueError(f"experts is one path ({experts}), expected a list of at least two")
    if len(experts) < 2:
        raise ValueError(f"a mixture needs at least 2 experts, got {len(experts)}")
    if isinstance(experts, Mapping):
        return dict(experts)
    named: dict[str, str | Path] = {}
    for source in experts:
        folder = Path(source)
        stem = (folder.resolve() if folder.is_dir() else folder).name
        name, copies = stem, 1
        while name in named:
            copies += 1
            name = f"{stem}-{copies}"
        named[name] = source
    return named


def check_routing(experts: int, experts_per_token: int, router: str) -> None:
    """Check the number of experts per token and the router's name.

    Raises:
        ValueError: not `1 <= experts_per_token <= experts`, or no such router.
    """
    if type(experts_per_token) is not int or not 1 <= experts_per_token <= experts:
        raise ValueError(
            f"experts_per_token is {experts_per_token!r}, expected a whole number from 1 to "
            f"{experts}, the number of experts"
        )
    if router not in ROUTERS:
        raise ValueError(f"router is {router!r}, expected one of {', '.join(map(repr, ROUTERS))}")


def check_layers(layers: Sequence[int] | None, total: int) -> list[int]:
    """Give the numbers of the layers that become MoE layers, in ascending order; `None` means all.

    Raises:
        ValueError: no layer, a layer twice, or a layer that the model does not have.
    """
    if layers is None:
        return list(range(total))
    chosen = sorted(layers)
    if not chosen:
        raise ValueError("layers is empty: name at least one layer, or None for all")
    wrong = [layer for layer in chosen if type(layer) is not int or not 0 <= layer < total]
    if wrong:
        raise ValueError(f"layers: {wrong} not in the model, which has layers 0 to {total - 1}")
    twice = sorted({layer for layer in chosen if chosen.count(layer) > 1})
    if twice:
        raise ValueError(f"layers: {twice} named more than once")
    return chosen


def check_target(output_dir: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Check that a build may be put at `output_dir`.

    Raises:
        FileExistsError: something is there, and it is no model or `overwrite` is off.
        ValueError: it is, holds or lies in a folder that is read.
    """
    target = output_dir.resolve()
    for source in (source.resolve() for source in sources):
        if target == source or source in target.parents or target in source.parents:
            raise ValueError(
                f"output_dir {output_dir} and the source {source} lie in each other: "
                "choose a folder apart from the sources"
            )
    if output_dir.is_dir() and not any(output_dir.iterdir()):
        return
    if output_dir.is_symlink() or output_dir.exists():
        if not overwrite:
            raise FileExistsError(
                f"output_dir {output_dir} exists: choose another name, or overwrite=True"
            )
        if output_dir.is_symlink() or not (output_dir / "config.json").is_file():
            raise FileExistsError(
                f"output_dir {output_dir} holds no model (no config.json): it is not overwritten"
            )


def check_disk_space(output_dir: Path, needed: int, reserve: int) -> None:
    """Check that a build fits on the disk.

    A model that is overwritten goes only after the new one is there, so it frees nothing.

    Args:
        output_dir: where it is to go; need not exist.
        needed: bytes that will be written.
        reserve: bytes that shall stay free.

    Raises:
        OSError: too little space.
    """
    folder = output_dir.resolve()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed + reserve > free:
        raise OSError(
            f"the model takes {needed / 1e9:.3f} GB and {reserve / 1e9:.3f} GB shall stay free, "
            f"but {folder} has {free / 1e9:.3f} GB"
        )
