"""The parts of an integer block as modules with integer buffers: Linear, LayerNorm, activation, attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.integer.attention import MEAN_FRACTION, attend, scale_scores, scores
from fairseq.modules.quantization.integer.checked import bounded
from fairseq.modules.quantization.integer.dyadic import Requantize, round_shift
from fairseq.modules.quantization.integer.normalization import normalize
from fairseq.modules.quantization.integer.piecewise import piecewise
from fairseq.modules.quantization.integer.published import attend_published, gelu
from fairseq.modules.quantization.integer.rows import HALF, quantize_rows, quantize_unsigned_rows
from fairseq.modules.quantization.packed.kernels import cuda
from fairseq.modules.quantization.packed.kernels.functional import int_product

BYTE, WIDE = 8, 16
MOST_INPUTS = 2**13
"""So that a sum of products of bytes, of 255 and 128 at most, is below 2**28, and times a row's scale below 2**43."""


def to_bytes(z: Tensor, bits: int, unsigned: bool = False) -> tuple[Tensor, Tensor | None]:
    """Bytes and the scale of each row, of 16-bit integers; 8-bit ones are bytes already, and have none."""
    if bits == WIDE:
        return quantize_unsigned_rows(z) if unsigned else quantize_rows(z)
    return bounded(z, BYTE, "static").to(torch.int8), None


class Spread(nn.Module):
    """Columns of 16 bits to bytes: one that reaches far becomes several bytes, whose sum it is.

    floor(z / n) + floor((z + 1) / n) + ... + floor((z + n - 1) / n) = z (Hermite), so that with n copies of the
    weight's column, n a power of two, the product is exact where one byte would saturate or be coarse for all others.

    Buffers:
        columns: int32 (inputs,): which column each byte is of.
        added: int32 (inputs,): 0 to n - 1. shift: int8 (inputs,): log2(n).

    Args:
        copies: of each column, 1, 2, 4, ...
        zero: the byte that stands for 0.
    """

    columns: Tensor
    added: Tensor
    shift: Tensor

    def __init__(self, copies: Tensor, zero: int):
        super().__init__()
        columns = torch.repeat_interleave(copies)
        first = copies.cumsum(0) - copies
        self.register_buffer("columns", columns.to(torch.int32))
        self.register_buffer("added", (torch.arange(len(columns)) - first[columns]).to(torch.int32))
        self.register_buffer("shift", torch.log2(copies[columns].double()).round().to(torch.int8))
        self.zero = zero

    def forward(self, z: Tensor) -> Tensor:
        """int64 (..., columns) of 16 bits -> int64 (..., inputs) of 8."""
        parts = (z[..., self.columns] + self.added.to(torch.int64)) >> self.shift.to(torch.int64)
        return (parts + self.zero).clamp(-128, 127)


class IntegerLinear(nn.Module):
    """Bytes times the weight's bytes into int32, times the row's scale, requantized.

    Buffers:
        weight: int8 (out, in).
        sums: int32 (out,), 128 times the sum of each row, where what is read are unsigned bytes less 128; or None.

    The constants of ``output`` hold the bias.
    """

    weight: Tensor
    sums: Tensor | None

    def __init__(self, weight: Tensor, output: Requantize, unsigned: bool = False):
        super().__init__()
        self.register_buffer("sums", (HALF * weight.sum(-1)).to(torch.int32) if unsigned else None)
        self.register_buffer("weight", weight.to(torch.int8).contiguous())
        self.output = output

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"

    def forward(self, q: Tensor, m: Tensor | None = None) -> Tensor:
        """int8 (..., in), int64 (..., 1) or None for 1 -> int64 (..., out) of the width of ``output``."""
        rows = q.reshape(-1, q.shape[-1])
        product = cuda.product if rows.is_cuda else int_product
        accumulator = product(rows.contiguous(), self.weight).to(torch.int64)
        if self.sums is not None:
            accumulator = accumulator + self.sums.to(torch.int64)
        accumulator = bounded(accumulator, 29, "sum of products").reshape(*q.shape[:-1], -1)
        result: Tensor = self.output(accumulator if m is None else accumulator * m)
        return result


