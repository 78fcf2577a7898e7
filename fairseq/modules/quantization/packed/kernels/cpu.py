"""CPU kernels: torch._int_mm on slices of the batch that stay in the cache, in memory that is used again and again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.input_grid import InputGrid
from fairseq.modules.quantization.packed.kernels import functional
from fairseq.modules.quantization.packed.kernels.epilogue import finish
from fairseq.modules.quantization.packed.weight import PackedWeight, unpack_codes
from fairseq.modules.quantization.scalar.ops import clamp_to
from fairseq.modules.quantization.scalar.tokens import static_offset, token_limit

SLICE = 600_000  # elements of a slice's activations per thread: two pictures of a ViT-Base on two threads
WEIGHTS_AT_ONCE = 4_000_000  # elements of a weight that are dequantized at once


class Tokens(NamedTuple):
    """Quantized activations, in scratch memory: int8 (M, K), scale (M, 1), sums of the integers int32 (M, 1)."""

    q: Tensor
    scale: Tensor
    sums: Tensor


class Scratch(threading.local):
    """Memory of one thread for all layers."""

    def __init__(self) -> None:
        self.pool: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory called ``name`` of this shape, with whatever is in it."""
        count = prod(shape)
        held = self.pool.get((name, dtype))
        if held is None or held.numel() < count:
            with torch.inference_mode(False):  # to be written in any mode later
                held = self.pool[name, dtype] = torch.empty(count, dtype=dtype, device="cpu")
        return held[:count].view(shape)


scratch = Scratch()


def product(q: Tensor, codes: Tensor) -> Tensor:
    """(M, K) int8 times (N, K) int8 transposed: (M, N) int32."""
    return functional.int_product(q, codes)


def integer(x: Tensor, weight: PackedWeight, bias: Tensor | None, grid: InputGrid) -> Tensor:
    """Integer products of quantized activations: (M, in) -> (M, out), the bits of the reference.

    Args:
        x: floating, of any strides.
        weight: on the CPU.
        bias: (out,) or None.
        grid: how ``x`` becomes integers.
    """
    if functional.capturing() or not functional.plain(x):
        return functional.integer(x, weight, bias, grid, product)
    outputs, compute = len(weight.codes), weight.scale.dtype
    out = x.new_empty(len(x), outputs)
    if out.numel() == 0 or weight.in_features == 0:
        return out.copy_(bias) if bias is not None else out.zero_()
    weight = weight._replace(codes=_codes(weight))
    bias, zero_point = grid.bias(bias, compute), weight.code_zero_point()
    step = _rows(max(weight.in_features, outputs))
    for part, result in zip(x.split(step), out.split(step), strict=True):
        _multiply(_quantize(part, compute, grid), weight, zero_point, bias, result)
    return out


