"""Tiles of the product: a small table by compute capability and number of rows."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """How a product is cut.

    Attributes:
        rows, columns: of the output, for one program.
        inner: of both factors, for one step.
        warps: of a program.
        stages: steps whose factors are on their way from memory at once.
        descriptors: whether the copy engine of Hopper and later brings them.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    descriptors: bool = False


SMALL, LARGE = "small", "large"
"""Products of few rows, which wait for memory and are to reach all processors, and others."""
FEW_ROWS = 1024
TABLE: dict[int, dict[str, Tile]] = {
    80: {SMALL: Tile(64, 64, 128, 4, 3), LARGE: Tile(128, 128, 64, 8, 3)},
    90: {SMALL: Tile(64, 64, 128, 4, 4, True), LARGE: Tile(128, 128, 128, 8, 3, True)},
}
"""By the least compute capability. That of 90 was measured, that of 80 fits the memory of 80, 86 and 89."""
PACKED: dict[int, dict[str, Tile]] = {
    80: {SMALL: Tile(64, 64, 64, 4, 3), LARGE: Tile(128, 128, 64, 8, 3)},
    90: {SMALL: Tile(64, 64, 128, 4, 3), LARGE: Tile(128, 128, 128, 8, 3)},
}
"""The same for weights that are unpacked in registers."""


def tile_for(capability: int, rows: int, packed: bool) -> Tile:
    """The tile of a product.

    Args:
        capability: 10 * major + minor of the device, 80 or more.
        rows: of the product.
        packed: whether several weights share a byte.
    """
    table = PACKED if packed else TABLE
    return table[max(least for least in table if least <= capability)][SMALL if rows < FEW_ROWS else LARGE]
