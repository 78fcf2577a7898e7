"""QuantizationReport: what a quantization did, layer by layer and in bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


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
        bytes_before: what all parameters and buffers of the original model take in memory.
        bytes_after: the same of the quantized model.
        execution: "packed", or "emulated", which needs the float weights and makes nothing smaller.
    """

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int
    execution: str = "packed"

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
        size = f"Model: {megabytes(self.bytes_before)} before, {megabytes(self.bytes_after)} after"
        if self.execution == "packed":
            size += f" ({self.bytes_after / self.bytes_before - 1:+.1%})"
        else:
            size += ": emulated, with float weights"
        lines.append(size)
        return "\n".join(lines)


def megabytes(count: int) -> str:
    """Bytes as text, in units of 10^6."""
    return f"{count / 1e6:.1f} MB"


def _counts(counter: Counter[str] | Counter[str | None]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.items())
