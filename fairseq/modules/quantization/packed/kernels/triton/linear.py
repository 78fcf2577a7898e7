"""A packed layer on the Triton kernels, where they can run it; else on torch._int_mm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.input_grid import InputGrid
from fairseq.modules.quantization.packed.kernels import cuda, functional
from fairseq.modules.quantization.packed.kernels.triton.codes import byte_codes
from fairseq.modules.quantization.packed.kernels.triton.support import capability
from fairseq.modules.quantization.packed.kernels.triton.tiles import tile_for
from fairseq.modules.quantization.packed.weight import PackedWeight


def _kernels() -> Any:
    """The modules that import Triton: not before one of them runs."""
    from fairseq.modules.quantization.packed.kernels.triton import operators, product, quantize

    return operators, product, quantize


def product(q: Tensor, codes: Tensor) -> Tensor:
    """(M, K) int8 times (N, K) int8 transposed: (M, N) int32."""
    if functional.capturing() or not functional.plain(q):
        return cuda.product(q, codes)
    _, products, _ = _kernels()
    tile = tile_for(capability(q.device), len(q), len(codes))
    result: Tensor = products.run_raw(q.contiguous(), codes.contiguous(), tile)
    return result


def reason_not_runnable(bits: int, scale: torch.dtype, group_size: int | None) -> str | None:
    """Why the kernels take no layer of such integers and such a scale, or None. ``bits``: of the activations."""
    if bits != 8:
        return f"activation_bits={bits}"
    if group_size is not None:
        return f"group_size={group_size}"
    return None if scale == torch.float32 else f"a scale of {scale}"


def integer(x: Tensor, weight: PackedWeight, bias: Tensor | None, grid: InputGrid) -> Tensor:
    """Integer products of quantized activations: (M, in) -> (M, out), the bits of the reference."""
    recorded = functional.recording() or not functional.plain(x)
    if recorded or x.dtype == torch.float64 or weight.in_features == 0:
        return functional.integer(x, weight, bias, grid, cuda.product)
    if reason_not_runnable(grid.bits, weight.scale.dtype, weight.group_size):
        return functional.integer(x, weight, bias, grid, product)
    operators, products, quantize = _kernels()
    parts = weight.codes, weight.scale, weight.zero_point, weight.bits, weight.centred, bias, grid.correction
    x = x if x.stride(-1) == 1 else x.contiguous()
    result: Tensor
    if torch.compiler.is_compiling():
        rows = operators.triton_quantize(x, grid.scale, grid.zero_point)
        result = operators.triton_product(*rows, *parts, x.dtype)
    else:
        codes = byte_codes(weight.codes, weight.bits, weight.in_features)
        tile = tile_for(capability(x.device), len(x), len(codes))
        rows = quantize.run(x, grid.scale, grid.zero_point, None)
        result = products.run(rows, products.Weight(codes, *parts[1:]), tile, x.dtype)
    return result


weight_only = functional.weight_only
