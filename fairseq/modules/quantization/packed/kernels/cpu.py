"""CPU kernels: products of integers, or of floats, on slices of the batch that stay in the cache, in scratch memory."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.float_product import float_product
from fairseq.modules.quantization.packed.input_grid import InputGrid
from fairseq.modules.quantization.packed.kernels import functional
from fairseq.modules.quantization.packed.kernels.epilogue import finish
from fairseq.modules.quantization.packed.weight import PackedWeight, unpack_codes
from fairseq.modules.quantization.scalar.ops import clamp_to
from fairseq.modules.quantization.scalar.tokens import static_offset, token_limit

SLICE = 600_000  # elements of a slice's activations per thread: two pictures of a ViT-Base on two threads
WEIGHTS_AT_ONCE = 4_000_000  # elements of a weight that are dequantized at once
EXACT_IN_FLOAT32 = 1024  # products of two bytes, the largest of 2**14, have exact sums in any order: up to 2**24


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
        count = math.prod(shape)
        held = self.pool.get((name, dtype))
        if held is None or held.numel() < count:
            with torch.inference_mode(False):  # to be written in any mode later
                held = self.pool[name, dtype] = torch.empty(count, dtype=dtype, device="cpu")
        return held[:count].view(shape)


scratch = Scratch()


def product(q: Tensor, codes: Tensor) -> Tensor:
    """(M, K) int8 times (N, K) int8 transposed: (M, N) int32."""
    return functional.int_product(q, codes)


def product_of_floats(q: Tensor, codes: Tensor) -> Tensor:
    """The same in floats, which are exact: of 32 bits, in a graph of 64; in ONNX the product of integers."""
    if torch.onnx.is_in_onnx_export():
        return functional.int_product(q, codes)
    if functional.capturing() or not functional.plain(q, codes):  # where autocast would narrow those of 32 bits
        return (q.double() @ codes.double().t()).to(torch.int32)
    out = q.new_empty((len(q), len(codes)), dtype=torch.int32)
    _sum_floats(q.to(torch.float32), codes.to(torch.float32), out)
    return out


@functools.cache
@plain_context()
def floats_are_faster() -> bool:
    """Whether float32 products are faster here than torch._int_mm, which is slow without an instruction for bytes.

    Both take turns, once in a process, for some 20 ms; the least of their times counts.
    """
    generator = torch.Generator().manual_seed(0)
    q, codes = (torch.randint(-128, 128, (size, 256), generator=generator).to(torch.int8) for size in (64, 128))
    seconds = {product: math.inf, product_of_floats: math.inf}
    try:
        for _ in range(6):
            for form in seconds:
                begun = time.perf_counter()
                form(q, codes)
                seconds[form] = min(seconds[form], time.perf_counter() - begun)
    except Exception:  # which choose() finds, too, and says
        return True
    return seconds[product_of_floats] < seconds[product]


def integer(x: Tensor, weight: PackedWeight, bias: Tensor | None, grid: InputGrid, of_floats: bool = False) -> Tensor:
    """Integer products of quantized activations: (M, in) -> (M, out), the bits of the reference.

    Args:
        x: floating, of any strides.
        weight: on the CPU.
        bias: (out,) or None.
        grid: how ``x`` becomes integers.
        of_floats: multiply by :func:`product_of_floats`.
    """
    if functional.capturing() or not functional.plain(x):
        return functional.integer(x, weight, bias, grid, product_of_floats if of_floats else product)
    outputs, compute = len(weight.codes), weight.scale.dtype
    out = x.new_empty(len(x), outputs)
    if out.numel() == 0 or weight.in_features == 0:
        return out.copy_(bias) if bias is not None else out.zero_()
    weight = weight._replace(codes=_codes(weight))
    real = scratch.take("codes", tuple(weight.codes.shape), torch.float32).copy_(weight.codes) if of_floats else None
    bias, zero_point = grid.bias(bias, compute), weight.code_zero_point()
    step = _rows(max(weight.in_features, outputs))
    for part, result in zip(x.split(step), out.split(step), strict=True):
        _multiply(_quantize(part, compute, grid), weight, real, zero_point, bias, result)
    return out


integer_of_floats = functools.partial(integer, of_floats=True)


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
        float_product(x, real, out=out[:, rows])
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


def _multiply(
    tokens: Tokens,
    weight: PackedWeight,
    real_codes: Tensor | None,
    zero_point: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """One slice: products, of floats if there are ``real_codes``, and the epilogue, into ``out``."""
    compute, shape = weight.scale.dtype, tuple(out.shape)
    real = out if out.dtype == compute else scratch.take("result", shape, compute)
    term = None if weight.group_size is None else scratch.take("term", shape, compute)
    sums = _accumulators(tokens, weight, real_codes, zero_point, shape)
    finish(sums, weight.scale, tokens.scale, bias, real, term)
    if real is not out:
        out.copy_(real)


def _accumulators(
    tokens: Tokens, weight: PackedWeight, real_codes: Tensor | None, zero_point: Tensor, shape: tuple[int, ...]
) -> Iterator[Tensor]:
    """The sums of each group of columns, int32 (M, N), each in the memory of the one before."""
    accumulator = scratch.take("accumulator", shape, torch.int32)
    grouped = weight.group_size is not None
    if real_codes is not None:
        real = scratch.take("tokens", tuple(tokens.q.shape), torch.float32).copy_(tokens.q)
    for group, (start, stop) in enumerate(weight.columns()):
        q = tokens.q[:, start:stop]
        if real_codes is not None:
            _sum_floats(real[:, start:stop], real_codes[:, start:stop], accumulator)
        else:
            codes = weight.codes[:, start:stop]
            q, codes = (t.contiguous() if grouped else t for t in (q, codes))
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


def _sum_floats(q: Tensor, codes: Tensor, out: Tensor) -> None:
    """float32 (M, K) times (N, K) transposed, of integers of 8 bits, into ``out``, int32 (M, N)."""
    sums = scratch.take("sums", tuple(out.shape), torch.float32)
    for start in range(0, q.shape[1], EXACT_IN_FLOAT32):
        columns = slice(start, start + EXACT_IN_FLOAT32)
        torch.mm(q[:, columns], codes[:, columns].t(), out=sums)
        if start == 0:
            out.copy_(sums)
        else:
            out.add_(sums.to(torch.int32))
