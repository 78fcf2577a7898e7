"""(weight, statistics, config) -> integers, scale, zero_point: to nearest, or so that the layer's output errs least.

Every rounding is pure tensor arithmetic on one layer. With D the change of the weight, the squared error of the
output is tr(D H D^T), H the second moment of the layer's inputs; nearest rounding takes H for the identity.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.scalar.ops import check_tensor
from fairseq.quantization.config import resolve_rounding
from fairseq.quantization.rounding.coordinate import coordinate
from fairseq.quantization.rounding.gptaq import gptaq
from fairseq.quantization.rounding.gptq import gptq
from fairseq.quantization.rounding.nearest import nearest
from fairseq.quantization.rounding.qronos import qronos
from fairseq.quantization.rounding.statistics import Rounded, Statistics

ROUNDINGS: dict[str, Callable[[Tensor, Statistics | None, LinearConfig], Rounded]] = {
    "nearest": nearest,
    "gptq": gptq,
    "gptaq": gptaq,
    "qronos": qronos,
    "coordinate": coordinate,
}


def round_weight(
    weight: Tensor, statistics: Statistics | None, config: LinearConfig, rounding: str = "auto", name: str = "weight"
) -> Rounded:
    """Round a Linear weight to integers.

    Args:
        weight: (out, in), finite.
        statistics: of its inputs, or None.
        config: bits, method, group_size, symmetric.
        rounding: a key of :data:`ROUNDINGS`, or "auto": if there are statistics coordinate up to 4 bits, and gptaq
            above and with "tensor", else nearest.
        name: how errors call the weight.

    Raises:
        ValueError: the weight is not finite, an unknown rounding, or one that needs statistics without them, or with
            ones of another shape or with NaN.
    """
    chosen = resolve_rounding(rounding, statistics is not None, config.bits, config.method)
    check_tensor(weight, name)
    if statistics is not None:
        expected = (weight.shape[1], weight.shape[1])
        if statistics.second_moment.shape != expected:
            raise ValueError(
                f"{name}: the second moment must be of shape {expected}, got {tuple(statistics.second_moment.shape)}"
            )
        check_tensor(statistics.second_moment, f"{name}: the second moment of its inputs")
        if chosen in ("gptaq", "qronos") and statistics.drift is None:
            if rounding != "auto":
                raise ValueError(
                    f"{name}: rounding={rounding!r} needs statistics with the drift of its inputs; got none"
                )
            chosen = "gptq"
    elif chosen != "nearest":
        raise ValueError(f"{name}: rounding={rounding!r} needs calibration images; without them there is 'nearest'")
    return ROUNDINGS[chosen](weight.detach(), statistics, config)


def grid_used(config: LinearConfig, rounding: str) -> dict[str, str]:
    """What "method" comes to for a weight, by the names of a report's fields.

    Args:
        config: method and group_size.
        rounding: a key of :data:`ROUNDINGS`, as it was done.

    Returns:
        granularity: what has a scale of its own, "tensor", "channel" or "group".
        range_search: "min-max" for nearest rounding by "channel"; all else takes ranges of "least squared error".
    """
    granularity = "group" if config.group_size is not None else "tensor" if config.method == "tensor" else "channel"
    plain = config.method == "channel" and rounding == "nearest"
    return {"granularity": granularity, "range_search": "min-max" if plain else "least squared error"}
