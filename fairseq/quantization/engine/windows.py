"""Where the windows of Swin have their tokens, and which of these may attend to one another."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """Tokens in a grid that is cut into windows.

    Attributes:
        height, width: of the grid.
        window: of a window, which is square.
        shift: how far windows are moved to the right and down.
    """

    height: int
    width: int
    window: int
    shift: int

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width, enlarged to multiples of a window."""
        return -(-self.height // self.window) * self.window, -(-self.width // self.window) * self.window

    @property
    def windows(self) -> int:
        """Windows in the grid."""
        height, width = self.padded
        return height // self.window * (width // self.window)


def rows(grid: Grid, images: int) -> Tensor:
    """The row of hidden states of each token of each window: int32 (images * windows * tokens,), -1 for padding."""
    tokens = grid.height * grid.width
    places = torch.full(grid.padded, -1)
    places[: grid.height, : grid.width] = torch.arange(tokens).view(grid.height, grid.width)
    places = _windows(places.roll((-grid.shift, -grid.shift), (0, 1)), grid.window)  # (windows, tokens)
    firsts = (torch.arange(images) * tokens).view(-1, 1, 1)
    return torch.where(places >= 0, places + firsts, -1).to(torch.int32).flatten()


def mask(block: Any, grid: Grid, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """What a Swin block adds between tokens that the shift brought side by side: (windows, tokens, tokens)."""
    height, width = grid.padded
    try:
        found = block.get_attn_mask(height, width, dtype, device)
    except TypeError:  # SwinV2 of earlier transformers makes it where it is
        found = block.get_attn_mask(height, width, dtype)
    if found is None:
        return None
    twice = 2 if hasattr(block.attention, "self") and hasattr(block.attention.self, "logit_scale") else 1
    return (twice * found.to(device, dtype)).contiguous()  # SwinV2 adds it twice


def _windows(grid: Tensor, window: int) -> Tensor:
    """(height, width) -> (windows, tokens of one)."""
    height, width = (size // window for size in grid.shape)
    return grid.view(height, window, width, window).transpose(1, 2).reshape(height * width, window * window)
