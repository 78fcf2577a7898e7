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


FEW_ROWS = 1024
"""Below it a product waits for memory, and a kernel for all processors to have something to do."""
MANY_ROWS = 4096
NARROW = 1024
"""Outputs: with few rows, too, such a product has few tiles."""

FEW, NARROW_FEW, SOME, MANY = "few", "few, narrow", "some", "many"
TABLE: dict[int, dict[str, Tile]] = {
    80: {
        NARROW_FEW: Tile(64, 32, 128, 4, 4),
        FEW: Tile(64, 64, 128, 4, 3),
        SOME: Tile(64, 128, 64, 4, 3),
        MANY: Tile(128, 128, 64, 8, 3),
    },
    90: {
        NARROW_FEW: Tile(64, 32, 256, 4, 4, True),
        FEW: Tile(64, 64, 256, 4, 3, True),
        SOME: Tile(64, 128, 128, 4, 4, True),
        MANY: Tile(128, 128, 128, 4, 3, True),
    },
    100: {
        NARROW_FEW: Tile(64, 32, 256, 4, 4, True),
        FEW: Tile(64, 64, 256, 4, 3, True),
        SOME: Tile(64, 128, 128, 4, 4, True),
        MANY: Tile(128, 128, 128, 8, 3, True),  # with 4 warps it spills registers
    },
}
"""By the least compute capability: of 90 the fastest of a dozen on an H200; the others fit their devices, not timed."""


def tile_for(capability: int, rows: int, columns: int) -> Tile:
    """The tile of a product of that many rows and outputs on a device of compute capability 80 or more."""
    few = NARROW_FEW if columns <= NARROW else FEW
    kind = few if rows < FEW_ROWS else SOME if rows < MANY_ROWS else MANY
    return TABLE[max(least for least in TABLE if least <= capability)][kind]
