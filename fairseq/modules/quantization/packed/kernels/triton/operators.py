"""The kernels as operators of torch, which torch.compile takes as they are; a plain call bypasses them."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.kernels.triton import product, quantize
from fairseq.modules.quantization.packed.kernels.triton.codes import byte_codes
from fairseq.modules.quantization.packed.kernels.triton.support import capability
from fairseq.modules.quantization.packed.kernels.triton.tiles import tile_for


@torch.library.custom_op("fairseq::triton_quantize", mutates_args=())
def triton_quantize(x: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`quantize.run` without a factor: (M, K) -> the three of :class:`quantize.Rows`."""
    q, scales, sums = quantize.run(x, scale, zero_point, None)
    return q, scales, sums


@triton_quantize.register_fake
def _(x: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, scales, sums = quantize.empty_rows(x.shape[0], x.shape[1], x.device)
    return q, scales, sums


@torch.library.custom_op("fairseq::triton_product", mutates_args=())
def triton_product(
    q: Tensor,
    token_scale: Tensor,
    sums: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    centred: bool,
    bias: Tensor | None,
    correction: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`product.run`: quantized rows and the parts of a :class:`product.Weight`, whose codes may be
    packed -> (M, N) as ``dtype``.
    """
    codes = byte_codes(codes, bits, q.shape[1])
    weight = product.Weight(codes, scale, zero_point, bits, centred, bias, correction)
    tile = tile_for(capability(q.device), len(q), len(codes))
    return product.run(quantize.Rows(q, token_scale, sums), weight, tile, dtype)


@triton_product.register_fake
def _(
    q: Tensor,
    token_scale: Tensor,
    sums: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    centred: bool,
    bias: Tensor | None,
    correction: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return q.new_empty(q.shape[0], codes.shape[0], dtype=dtype)
