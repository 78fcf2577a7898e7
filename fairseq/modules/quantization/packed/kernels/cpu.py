"""CPU kernels: torch._int_mm on slices of the batch that stay in the cache, in memory that is used again and again."""

from __future__ import annotations

import threading
import weakref
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.kernels import functional
from fairseq.modules.quantization.packed.weight import PackedWeight, unpack_codes
from fairseq.modules.quantization.scalar.tokens import LIMIT

SLICE = 600_000  # elements of a slice's activations per thread: two pictures of a ViT-Base on two threads
BLOCK = 4_000_000  # elements of activations held as integers at once; a batch beyond it is run in blocks
WEIGHTS_AT_ONCE = 4_000_000  # elements of a weight that are dequantized at once


class Source(NamedTuple):
    """Where activations come from: the tensor a layer was called with, and which layer. See :class:`Tokens`."""

    tensor: Tensor
    layer: int


class Tokens(NamedTuple):
    """Quantized activations, in scratch memory: int8 (M, K), scale (M, 1), sums of the integers int32 (M, 1)."""

    q: Tensor
    scale: Tensor
    sums: Tensor


class Scratch(threading.local):
    """Memory of one thread for all layers, and the activations that it quantized last."""

    def __init__(self) -> None:
        self.pool: dict[tuple[str, torch.dtype], Tensor] = {}
        self.tokens: Tokens | None = None
        self.tensor: weakref.ref[Tensor] | None = None
        self.version = 0
        self.dtype = torch.float32
        self.layers: set[int] = set()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory called ``name`` of this shape, with whatever is in it."""
        count = prod(shape)
        held = self.pool.get((name, dtype))
        if held is None or held.numel() < count:
            with torch.inference_mode(False):  # to be written in any mode later
                held = self.pool[name, dtype] = torch.empty(count, dtype=dtype)
        return held[:count].view(shape)

    def reuse(self, source: Source, dtype: torch.dtype) -> Tokens | None:
        """The last quantized activations, if ``source`` is the same, unchanged tensor and the layer another one.

        The query, key and value of a layer read one tensor; it is quantized once. A layer that has used it already is
        being called anew, perhaps with other numbers in the tensor, which inference tensors do not tell.
        """
        if self.tensor is None or self.tensor() is not source.tensor or source.layer in self.layers:
            return None
        if self.version != _version(source.tensor) or self.dtype != dtype:
            return None
        self.layers.add(source.layer)
        return self.tokens

    def remember(self, source: Source, tokens: Tokens, dtype: torch.dtype) -> None:
        """Keep ``tokens`` for the other layers that read the same tensor."""
        self.tokens, self.tensor, self.version = tokens, weakref.ref(source.tensor), _version(source.tensor)
        self.dtype, self.layers = dtype, {source.layer}

    def forget(self) -> None:
        """The integers in memory are about to be overwritten."""
        self.tokens = self.tensor = None


scratch = Scratch()


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def product(q: Tensor, codes: Tensor) -> Tensor:
    """(M, K) int8 times (N, K) int8 transposed: (M, N) int32."""
    return functional.int_product(q, codes)


def dynamic(x: Tensor, weight: PackedWeight, bias: Tensor | None, source: Source | None = None) -> Tensor:
    """Integer products of activations quantized per token: (M, in) -> (M, out).

    Args:
        x: floating, of any strides.
        weight: on the CPU.
        bias: (out,) or None.
        source: lets other layers that are called with the same tensor use the quantized activations, too.
    """
    if functional.capturing():
        return functional.dynamic(x, weight, bias, product)
    outputs, compute = len(weight.codes), weight.scale.dtype
    out = torch.empty(len(x), outputs, dtype=x.dtype)
    if out.numel() == 0 or weight.in_features == 0:
        return out.copy_(bias) if bias is not None else out.zero_()
    weight = weight._replace(codes=_codes(weight))
    bias = None if bias is None else bias.to(compute)
    rows = max(1, BLOCK // weight.in_features)
    shared = source if len(x) <= rows else None
    for part, result in zip(x.split(rows), out.split(rows), strict=True):
        tokens = None if shared is None else scratch.reuse(shared, compute)
        if tokens is None:
            tokens = _quantize(part, compute)
            if shared is not None:
                scratch.remember(shared, tokens, compute)
        step = _rows(max(weight.in_features, outputs))
        for piece in zip(*(t.split(step) for t in tokens), result.split(step), strict=True):
            _multiply(Tokens(*piece[:3]), weight, bias, piece[3])
    return out


def weight_only(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x times the dequantized weight in the dtype of ``x``: (M, in) -> (M, out)."""
    if functional.capturing() or weight.group_size is not None or x.numel() == 0:
        return functional.weight_only(x, weight, bias)
    codes, scale, zero_point = _codes(weight), weight.scale, weight.code_zero_point()
    outputs, inputs = codes.shape
    out = torch.empty(len(x), outputs, dtype=x.dtype)
    step = max(1, WEIGHTS_AT_ONCE // inputs)
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        one = scale.numel() == 1
        s, z = (scale, zero_point) if one else (scale[rows, None], zero_point[rows, None])
        part = codes[rows]
        real = scratch.take("weight", tuple(part.shape), scale.dtype)
        real.copy_(part).sub_(z).mul_(s)
        if x.dtype != scale.dtype:
            real = scratch.take("weight", tuple(part.shape), x.dtype).copy_(real)
        torch.mm(x, real.t(), out=out[:, rows])
    return out if bias is None else out.add_(bias)


def _rows(features: int) -> int:
    """Tokens of a slice whose activations stay in the cache."""
    return max(1, SLICE * torch.get_num_threads() // max(features, 1))


def _codes(weight: PackedWeight) -> Tensor:
    """int8 (out, in): in scratch memory if they have to be unpacked."""
    if not weight.is_packed:
        return weight.codes
    shape = (len(weight.codes), weight.in_features)
    return unpack_codes(weight.codes, weight.bits, weight.in_features, out=scratch.take("codes", shape, torch.uint8))


def _quantize(x: Tensor, compute: torch.dtype) -> Tokens:
    """quantize_tokens, slice by slice and in place."""
    scratch.forget()
    count, features = x.shape
    q = scratch.take("q", (count, features), torch.int8)
    scale = torch.empty(count, 1, dtype=compute)
    sums = torch.empty(count, 1, dtype=torch.int32)
    step = _rows(features)
    tiny = torch.finfo(compute).tiny
    for start in range(0, count, step):
        rows = slice(start, start + step)
        part = x[rows]
        real = scratch.take("real", tuple(part.shape), compute)
        if part.dtype == compute:
            magnitude = torch.abs(part, out=real)
        else:
            part = real.copy_(part)
            magnitude = part.abs()
        s = magnitude.amax(-1, keepdim=True).mul_(1 / LIMIT).clamp_(min=tiny)
        torch.div(part, s, out=real).round_()
        q[rows] = real
        sums[rows] = real.sum(-1, keepdim=True)
        scale[rows] = s
    return Tokens(q, scale, sums)


def _multiply(tokens: Tokens, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> None:
    """One slice: product, correction for the zero point, scales, bias; into ``out``."""
    compute, zero_point = weight.scale.dtype, weight.code_zero_point()
    shape = (len(out), out.shape[1])
    accumulator = scratch.take("accumulator", shape, torch.int32)
    real = out if out.dtype == compute else scratch.take("result", shape, compute)
    if weight.scale.ndim == 2:
        term = scratch.take("term", shape, compute)
        for group, (start, stop) in enumerate(weight.columns()):
            q = tokens.q[:, start:stop].contiguous()
            torch._int_mm(q, weight.codes[:, start:stop].contiguous().t(), out=accumulator)
            if not weight.centred:
                accumulator.addcmul_(q.sum(-1, keepdim=True, dtype=torch.int32), zero_point[:, group], value=-1)
            if group == 0:
                real.copy_(accumulator).mul_(weight.scale[:, 0])
            else:
                real.addcmul_(term.copy_(accumulator), weight.scale[:, group])
        real.mul_(tokens.scale)
        if bias is not None:
            real.add_(bias)
    else:
        torch._int_mm(tokens.q, weight.codes.t(), out=accumulator)
        if not weight.centred:
            accumulator.addcmul_(tokens.sums, zero_point, value=-1)
        real.copy_(accumulator)
        one = weight.scale.numel() == 1
        factor = tokens.scale * weight.scale if one else weight.scale
        if not one:
            real.mul_(tokens.scale)
        if bias is None:
            real.mul_(factor)
        else:
            torch.addcmul(bias, real, factor, out=real)
    if real is not out:
        out.copy_(real)
