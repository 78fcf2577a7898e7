"""LayerReport: what quantization did to one layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One Linear (or embedding), and either how it was quantized and with what error, or why it was left in float.

    What does not apply, or was not measured, is None.

    Attributes:
        name: its full name in the model.
        component: "attention", "mlp", "classifier", "embeddings".
        shape: of its weight, (out, in).
        bytes_before, bytes_after: what it takes in memory.
        bits, method: of its weight, as they were asked for.
        skipped: why it was left in float.
        rounding: how the integers were chosen, "nearest", "gptq", "gptaq", "qronos" or "coordinate".
        activations: "dynamic" or "static", if its input is rounded too.
        note: why something was done differently from what was asked.
        weight_sqnr: of the rounded weight, in dB (see :func:`sqnr`).
        output_sqnr: of the output on the calibration images, in dB: what the change of this layer's weight does to it.
        reconstructed: the share of the error of its block's output that reconstruction left, on pictures that were held
            back; 1.0 where it did not help and was taken back. ``output_sqnr`` is of the rounding before it.
        clip: see :func:`weight_statistics`.
        outlier_ratio: see :func:`weight_statistics`.
        block: the encoder block that holds it, by name.
        granularity: what had a scale of its own, "tensor", "channel" (an output channel) or "group" (of its inputs).
        range_search: how the ranges were found, "min-max" or "least squared error". ``method`` asks for both together,
            and with calibration images "channel" is searched, too.
    """

    name: str
    component: str | None
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    bits: int | None = None
    method: str | None = None
    skipped: str | None = None
    rounding: str | None = None
    activations: str | None = None
    note: str | None = None
    weight_sqnr: float | None = None
    output_sqnr: float | None = None
    clip: float | None = None
    outlier_ratio: float | None = None
    block: str | None = None
    granularity: str | None = None
    range_search: str | None = None
    reconstructed: float | None = None
