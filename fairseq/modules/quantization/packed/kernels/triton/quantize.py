"""Rows of activations to int8, with a scale for each row or one for all, and the sums of their integers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq.modules.quantization.packed.kernels.triton.functions import (
    INFINITE,
    TINY,
    divided,
    magnitude_bits,
    rounded_bits,
    saturated,
)
from fairseq.modules.quantization.packed.kernels.triton.tiles import FEW_ROWS

EXACT = tl.constexpr(1e-30)
"""From which scale on :func:`divided` rounds as the division does."""


class Rows(NamedTuple):
    """Quantized activations: int8 (M, K), scales float32 (M,), and sums of the integers int32 (parts, M).

    The sum of a row is that of its parts; a product that gives integers makes a part for each of its column tiles. Of a
    row whose scale is NaN, integers and sums may be any.
    """

    q: Tensor
    scale: Tensor
    sums: Tensor


@triton.jit
def quantized(values, inside, fixed_scale, fixed_zero, STATIC: tl.constexpr):
    """A row, float32 (BLOCK,), as int32, with its scale; as ``scalar.tokens`` defines them at 8 bits."""
    bits = tl.max(tl.where(inside, magnitude_bits(values), 0), 0)
    if STATIC:
        scale = tl.load(fixed_scale)
        q = saturated(values, scale, tl.load(fixed_zero))
        scale = tl.where(bits > INFINITE, float("nan"), scale)
    else:
        scale = bits.to(tl.float32, bitcast=True) * (1 / 127)
        scale = tl.where(scale < TINY, TINY, scale)  # NaN stays
        q = rounded_bits(divided(values, scale))
        if scale < EXACT:  # where a remainder has too few bits
            q = rounded_bits(tl.div_rn(values, scale))
    return tl.where(inside, q, 0), scale


@triton.jit
def quantize_kernel(
    x, factor, fixed_scale, fixed_zero, q, scales, sums, K, stride,
    FACTOR: tl.constexpr, STATIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row; ``factor`` multiplies in the dtype of ``x``, as PyTorch would."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    values = tl.load(x + row * stride + columns, mask=inside, other=0.0)
    if FACTOR:
        multiplier = tl.load(factor + columns, mask=inside, other=0.0).to(values.dtype).to(tl.float32)
        values = (values.to(tl.float32) * multiplier).to(values.dtype)
    integers, scale = quantized(values.to(tl.float32), inside, fixed_scale, fixed_zero, STATIC)
    tl.store(q + row * K + columns, integers.to(tl.int8), mask=inside)
    tl.store(scales + row, scale)
    tl.store(sums + row, tl.sum(integers, 0))


def warps(block: int, rows: int) -> int:
    """How many warps share a row of that many columns; more where there are too few rows for all processors."""
    return min(max(block // 2048, 4 if rows >= FEW_ROWS else 8), 32)


def empty_rows(rows: int, columns: int, device: torch.device, parts: int = 1) -> Rows:
    """Memory for quantized activations."""
    return Rows(
        torch.empty(rows, columns, dtype=torch.int8, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(parts, rows, dtype=torch.int32, device=device),
    )


def run(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, factor: Tensor | None) -> Rows:
    """Integers of ``x``, float32, bfloat16 or float16 (M, K), on the grid of the reference: the same to the bit.

    Args:
        x: rows contiguous within themselves.
        scale, zero_point: float32 (1,) and int32 (1,) of a static grid; None for a scale per row.
        factor: (K,) that x is multiplied by first, or None.
    """
    rows, columns = x.shape
    out = empty_rows(rows, columns, x.device)
    if rows and columns:
        block = triton.next_power_of_2(columns)
        quantize_kernel[(rows,)](
            x, factor, scale, zero_point, out.q, out.scale, out.sums, columns, x.stride(0),
            FACTOR=factor is not None, STATIC=scale is not None, BLOCK=block, num_warps=warps(block, rows),
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