def weight_only(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x times the dequantized weight in the dtype of ``x``: (M, in) -> (M, out).

    In the dtype of the scale the product is of x and q - zero_point, which are exact, and the output is scaled: there
    are fewer outputs than weights. A narrower dtype takes the dequantized weight, rounded to it. The order in which
    these floats are added up is defined nowhere: the result equals that of other kernels to rounding only.
    """
    recorded = functional.capturing() or not functional.plain(x)
    if recorded or weight.group_size is not None or x.numel() == 0:
        return functional.weight_only(x, weight, bias)
    codes, scale, zero_point = _codes(weight), weight.scale, weight.code_zero_point()
    outputs, inputs = codes.shape
    one, late = scale.numel() == 1, x.dtype == scale.dtype
    out = x.new_empty(len(x), outputs)
    step = max(1, WEIGHTS_AT_ONCE // inputs)
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        part = codes[rows]
        real = scratch.take("weight", tuple(part.shape), scale.dtype)
        real.copy_(part)
        if not weight.centred:
            real.sub_(zero_point if one else zero_point[rows, None])
        if not late:
            real.mul_(scale if one else scale[rows, None])
            real = scratch.take("weight", tuple(part.shape), x.dtype).copy_(clamp_to(real, x.dtype))
        torch.mm(x, real.t(), out=out[:, rows])
    if not late:
        return out if bias is None else out.add_(bias)
    return out.mul_(scale) if bias is None else torch.addcmul(bias.to(x.dtype), out, scale, out=out)


def _rows(features: int) -> int:
    """Tokens of a slice whose activations stay in the cache."""
    return max(1, SLICE * torch.get_num_threads() // max(features, 1))


def _codes(weight: PackedWeight) -> Tensor:
    """int8 (out, in): in scratch memory if they have to be unpacked."""
    if not weight.is_packed():
        return weight.codes
    shape = (len(weight.codes), weight.in_features)
    return unpack_codes(weight.codes, weight.bits, weight.in_features, out=scratch.take("codes", shape, torch.uint8))


def _quantize(x: Tensor, compute: torch.dtype, grid: InputGrid) -> Tokens:
    """grid.quantize and the sums of its integers, in place."""
    q, real = scratch.take("q", tuple(x.shape), torch.int8), scratch.take("real", tuple(x.shape), compute)
    if grid.scale is not None and grid.zero_point is not None:
        half = static_offset(grid.bits)
        x = x if x.dtype == compute else real.copy_(x)
        q.copy_(torch.div(x, grid.scale, out=real).round_().add_(grid.zero_point).clamp_(-half, half - 1))
        sums = real.sum(-1, keepdim=True)
        return Tokens(q, sums * 0 + grid.scale, sums.to(torch.int32))
    if grid.bits != 8:
        rounded, scale = grid.quantize(x.to(compute))
        return Tokens(q.copy_(rounded), scale, rounded.sum(-1, keepdim=True).to(torch.int32))
    if x.dtype == compute:
        magnitude = torch.abs(x, out=real)
    else:
        x = real.copy_(x)
        magnitude = x.abs()
    scale = magnitude.amax(-1, keepdim=True).mul_(1 / token_limit(8)).clamp_(min=torch.finfo(compute).tiny)
    q.copy_(torch.div(x, scale, out=real).round_())
    return Tokens(q, scale, real.sum(-1, keepdim=True).to(torch.int32))


def _multiply(tokens: Tokens, weight: PackedWeight, zero_point: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """One slice: products and the epilogue, into ``out``."""
    compute, shape = weight.scale.dtype, tuple(out.shape)
    real = out if out.dtype == compute else scratch.take("result", shape, compute)
    term = None if weight.group_size is None else scratch.take("term", shape, compute)
    finish(_accumulators(tokens, weight, zero_point, shape), weight.scale, tokens.scale, bias, real, term)
    if real is not out:
        out.copy_(real)


def _accumulators(tokens: Tokens, weight: PackedWeight, zero_point: Tensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The sums of each group of columns, int32 (M, N), each in the memory of the one before."""
    accumulator = scratch.take("accumulator", shape, torch.int32)
    for group, (start, stop) in enumerate(weight.columns()):
        grouped = weight.group_size is not None
        q, codes = (t[:, start:stop].contiguous() if grouped else t for t in (tokens.q, weight.codes))
        _product_into(q, codes, accumulator)
        if not weight.centred:
            sums = q.sum(-1, keepdim=True, dtype=torch.int32) if grouped else tokens.sums
            zero = zero_point[:, group] if grouped else zero_point
            if zero.numel() == 1:
                accumulator.sub_(sums * zero)  # addcmul_ with two broadcast factors is not vectorized
            else:
                accumulator.addcmul_(sums, zero, value=-1)  # of integers, and so exact
        yield accumulator


def _product_into(q: Tensor, codes: Tensor, out: Tensor) -> None:
    """:func:`product` into ``out``."""
    if q.shape[1] == 1:  # see int_product
        out.copy_(product(q, codes))
    else:
        torch._int_mm(q, codes.t(), out=out)