class IntegerNorm(nn.Module):
    """LayerNorm of integers of 22 bits, weight and bias in the constants of ``output``.

    Buffers:
        eps: int64, see :func:`~fairseq.modules.quantization.integer.normalization.normalize`.
    """

    eps: Tensor

    def __init__(self, eps: int, output: nn.Module):
        super().__init__()
        self.register_buffer("eps", torch.tensor(eps, dtype=torch.int64))
        self.output = output

    def forward(self, h: Tensor) -> Tensor:
        """int64 (..., C) of 22 bits -> int64 (..., C) as ``output`` gives."""
        result: Tensor = self.output(normalize(h, self.eps))
        return result


class IntegerActivation(nn.Module):
    """An activation function by its table.

    Buffers:
        entries: int16 (2, 256), see :func:`~fairseq.modules.quantization.integer.piecewise.table`.
    """

    entries: Tensor

    def __init__(self, entries: Tensor, output: nn.Module):
        super().__init__()
        self.register_buffer("entries", entries.to(torch.int16))
        self.output = output

    def forward(self, t: Tensor) -> Tensor:
        """int64 (..., C) of 24 bits -> int64 (..., C) as ``output`` gives."""
        result: Tensor = self.output(piecewise(t, self.entries.to(torch.int64)))
        return result


class IntegerGELU(nn.Module):
    """GELU by a published function, see :mod:`~fairseq.modules.quantization.integer.published`.

    Buffers:
        constants: int64 (2,).

    Args:
        functions: "ibert" or "ivit".
    """

    constants: Tensor

    def __init__(self, constants: Tensor, functions: str, output: nn.Module):
        super().__init__()
        self.register_buffer("constants", constants)
        self.functions, self.output = functions, output

    def extra_repr(self) -> str:
        return f"functions={self.functions!r}"

    def forward(self, t: Tensor) -> Tensor:
        """int64 (..., C) of 24 bits -> int64 (..., C) as ``output`` gives."""
        result: Tensor = self.output(gelu(t, self.constants, self.functions))
        return result


class IntegerAttention(nn.Module):
    """Attention of all heads. Dynamic: q and k have a scale per token and head, v one per image and head.

    Buffers:
        multiplier, shift: int64 (heads, 1, 1), from products of q and k to scores.

    Args:
        functions: "default", or "ibert" or "ivit" for their softmax.
    """

    multiplier: Tensor
    shift: Tensor

    def __init__(self, multiplier: Tensor, shift: Tensor, dynamic: bool, output: nn.Module, functions: str = "default"):
        super().__init__()
        self.register_buffer("multiplier", multiplier.to(torch.int64))
        self.register_buffer("shift", shift.to(torch.int64))
        self.dynamic, self.output, self.functions = dynamic, output, functions

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """int64 (B, T, heads * d) each, of 16 bits if dynamic, else of 8 -> the same, as ``output`` gives."""
        query, key, value = (self._heads(x) for x in (query, key, value))  # (B, heads, T, d)
        if self.dynamic:
            (q, query_m), (k, key_m) = quantize_rows(query), quantize_rows(key)
            v, value_m = quantize_rows(value, dims=(-2, -1))
            u = scale_scores(scores(q, k), query_m, key_m, self.multiplier, self.shift)
        else:
            q, k, v = (bounded(x, BYTE, "static").to(torch.int8) for x in (query, key, value))
            u, value_m = round_shift(scores(q, k) * self.multiplier, self.shift), torch.ones_like(self.shift)
        mixed = (attend(u, v) if self.functions == "default" else attend_published(u, v, self.functions)) * value_m
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return result

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (len(self.multiplier), -1)).transpose(1, 2)


VALUE_STEP = 2.0**-MEAN_FRACTION
