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
    return _exact(q, codes).to(torch.int32)


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) integers times (N, K) integers, transposed: int64 (M, N).

    Other devices than the CPU have no product of integers; float64 is exact, too, as all sums are below 2**53.
    """
    a, b = a.to(torch.int64), b.to(torch.int64).T
    return a @ b if a.device.type == "cpu" else (a.double() @ b.double()).to(torch.int64)


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
    q, integers, zero_point = (t.to(torch.int64) for t in (rounded, weight.integers(), weight.zero_point))
    accumulators = []
    for group, (start, stop) in enumerate(weight.columns()):
        z = zero_point[:, group] if zero_point.ndim == 2 else zero_point
        accumulators.append(_exact(q[:, start:stop], integers[:, start:stop] - z.reshape(-1, 1)))
    return finish(accumulators, weight.scale, token_scale, grid.bias(bias, weight.scale.dtype)).to(x.dtype)


def weight_only(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x times the dequantized weight in the dtype of ``x``: (M, in) -> (M, out).

    A product of floats, whose sums no kernel adds up in a defined order: two of them are equal to rounding only.
    """
    if functional.capturing():
        return functional.weight_only(x, weight, bias)
    return F.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype)).to(x.dtype)
