"""Layout: how the integers of one weight lie in memory, in rows or in the panels that the native products read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.packing import packed_length
from fairseq.modules.quantization.packed.panels import from_panels, sums_of, to_panels
from fairseq.modules.quantization.packed.weight import code_offset, pack_codes, unpack_codes


class Layout(NamedTuple):
    """The codes of a weight, (out, in): integers of ``bits`` bits, each less :func:`~.weight.code_offset` as int8.

    Attributes:
        codes: in rows, int8 (out, in), a byte per code, or uint8 (out, packed_length(in, bits)); or in panels, uint8 of
            :func:`~.panels.panels_shape`. Layers whose codes are the same tensor share them.
        sums: of the codes of each output, int32 (out,), or of each of its groups, int32 (out, groups), with panels
            above 4 bits; else None.
        bits: 2 to 8.
        outputs, inputs: of the weight.
        bytewise: whether a code takes a byte in rows.
        group_size: columns that share a scale, or None.
    """

    codes: Tensor
    sums: Tensor | None
    bits: int
    outputs: int
    inputs: int
    bytewise: bool
    group_size: int | None = None

    @classmethod
    def of(cls, codes: Tensor, bits: int, unpacked: bool, group_size: int | None = None) -> Layout:
        """Codes, int8 (out, in), in rows; ``unpacked``: with a byte for each, whatever ``bits``."""
        bytewise = takes_a_byte(bits, unpacked)
        outputs, inputs = codes.shape
        return cls(codes if bytewise else pack_codes(codes, bits), None, bits, outputs, inputs, bytewise, group_size)

    def in_panels(self) -> bool:
        """Whether the codes lie in panels."""
        return self.codes.ndim == 3

    def row_codes(self) -> Tensor:
        """The codes in rows as they lie, or out of their panels as int8 (out, in): what PyTorch's products take."""
        return from_panels(self.codes, self.outputs, self.inputs, self.bits) if self.in_panels() else self.codes

    def unpacked(self) -> Tensor:
        """The codes, int8 (out, in)."""
        rows = self.row_codes()
        return rows if self.bytewise or self.in_panels() else unpack_codes(rows, self.bits, self.inputs)

    def integers(self) -> Tensor:
        """The weight's integers, uint8 (out, in)."""
        return self.unpacked().view(torch.uint8) ^ code_offset(self.bits)

    def rows(self) -> Layout:
        """The same codes in rows."""
        if not self.in_panels():
            return self
        return Layout.of(self.row_codes(), self.bits, self.bytewise, self.group_size)

    def panels(self) -> Layout:
        """The same codes in panels."""
        if self.in_panels():
            return self
        codes = self.unpacked()
        return self._replace(codes=to_panels(codes, self.bits), sums=sums_of(codes, self.bits, self.group_size))

    def saved(self) -> Tensor:
        """What a state dict holds of any layout: uint8 (out, packed_length(in, bits))."""
        if not self.in_panels() and not self.bytewise:
            return self.codes
        return pack_codes(self.row_codes(), self.bits)

    def takes(self, saved: Tensor) -> bool:
        """Whether a tensor has the size of what :meth:`saved` returns."""
        shape = (self.outputs, packed_length(self.inputs, self.bits))
        return saved.shape == shape and saved.element_size() == 1

    def loaded(self, saved: Tensor) -> Layout:
        """The codes that were saved, laid out as these are."""
        if not self.in_panels() and not self.bytewise:
            return self._replace(codes=saved)
        rows = self._replace(codes=unpack_codes(saved, self.bits, self.inputs), sums=None, bytewise=True)
        return (rows.panels() if self.in_panels() else rows)._replace(bytewise=self.bytewise)

    def summed(self) -> Layout:
        """The same codes, which may have been written to, with sums that are theirs."""
        if self.sums is None:
            return self
        return self._replace(sums=sums_of(self.unpacked(), self.bits, self.group_size))


def takes_a_byte(bits: int, unpacked: bool) -> bool:
    """Whether a code of that width takes a byte in rows, as above 4 bits and where ``unpacked`` asks for it."""
    return unpacked or bits > 4


def earlier(bits: int, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What an error about the shape of saved codes adds where 5 to 7 bits have a byte each, as they once had; or ""."""
    if 4 < bits < 8 and len(shape) == 2 and wanted == (shape[0], packed_length(shape[1], bits)):
        return f": integers of {bits} bits in a byte each, as no longer; quantize again"
    return ""
