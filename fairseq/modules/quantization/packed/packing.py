"""n-bit integers <-> bytes, exact; the layout of every width.

A row of ``length`` integers becomes a row of bytes; rows start on a byte. Planes of 4, 2 or 1 bits hold the integers'
bits (two's complement for signed ones), and a plane cuts its row into equal segments that lie above one another in the
bytes, so that unpacking a segment is one vector operation from contiguous bytes to contiguous integers::

    4 bits: 2 segments of h = ceil(length / 2)        byte j = q[j] | q[h + j] << 4

        bit      7  6  5  4    3  2  1  0
               [ q[h + j]   ][ q[j]       ]           j = 0 ... h - 1

    2 bits: 4 segments of h = ceil(length / 4)        byte j = q[j] | q[h + j] << 2 | q[2h + j] << 4 | q[3h + j] << 6

        bit      7  6     5  4     3  2     1  0
               [ 3h + j ][ 2h + j ][ h + j ][ j    ]

    3 bits: a plane of the low 2 bits, as above, then a plane of the high bit: 8 segments of ceil(length / 8)

    5 bits: a plane of the low 4 bits, then one of the high bit; 6 bits: planes of 4 and 2; 7 bits: of 4, 2 and 1

    8 bits: the byte itself

Where ``length`` is no multiple of the number of segments, the last segment is filled up with zeros; ``length`` has to
be kept to undo that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq.modules.quantization.scalar.ops import check_bits

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Widths of the bit planes that hold one integer, the low bits first."""


def packed_length(length: int, bits: int) -> int:
    """Bytes of a packed row of ``length`` integers."""
    return sum(-(-length * width // 8) for width in PLANES[check_bits(bits)])


def pack(q: Tensor, bits: int) -> Tensor:
    """Integers to bytes.

    Args:
        q: uint8 in [0, 2**bits - 1] or int8 in [-2**(bits - 1), 2**(bits - 1) - 1], shape (..., length).
        bits: 2 to 8.

    Returns:
        uint8, (..., packed_length(length, bits)).

    Raises:
        TypeError: another dtype.
        ValueError: an integer out of range, or a tensor without dimensions.
    """
    check_bits(bits)
    if q.dtype not in (torch.uint8, torch.int8):
        raise TypeError(f"integers to pack must be uint8 or int8, got {q.dtype}")
    if q.ndim == 0:
        raise ValueError("integers to pack must have at least one dimension, got a tensor of shape ()")
    low, high = (0, 2**bits - 1) if q.dtype == torch.uint8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if q.is_meta:  # of a model to load into: step by step, PyTorch would take a third of the time of loading
        return q.new_empty(*q.shape[:-1], packed_length(q.shape[-1], bits), dtype=torch.uint8)
    if q.numel() and (int(q.min()) < low or int(q.max()) > high):
        raise ValueError(
            f"{bits}-bit {'unsigned' if low == 0 else 'signed'} integers are from {low} to {high}, "
            f"got {int(q.min())} to {int(q.max())}"
        )
    q = q.contiguous().view(torch.uint8)
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane((q >> shift) & (2**width - 1), width))
        shift += width
    return torch.cat(planes, -1) if len(planes) > 1 else planes[0]


def unpack(packed: Tensor, bits: int, length: int, signed: bool = False, out: Tensor | None = None) -> Tensor:
    """Bytes to integers: undoes :func:`pack`.

    Args:
        packed: uint8, (..., packed_length(length, bits)).
        bits: 2 to 8.
        length: integers in a row.
        signed: whether int8 was packed.
        out: uint8 of shape (..., length) to write to; a new tensor if None.

    Returns:
        uint8, or int8 if ``signed``, of shape (..., length); the memory of ``out`` if given.

    Raises:
        ValueError: the last dimension is not that of ``length`` packed integers.
    """
    if packed.ndim == 0 or packed.shape[-1] != packed_length(length, bits):
        raise ValueError(
            f"{length} integers of {bits} bits take rows of {packed_length(length, bits)} bytes, "
            f"got a tensor of shape {tuple(packed.shape)}"
        )
    if out is None:
        q = _unpacked(packed, bits, length)
    else:
        q = out
        _unpack_into(packed, bits, length, q)
    if signed and bits < 8:  # extend the sign; a byte holds it already
        sign = 2 ** (bits - 1)
        q = (q ^ sign) - sign if out is None else q.bitwise_xor_(sign).sub_(sign)
    return q.view(torch.int8) if signed else q


def _pack_plane(q: Tensor, width: int) -> Tensor:
    """(..., length) integers of ``width`` bits -> (..., ceil(length * width / 8)) bytes."""
    count = 8 // width
    segments = F.pad(q, (0, -q.shape[-1] % count)).chunk(count, -1)
    packed = segments[0].clone()
    for number, segment in enumerate(segments[1:], 1):
        packed |= segment << (width * number)
    return packed


def _segments(packed: Tensor, bits: int, length: int) -> list[tuple[int, Tensor]]:
    """(width, bytes) of each plane."""
    planes, start = [], 0
    for width in PLANES[bits]:
        stop = start + -(-length * width // 8)
        planes.append((width, packed[..., start:stop]))
        start = stop
    return planes


def _unpacked(packed: Tensor, bits: int, length: int) -> Tensor:
    """Without writing into anything, for tracing and compiling."""
    result, shift = None, 0
    for width, plane in _segments(packed, bits, length):
        if width == 8:
            return plane
        parts = [_bits(plane, width * number, width) for number in range(8 // width)]
        values = torch.cat(parts, -1)[..., :length]
        result = values if result is None else result + values * 2**shift
        shift += width
    assert result is not None
    return result


def _bits(packed: Tensor, first: int, width: int) -> Tensor:
    """``width`` bits of each byte, from bit ``first`` on."""
    if not torch.onnx.is_in_onnx_export():
        return (packed >> first) & (2**width - 1)
    # By the operators' names: the exporter's own translation takes bytes for signed.
    count, mask = (torch.tensor(value, dtype=torch.uint8) for value in (first, 2**width - 1))
    shape = packed.shape
    shifted = torch.onnx.ops.symbolic(
        "BitShift", (packed, count), {"direction": "RIGHT"}, dtype=torch.uint8, shape=shape
    )
    result: Tensor = torch.onnx.ops.symbolic("BitwiseAnd", (shifted, mask), dtype=torch.uint8, shape=shape)
    return result


def _unpack_into(packed: Tensor, bits: int, length: int, out: Tensor) -> None:
    """Two vector operations for 4 bits: bytes & 15 -> the first half of the row, bytes >> 4 -> the second."""
    if len(PLANES[bits]) > 1 or PLANES[bits] == (8,):
        out.copy_(_unpacked(packed, bits, length))
        return
    width = PLANES[bits][0]
    step = packed.shape[-1]
    for number in range(8 // width):
        part = out[..., number * step : (number + 1) * step]  # the last one may be shorter
        source = packed[..., : part.shape[-1]]
        if number == 0:
            torch.bitwise_and(source, 2**width - 1, out=part)
        else:
            torch.bitwise_right_shift(source, width * number, out=part)
            if number < 8 // width - 1:
                part.bitwise_and_(2**width - 1)
