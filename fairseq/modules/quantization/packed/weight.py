"""PackedWeight: the integers of one Linear as they lie in memory, and what every kernel needs to know of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.packed.packing import pack, unpack
from fairseq.modules.quantization.scalar.weights import weight_to_real

SPLIT = 128


class PackedWeight(NamedTuple):
    """real = scale * (q - zero_point), q unsigned integers of ``bits`` bits, held as ``codes``.

    A code is an integer that fits int8, as the products take it: q itself up to 7 bits, q - 128 at 8.

    Attributes:
        codes: int8 (out, in), a byte per code; or uint8 (out, packed_length(in, bits)), see ``packing``.
        scale: float32 or float64, shape (1,), (out,) or (out, groups).
        zero_point: uint8 in [0, 2**bits - 1], the shape of ``scale``.
        bits: 2 to 8.
        in_features: length of a row.
        group_size: columns that share a scale, or None.
        centred: the zero point is the code 0 everywhere, so products need no correction.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    in_features: int
    group_size: int | None
    centred: bool

    def is_packed(self) -> bool:
        """Whether several codes share a byte."""
        return self.codes.dtype == torch.uint8

    def unpacked(self) -> Tensor:
        """The codes, int8 of shape (out, in)."""
        return unpack_codes(self.codes, self.bits, self.in_features) if self.is_packed() else self.codes

    def code_zero_point(self) -> Tensor:
        """The code that stands for 0.0: int32, the shape of ``scale``."""
        zero_point = self.zero_point.to(torch.int32)
        offset = code_offset(self.bits)
        return zero_point - offset if offset else zero_point

    def integers(self) -> Tensor:
        """q, uint8 of shape (out, in)."""
        return self.unpacked().view(torch.uint8) ^ code_offset(self.bits)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as real numbers, (out, in), as ``dtype`` or in the dtype of ``scale``."""
        dtype = dtype or self.scale.dtype
        return weight_to_real(self.unpacked(), self.scale, self.code_zero_point(), self.group_size, dtype)

    def columns(self) -> list[tuple[int, int]]:
        """(first, past the last) column of each group."""
        step = self.group_size or max(self.in_features, 1)
        return [(start, min(start + step, self.in_features)) for start in range(0, self.in_features, step)]


def check_integers(q: Tensor, scale: Tensor, zero_point: Tensor, config: LinearConfig, name: str) -> None:
    """Raise unless these are a weight's integers, scale and zero point as ``config`` says; shapes: see PackedWeight.

    Raises:
        TypeError: q is not uint8, the scale not float32 or float64, or the zero point not of integers.
        ValueError: the shapes do not fit, an integer is out of range, or a scale is not positive and finite.
    """
    if q.dtype != torch.uint8:
        raise TypeError(f"the integers of {name} must be uint8, got {q.dtype}")
    if scale.dtype not in (torch.float32, torch.float64) or zero_point.is_floating_point():
        raise TypeError(
            f"{name} needs a scale of float32 or float64 and a zero point of integers, "
            f"got {scale.dtype} and {zero_point.dtype}"
        )
    if q.ndim != 2 or q.numel() == 0:
        raise ValueError(f"the integers of {name} must have the shape (out, in), not empty; got {tuple(q.shape)}")
    outputs, inputs = q.shape
    expected: tuple[int, ...] = (1,) if config.method == "tensor" else (outputs,)
    if config.group_size is not None:
        expected = (outputs, -(-inputs // config.group_size))
    if scale.shape != expected or zero_point.shape != expected:
        raise ValueError(
            f"{name} needs a scale and a zero point of shape {expected} for method {config.method!r} and "
            f"group_size {config.group_size}, got {tuple(scale.shape)} and {tuple(zero_point.shape)}"
        )
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"the scale of {name} must be positive and finite")
    largest = 2**config.bits - 1
    if int(q.max()) > largest or int(zero_point.min()) < 0 or int(zero_point.max()) > largest:
        raise ValueError(
            f"{config.bits}-bit integers and zero points are from 0 to {largest}; in {name} they reach {int(q.max())}, "
            f"and {int(zero_point.min())} to {int(zero_point.max())}"
        )
    if config.symmetric and not bool((zero_point == 2 ** (config.bits - 1)).all()):
        raise ValueError(f"{name} is symmetric, so that its zero point must be {2 ** (config.bits - 1)} everywhere")


def code_offset(bits: int) -> int:
    """q - code: 128 at 8 bits, where q does not fit int8, else 0."""
    return SPLIT if bits == 8 else 0


def to_codes(q: Tensor, bits: int) -> Tensor:
    """Unsigned integers (uint8) to codes (int8)."""
    return (q ^ SPLIT if code_offset(bits) else q).view(torch.int8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (int8, (out, in)) to the bytes that are saved: uint8 (out, packed_length(in, bits))."""
    return codes.contiguous().view(torch.uint8) if bits == 8 else pack(codes.view(torch.uint8), bits)


def unpack_codes(packed: Tensor, bits: int, length: int, out: Tensor | None = None) -> Tensor:
    """Undoes :func:`pack_codes`: int8 (out, in); in the memory of ``out`` (uint8) if given."""
    if bits == 8:
        return packed.view(torch.int8)
    codes = unpack(packed, bits, length, out=out)
    return codes.to(torch.int8) if out is None else codes.view(torch.int8)  # exporters know no view as another dtype
