"""CUDA kernels: torch._int_mm on padded shapes; scaling in plain operations, which torch.compile fuses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq.modules.quantization.packed.kernels import functional
from fairseq.modules.quantization.packed.weight import PackedWeight

MIN_TOKENS = 17  # cuBLASLt's int8 product wants more than 16 rows, and inner and outer sizes in multiples of 8
MULTIPLE = 8


def product(q: Tensor, codes: Tensor) -> Tensor:
    """(M, K) int8 times (N, K) int8 transposed: (M, N) int32; padded to what cuBLASLt takes, and cut again."""
    rows, columns, inner = len(q), len(codes), q.shape[1]
    if torch.onnx.is_in_onnx_export():
        return functional.int_product(q, codes)
    q = F.pad(q, (0, -inner % MULTIPLE, 0, max(MIN_TOKENS - rows, 0)))
    codes = F.pad(codes, (0, -inner % MULTIPLE, 0, -columns % MULTIPLE))
    return torch._int_mm(q.contiguous(), codes.contiguous().t())[:rows, :columns]


def dynamic(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Integer products of activations quantized per token: (M, in) -> (M, out)."""
    return functional.dynamic(x, weight, bias, product)


weight_only = functional.weight_only
