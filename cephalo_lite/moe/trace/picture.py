"""Where the tokens of a picture come from: their place in the text and on the picture's grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class PictureGrid(NamedTuple):
    """One value per token of a picture, laid back to where the token comes from."""

    detail: torch.Tensor  # (rows * S, columns * S): the detailed crops, S tokens a side each
    detail_ends: torch.Tensor  # (rows * S,): ends of its lines
    separator: torch.Tensor  # (): between the two parts
    overview: torch.Tensor  # (S, S): the global crop
    overview_ends: torch.Tensor  # (S,)


@dataclass
class TracedPicture:
    """A picture in a trace."""

    row: int  # of the batch
    start: int  # column of its first token in the padded batch
    crops: tuple[int, int]  # rows and columns of detailed crops
    side: int  # S, tokens along the side of a crop
    order: str  # "sub_glb": detail first, or "glb_sub": overview first
    detail: torch.Tensor | None  # (H, W, 3) uint8, as the model saw it
    overview: torch.Tensor | None  # (s, s, 3) uint8

    @property
    def tokens(self) -> int:
        """Tokens of the picture: of the detailed crops, the global one, line ends and separator."""
        rows, columns = self.crops
        side = self.side
        return rows * side * (columns * side + 1) + 1 + side * (side + 1)

    def lay_out(self, values: torch.Tensor) -> PictureGrid:
        """Lay one value per token (tokens,) back on the picture."""
        rows, columns = self.crops[0] * self.side, self.crops[1] * self.side
        parts = [rows * (columns + 1), 1, self.side * (self.side + 1)]
        if self.order == "sub_glb":
            detail, separator, overview = values.split(parts)
        else:
            overview, separator, detail = values.split(parts[::-1])
        detail = detail.view(rows, columns + 1)
        overview = overview.view(self.side, self.side + 1)
        return PictureGrid(
            detail[:, :-1], detail[:, -1], separator[0], overview[:, :-1], overview[:, -1]
        )


def find_pictures(
    input_ids: torch.Tensor, image_sizes: torch.Tensor, config
) -> list[tuple[int, int, int]]:
    """Where the pictures stand in the text.

    Args:
        input_ids: (B, T) with the placeholder id, or -n at the tokens of picture n of a row.
        image_sizes: (pictures, 2) pixels.
        config: a `Phi3VConfig`.

    Returns:
        (row, first column, number of the picture in `image_sizes`) in the order of the text.
    """
    side, size = int(config.image_tokens_per_crop**0.5), config.vision_config.image_size
    counts = [
        TracedPicture(0, 0, (int(h) // size, int(w) // size), side, "", None, None).tokens
        for h, w in image_sizes.tolist()
    ]
    found, before = [], 0
    for row, line in enumerate(input_ids.tolist()):
        column, used = 0, 0
        while column < len(line):
            if line[column] >= 0 and line[column] != config.image_token_id:
                column += 1
                continue
            tag = -line[column] if line[column] < 0 else used + 1
            found.append((row, column, before + tag - 1))
            column += counts[before + tag - 1]
            used = max(used, tag)
        before += used
    return found


def rebuild(
    crops: torch.Tensor, grid: tuple[int, int], mean: list[float], std: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The padded picture (H, W, 3) and its overview (s, s, 3), uint8, from crops (n, 3, s, s)."""
    rows, columns = grid
    shift = torch.tensor(mean).view(3, 1, 1)
    scale = torch.tensor(std).view(3, 1, 1)
    crops = crops[: 1 + rows * columns].detach().float().cpu() * scale + shift
    crops = (crops * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)  # (n, s, s, 3)
    size = crops.shape[1]
    detail = crops[1:].reshape(rows, columns, size, size, 3).transpose(1, 2)
    return detail.reshape(rows * size, columns * size, 3), crops[0]
