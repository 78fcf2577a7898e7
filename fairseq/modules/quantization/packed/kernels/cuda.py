"""CUDA kernels: torch._int_mm on padded shapes; scaling in plain operations, which torch.compile fuses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq.modules.quantization.packed.input_grid import InputGrid
from fairseq.modules.quantization.packed.kernels import functional
from fairseq.modules.quantization.packed.weight import PackedWeight

MIN_TOKENS = 17  # cuBLASLt's int8 product wants more than 16 rows, and inner and outer sizes in multiples of 8
MULTIPLE = 8


def product(q: Tensor, codes: Tensor) -> Tensor:
    """(M, K) int8 times (N, K) int8 transposed: (M, N) int32; padded to what cuBLASLt takes, and cut again."""
    columns, inner = codes.shape
    if torch.onnx.is_in_onnx_export():
        return functional.int_product(q, codes)
    # What is recorded must take any number of rows, so there they are always added.
    more = MIN_TOKENS if functional.capturing() else max(MIN_TOKENS - len(q), 0)
    padded = F.pad(q, (0, -inner % MULTIPLE, 0, more)).contiguous()
    codes = F.pad(codes, (0, -inner % MULTIPLE, 0, -columns % MULTIPLE)).contiguous()
    return torch._int_mm(padded, codes.t())[: q.shape[0], :columns]


def integer(x: Tensor, weight: PackedWeight, bias: Tensor | None, grid: InputGrid) -> Tensor:
    """Integer products of quantized activations: (M, in) -> (M, out)."""
    return functional.integer(x, weight, bias, grid, product)


weight_only = functional.weight_only
