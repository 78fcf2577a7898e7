"""Activations to integers: with one scale per token, computed on the fly, or with one fixed range for all tokens.

Per token an image never sees its neighbours' range; a fixed one costs no look at the numbers, but has to be calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq.modules.quantization.scalar.grid import check_bits, range_to_qparams

CLIPS = (1.0, 0.9, 0.8, 0.7)
"""Candidate ranges of a token below 8 bits, as shares of the one from its minimum to its maximum."""
FASTER: list[Callable[[Tensor, int], Tensor | None]] = []
"""What gives the bits of ``q * scale`` of :func:`quantize_tokens`, only faster; None where it cannot."""


def token_limit(bits: int = 8) -> int:
    """The largest integer of a token: 127 at 8 bits, where the smallest is its negative, else all of 2**bits - 1."""
    return 127 if check_bits(bits) == 8 else int(2**bits - 1)


def token_scale(x: Tensor) -> Tensor:
    """Each token's scale at 8 bits: max(abs(x)) / 127 over the last dimension, at least the smallest normal number.

    Args:
        x: (..., features), float32 or float64.

    Returns:
        (..., 1), in the dtype of ``x``. NaN or Inf in a token makes its scale NaN or Inf, and so all its results.
    """
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    return (largest * (1 / token_limit(8))).clamp(min=torch.finfo(x.dtype).tiny)


def quantize_tokens(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Round each token to integers, half to even: x is close to q * scale.

    At 8 bits q is symmetric, from -127 to 127. Below, where every level counts, a token has a zero point z of its own:
    q = q' - z, q' from 0 to 2**bits - 1, which fits int8 all the same, and its range is the one of :data:`CLIPS`
    with the smallest squared error.

    Args:
        x: (..., features), float32 or float64.
        bits: 2 to 8.

    Returns:
        q, the integers as a tensor of the dtype and shape of ``x``, and scale, (..., 1).
    """
    if check_bits(bits) == 8:
        scale = token_scale(x)
        return (x / scale).round(), scale
    if x.shape[-1] == 0:
        return x.clone(), x.new_full((*x.shape[:-1], 1), torch.finfo(x.dtype).tiny)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    q, scale = _round_affine(x, low, high, bits)
    least = _sum_in_order((q * scale - x).square())
    for clip in CLIPS[1:]:
        tried, narrower = _round_affine(x, low * clip, high * clip, bits)
        error = _sum_in_order((tried * narrower - x).square())
        better = error < least
        q, scale = torch.where(better, tried, q), torch.where(better, narrower, scale)
        least = torch.minimum(error, least)
    return q, scale


def _sum_in_order(x: Tensor) -> Tensor:
    """The sum over the last dimension, (..., n) -> (..., 1), n > 0: the second half onto the first, again and again.

    ``Tensor.sum`` adds in an order that follows strides, threads and processor, and with it a choice between two ranges
    that are nearly as good, and all integers of the token.
    """
    width = int(x.shape[-1])
    while width > 1:
        half = -(-width // 2)
        x = x[..., :half] + F.pad(x[..., half:], (0, 2 * half - width))
        width = half
    return x


def _round_affine(x: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The integers less the zero point, and the scale, of a grid from ``low`` <= 0 to ``high`` >= 0, (..., 1) each."""
    limit = token_limit(bits)
    scale = (high / limit - low / limit).clamp(min=torch.finfo(x.dtype).tiny)  # the difference itself may overflow
    zero_point = (-low / scale).round()
    return torch.clamp((x / scale).round(), -zero_point, limit - zero_point), scale


class _StraightThrough(torch.autograd.Function):
    """Forward: quantize_tokens and back. Backward: 1, also for what a narrower range cuts below 8 bits."""

    @staticmethod
    def forward(ctx: object, x: Tensor, bits: int) -> Tensor:
        check_bits(bits)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        for faster in FASTER:
            if (rounded := faster(wide, bits)) is not None:
                return rounded.to(x.dtype)
        q, scale = quantize_tokens(wide, bits)
        return (q * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: object, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def fake_quantize_tokens(x: Tensor, bits: int = 8) -> Tensor:
    """``x`` rounded per token to ``bits`` bits and back, with straight-through gradients; shape and dtype of ``x``."""
    result: Tensor = _StraightThrough.apply(x, bits)
    return result


def static_offset(bits: int) -> int:
    """What the unsigned grid of ``grid.py`` is moved down by, so that its integers fit int8: 128 at 8 bits."""
    return int(2 ** (check_bits(bits) - 1))


def static_qparams(
    activations: str | None, input_range: Sequence[float] | None, bits: int, name: str
) -> tuple[Tensor | None, Tensor | None]:
    """The fixed grid of a layer's input: x is close to scale * (q - zero_point), q from -2**(bits-1) to 2**(bits-1)-1.

    Args:
        activations: the layer's setting.
        input_range: (low, high), finite, low <= high; 0 is included. None unless ``activations`` is "static".
        bits: 2 to 8.
        name: how errors call the layer.

    Returns:
        scale, float32 (1,), and zero_point, int32 (1,); None and None unless ``activations`` is "static".

    Raises:
        ValueError: a range is missing, is not used, or is none.
    """
    if activations != "static":
        if input_range is not None:
            raise ValueError(
                f"{name} takes an input_range only with activations='static'; it has activations={activations!r}"
            )
        return None, None
    if input_range is None:
        raise ValueError(f"{name} has activations='static' and needs an input_range: (low, high) of its input")
    ends = torch.as_tensor(input_range, dtype=torch.float32, device="cpu")
    if ends.shape != (2,) or not bool(torch.isfinite(ends).all()) or bool(ends[0] > ends[1]):
        raise ValueError(f"the input_range of {name} must be (low, high), finite, low <= high; got {input_range!r}")
    scale, zero_point = range_to_qparams(ends[:1].clamp(max=0), ends[1:].clamp(min=0), bits)
    return scale, zero_point - static_offset(bits)


def quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Round ``x`` to integers on a fixed grid, half to even; what is outside, Inf too, becomes the nearest end.

    Args:
        x: (..., features), float32 or float64.
        scale, zero_point: (1,), of :func:`static_qparams`.
        bits: 2 to 8.

    Returns:
        q, the integers as a tensor of the dtype and shape of ``x``, and the scale of each token, (..., 1): ``scale``,
        but NaN for a token that holds a NaN, so that all its results are NaN.
    """
    half = static_offset(bits)
    q = ((x / scale).round() + zero_point).clamp(-half, half - 1)
    return q, q.sum(-1, keepdim=True) * 0 + scale


def check_static_state(state_dict: Mapping[str, object], prefix: str, static: bool, name: str) -> None:
    """ValueError if a quantized layer's state was saved with a fixed input range and the layer has none, or reverse."""
    saved = any(prefix + key in state_dict for key in ("input_scale", "input_zero_point"))
    if prefix + "settings" in state_dict and saved != static:
        one, other = ("with", "has none") if saved else ("without", "has one")
        raise ValueError(
            f"{prefix[:-1] or name} was saved {one} a fixed input range, but this layer {other}; to load it, quantize "
            f"with activations{'=' if saved else ' other than '}'static'"
        )
