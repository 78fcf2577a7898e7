"""Pictures: pixel values of calibration images, most of them in a temporary file, and random views of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq.quantization.calibration.storage import Storage

AREA = (0.35, 1.0)
"""Of a random crop, as a share of the picture."""
ASPECT = (3 / 4, 4 / 3)
"""Width of a crop over its height, both as shares of the picture's."""


class Pictures:
    """Pixel values of pictures, read when they are asked for: ``len``, ``shape`` and slices as a tensor (N, C, H, W).

    Args:
        source: each picture, (C, H, W), floating.
        rows: which of ``source`` are meant, in order; None for all.
        views: how many of each there are: itself and ``views - 1`` random crops, every other one flipped.
        seed: of the crops.
    """

    def __init__(self, source: Tensor | Storage, rows: Sequence[int] | None = None, views: int = 1, seed: int = 0):
        self.source, self.views, self.seed = source, views, seed
        self.rows = range(len(source)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows) * self.views

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        return len(self), *self.source[self.rows[0]].shape

    def __getitem__(self, rows: slice) -> Tensor:
        """float32 on the CPU, a copy."""
        return torch.stack([self._view(*divmod(i, self.views)) for i in range(*rows.indices(len(self)))])

    def _view(self, picture: int, view: int) -> Tensor:
        pixels = self.source[self.rows[picture]].detach().to("cpu", torch.float32)
        return random_view(pixels, self.seed + self.views * picture + view) if view else pixels


def random_view(pixels: Tensor, seed: int) -> Tensor:
    """A random part of a picture (C, H, W), as large as that was, flipped or not: the same for the same ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    area, aspect, top, left, flip = torch.rand(5, generator=generator).tolist()
    height, width = pixels.shape[-2:]
    part = AREA[0] + (AREA[1] - AREA[0]) * area
    ratio = math.exp(math.log(ASPECT[0]) + math.log(ASPECT[1] / ASPECT[0]) * aspect)
    rows = max(1, min(height, round(height * math.sqrt(part / ratio))))
    columns = max(1, min(width, round(width * math.sqrt(part * ratio))))
    y, x = int(top * (height - rows + 1)), int(left * (width - columns + 1))
    crop = pixels[None, :, y : y + rows, x : x + columns]
    result = F.interpolate(crop, (height, width), mode="bilinear", align_corners=False, antialias=True)[0]
    return result.flip(-1) if flip < 0.5 else result
