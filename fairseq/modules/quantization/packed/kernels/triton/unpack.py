"""Weights of 2 to 4 bits to a byte each, in memory that lasts for one product.

Unpacked in registers, inside of the product, they took four times as long on Hopper: its tensor cores read the weights
from shared memory as they come, and a left factor from registers only after all threads have unpacked it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def unpack_kernel(packed, codes, K, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of a row; planes of LOW bits and, if it is not 0, of HIGH bits behind them, see ``packing``."""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    low, high = (K * LOW + 7) // 8, (K * HIGH + 7) // 8  # bytes of the two planes
    source = packed + row * (low + high)
    q = tl.load(source + columns % low, mask=inside, other=0).to(tl.int32) >> columns // low * LOW
    q = q & ((1 << LOW) - 1)
    if HIGH:
        top = tl.load(source + low + columns % high, mask=inside, other=0).to(tl.int32) >> columns // high * HIGH
        q |= (top & ((1 << HIGH) - 1)) << LOW
    tl.store(codes + row * K + columns, q.to(tl.int8), mask=inside)


def run(packed: Tensor, planes: tuple[int, ...], inputs: int) -> Tensor:
    """Packed rows, uint8 (N, bytes) -> the integers, int8 (N, inputs).

    Args:
        planes: widths of the bit planes, one or two.
        inputs: of a row.
    """
    codes = torch.empty(len(packed), inputs, dtype=torch.int8, device=packed.device)
    low, high = (*planes, 0)[:2]
    grid = (triton.cdiv(inputs, BLOCK), len(packed))
    if codes.numel():
        unpack_kernel[grid](packed, codes, inputs, LOW=low, HIGH=high, BLOCK=BLOCK, num_warps=4)
    return codes
