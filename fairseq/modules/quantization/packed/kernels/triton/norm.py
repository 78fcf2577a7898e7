"""LayerNorm of rows and their integers in one pass: what lies between two layers never goes to memory as floats."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fairseq.modules.quantization.packed.kernels.triton.quantize import Rows, empty_rows, quantized, warps


@triton.jit
def norm_kernel(
    x, weight, bias, epsilon, fixed_scale, fixed_zero, q, scales, sums, K,
    STATIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row; all arithmetic in float32."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    values = tl.load(x + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values, 0) / K, 0.0)
    deviation = tl.sqrt_rn(tl.sum(centred * centred, 0) / K + epsilon)
    w = tl.load(weight + columns, mask=inside, other=0.0)
    b = tl.load(bias + columns, mask=inside, other=0.0)
    normal = tl.fma(centred * (1.0 / deviation), w, b)
    integers, scale = quantized(normal, inside, fixed_scale, fixed_zero, STATIC)
    tl.store(q + row * K + columns, integers.to(tl.int8), mask=inside)
    tl.store(scales + row, scale)
    tl.store(sums + row, tl.sum(integers, 0))


def run(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, scale: Tensor | None, zero_point: Tensor | None
) -> Rows:
    """Integers of the LayerNorm of ``x``, float32, bfloat16 or float16 (M, K), contiguous.

    The norm is off by roundings of float32, which may bring an entry that lies between two integers to either.

    Args:
        weight, bias: float32 (K,).
        epsilon: of the norm.
        scale, zero_point: as for :func:`~.quantize.run`.
    """
    rows, columns = x.shape
    out = empty_rows(rows, columns, x.device)
    if rows and columns:
        block = triton.next_power_of_2(columns)
        norm_kernel[(rows,)](
            x, weight, bias, epsilon, scale, zero_point, out.q, out.scale, out.sums, columns,
            STATIC=scale is not None, BLOCK=block, num_warps=warps(block, rows), enable_fp_fusion=False,
        )  # fmt: skip
    return out
