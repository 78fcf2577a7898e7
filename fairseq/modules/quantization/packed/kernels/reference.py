"""The definition of correct: int64 products of the integers, and the one epilogue, a step after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq.modules.quantization.packed.input_grid import InputGrid
from fairseq.modules.quantization.packed.kernels import functional
from fairseq.modules.quantization.packed.kernels.epilogue import finish
from fairseq.modules.quantization.packed.weight import PackedWeight


def product(q: Tensor, codes: Tensor) -> Tensor:
    """(M, K) int8 times (N, K) int8 transposed: (M, N) int32, exact."""
    wide = _wide(q)
    return (q.to(wide) @ codes.to(wide).T).to(torch.int32)


def _wide(q: Tensor) -> torch.dtype:
    """What sums of products are exact in: CUDA has no products of int64, and float64 is exact up to 2**53."""
    return torch.float64 if q.is_cuda else torch.int64


def integer(x: Tensor, weight: PackedWeight, bias: Tensor | None, grid: InputGrid) -> Tensor:
    """x quantized times the weight's integers, scaled, plus bias: (M, in) -> (M, out), dtype of ``x``.

    This defines the result to the bit; the other kernels give the same. x is rounded to the dtype of the weight's scale
    and to the integers of ``grid``, their products with the weight's integers less its zero point are summed exactly,
    :func:`~fairseq.modules.quantization.packed.kernels.epilogue.finish` has the order of all that follows, and its
    result is rounded to the dtype of x. Of a token that holds NaN or Inf only that is defined that nothing is finite.
    """
    if functional.capturing():  # exporters know no products of int64 and no view as another dtype
        into_onnx = torch.onnx.is_in_onnx_export()
        return functional.integer(x, weight, bias, grid, functional.int_product if into_onnx else product)
    rounded, token_scale = grid.quantize(x.to(weight.scale.dtype))
    q, integers, zero_point = (t.to(_wide(x)) for t in (rounded, weight.integers(), weight.zero_point))
    accumulators = []
    for group, (start, stop) in enumerate(weight.columns()):
        z = zero_point[:, group] if zero_point.ndim == 2 else zero_point
        sums = q[:, start:stop] @ (integers[:, start:stop] - z.reshape(-1, 1)).T
        accumulators.append(sums.to(torch.int64))
    return finish(accumulators, weight.scale, token_scale, grid.bias(bias, weight.scale.dtype)).to(x.dtype)


def weight_only(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x times the dequantized weight in the dtype of ``x``: (M, in) -> (M, out).

    A product of floats, whose sums no kernel adds up in a defined order: two of them are equal to rounding only.
    """
    if functional.capturing():
        return functional.weight_only(x, weight, bias)
    return F.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype)).to(x.dtype)
