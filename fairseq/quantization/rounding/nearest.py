"""nearest: each weight to the nearest point of its grid."""

from __future__ import annotations

from torch import Tensor

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.scalar.weights import observe_weight, weight_to_int
from fairseq.quantization.rounding.statistics import Rounded, Statistics


def nearest(weight: Tensor, statistics: Statistics | None, config: LinearConfig) -> Rounded:
    """Each weight to the nearest point of the grid that ``config.method`` observes."""
    scale, zero_point = observe_weight(weight, config.bits, config.method, config.group_size, config.symmetric)
    return Rounded(weight_to_int(weight, scale, zero_point, config.bits, config.group_size), scale, zero_point)
