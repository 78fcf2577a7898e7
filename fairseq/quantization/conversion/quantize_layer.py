"""quantize_layer: one layer's weight, what it reads and its settings -> integers, and how well they keep it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from fairseq.modules.quantization.float_product import float_product
from fairseq.modules.quantization.scalar.weights import weight_to_real
from fairseq.quantization.config import LayerConfig, resolve_rounding
from fairseq.quantization.rounding.quality import decibels, weight_statistics
from fairseq.quantization.rounding.round_weight import grid_used, round_weight
from fairseq.quantization.rounding.statistics import Rounded, Statistics

MIN_STATIC_SQNR = 28.0
"""Below it, in dB, one range for all tokens is too coarse (8 bits reach 38 on a Gaussian): the layer stays dynamic."""


class QuantizedLayer(NamedTuple):
    """A layer's weight in integers, real = scale * (integers - zero_point), and what belongs to it.

    Attributes:
        integers: uint8 (out, in), at most 2**bits - 1.
        scale: > 0, (1,), (out,) or (out, groups), and zero_point, integers of the same shape.
        bias: (out,) or None; corrected where the settings say so.
        settings: as they were used; static activations may have become dynamic.
        input_range: (low, high) of the input where activations are static, else None.
        record: fields of a ``LayerReport``: rounding, activations, note, and measures in dB.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    settings: LayerConfig
    input_range: tuple[float, float] | None
    record: dict[str, Any]

    @property
    def real(self) -> Tensor:
        """What the integers stand for: (out, in), in the dtype of ``scale``."""
        return weight_to_real(
            self.integers, self.scale, self.zero_point, self.settings.group_size, dtype=self.scale.dtype
        )


def quantize_layer(
    weight: Tensor,
    bias: Tensor | None,
    statistics: Statistics | None,
    settings: LayerConfig,
    name: str = "layer",
    rounded: Rounded | None = None,
) -> QuantizedLayer:
    """Quantize a weight matrix: of a Linear, of a patch convolution, or a table of embeddings.

    Args:
        weight: (out, in), finite; it stays as it is.
        bias: (out,) or None.
        statistics: of what the weight is multiplied by, or None.
        settings: bits, method, rounding and so on.
        name: how errors call the layer.
        rounded: integers that are decided already, as of a weight that another layer shares; None to round.

    Raises:
        ValueError: as :func:`~fairseq.quantization.rounding.round_weight.round_weight`.
    """
    weight, note = weight.detach(), None
    if statistics is not None and settings.activations == "static" and statistics.static_sqnr < MIN_STATIC_SQNR:
        settings = replace(settings, activations="dynamic")
        note = f"dynamic instead of static: below {MIN_STATIC_SQNR:.0f} dB with one range for all tokens"
    if rounded is None:
        rounded = round_weight(weight, statistics, settings, settings.rounding, f"{name}.weight")
    rounding = resolve_rounding(settings.rounding, statistics is not None, settings.bits, settings.method)
    record: dict[str, Any] = {"rounding": rounding, "activations": settings.activations, "note": note}
    record |= grid_used(settings, rounding)
    span = None
    if statistics is not None and settings.activations == "static":
        span = statistics.low, statistics.high
    layer = QuantizedLayer(*rounded, None if bias is None else bias.detach(), settings, span, record)
    real = layer.real
    record |= weight_statistics(weight, real, per_tensor=settings.method == "tensor")
    if statistics is None:
        return layer
    error = (weight - real).to(statistics.mean.dtype)
    wide = weight.to(error.dtype)
    record["output_sqnr"] = decibels(_energy(wide, statistics), _energy(error, statistics))
    if settings.bias_correction and (bias is not None or settings.bias_correction == "add"):
        correction = error @ statistics.mean
        if statistics.missing_mean is not None:
            correction += statistics.missing_mean
        elif statistics.drift_mean is not None:
            correction += wide @ statistics.drift_mean
        correction = correction.to(weight.dtype)
        layer = layer._replace(bias=correction if bias is None else bias.detach() + correction)
    return layer


def _energy(weight: Tensor, statistics: Statistics) -> float:
    """tr(W H W^T): the mean squared norm of what the layer makes of its inputs."""
    return float((float_product(statistics.second_moment, weight) * weight.T).sum())
