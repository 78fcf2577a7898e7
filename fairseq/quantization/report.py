"""QuantizationReport: what a quantization did, layer by layer and in bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

STORED_BITS = {2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
"""Bits that one integer takes when packed; the odd widths above 4 take a byte."""


@dataclass(frozen=True)
class LayerReport:
    """One Linear: its name, component, shape (out, in), and either its bits and method or why it was left in float."""

    name: str
    component: str | None
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    bits: int | None = None
    method: str | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class QuantizationReport:
    """What happened to a model; ``print`` it.

    Attributes:
        layers: every Linear of the model, in order.
        bytes_before: parameters and buffers of the whole original model.
        bytes_after: the same with every quantized weight as packed integers with its scales (float32) and zero points
            (a byte each): what the integers take when they are stored.
        bytes_in_memory: what the quantized model takes now; its weights are the integers' values in float.
    """

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int
    bytes_in_memory: int

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.skipped is None)

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.skipped is not None)

    def __str__(self) -> str:
        settings = Counter(f"{layer.bits}-bit {layer.method}" for layer in self.quantized)
        components = Counter(layer.component for layer in self.quantized)
        lines = [
            f"Quantized {len(self.quantized)} linear layers"
            + (f": {_counts(settings)} ({_counts(components)})" if self.quantized else "")
        ]
        for reason, count in Counter(layer.skipped for layer in self.skipped).items():
            names = [layer.name for layer in self.skipped if layer.skipped == reason]
            shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
            lines.append(f"Left {count} in float, {reason}: {shown}")
        saved = 1 - self.bytes_after / self.bytes_before
        lines.append(
            f"Model: {megabytes(self.bytes_before)} in float, {megabytes(self.bytes_after)} as packed integers "
            f"(-{saved:.1%}); in memory now: {megabytes(self.bytes_in_memory)}"
        )
        return "\n".join(lines)


def packed_bytes(shape: tuple[int, int], bits: int, scales: int) -> int:
    """Bytes of an (out, in) weight as packed integers, each row from a new byte, with its scales and zero points."""
    rows, columns = shape
    return rows * -(-columns * STORED_BITS[bits] // 8) + scales * (4 + 1)


def megabytes(count: int) -> str:
    """Bytes as text, in units of 10^6."""
    return f"{count / 1e6:.1f} MB"


def _counts(counter: Counter[str] | Counter[str | None]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.items())
