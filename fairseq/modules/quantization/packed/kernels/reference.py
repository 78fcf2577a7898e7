"""The definition of correct: int64 products and float64 scaling, one step after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq.modules.quantization.packed.input_grid import InputGrid
from fairseq.modules.quantization.packed.kernels import functional
from fairseq.modules.quantization.packed.weight import PackedWeight


def product(q: Tensor, codes: Tensor) -> Tensor:
    """(M, K) int8 times (N, K) int8 transposed: (M, N) int32, exact."""
    return (q.to(torch.int64) @ codes.to(torch.int64).T).to(torch.int32)


def integer(x: Tensor, weight: PackedWeight, bias: Tensor | None, grid: InputGrid) -> Tensor:
    """x quantized times the weight's integers, scaled, plus bias: (M, in) -> (M, out), dtype of ``x``.

    y[m, n] = s_x[m] * sum over groups g of s_w[n, g] * sum over k in g of (q_x[m, k] - z_x) * (q_w[n, k] - z_w[n, g])
              + b[n]
    """
    if functional.capturing():  # exporters know no products of int64 and no view as another dtype
        into_onnx = torch.onnx.is_in_onnx_export()
        return functional.integer(x, weight, bias, grid, functional.int_product if into_onnx else product)
    q, token_scale = grid.quantize(x.to(weight.scale.dtype))
    q = grid.centre(q)
    integers, zero_point = weight.integers().to(torch.int64), weight.zero_point.to(torch.int64)
    scale = weight.scale.to(torch.float64)
    y = torch.zeros(len(x), len(integers), dtype=torch.float64, device=x.device)
    for group, (start, stop) in enumerate(weight.columns()):
        s, z = (scale[:, group], zero_point[:, group]) if scale.ndim == 2 else (scale, zero_point)
        accumulator = q[:, start:stop].to(torch.int64) @ (integers[:, start:stop] - z.reshape(-1, 1)).T
        y += accumulator * s
    y *= token_scale
    if bias is not None:
        y += bias
    return y.to(x.dtype)


def weight_only(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x times the dequantized weight in the dtype of ``x``: (M, in) -> (M, out)."""
    if functional.capturing():
        return functional.weight_only(x, weight, bias)
    return F.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype)).to(x.dtype)
