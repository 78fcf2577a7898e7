"""Emulation of n-bit integers: a tensor rounded onto its grid, in one call; every step of it is public here.

The path of a tensor::

    tensor_range / channel_range / histogram_range     real tensor -> (low, high)              (ranges.py)
    range_to_qparams                                   (low, high) -> (scale, zero_point)      (grid.py)
    quantize_to_int                                    real -> integers                        (grid.py)
    dequantize                                         integers -> real                        (grid.py)
    fake_quantize                                      the last two in one                     (grid.py)
    observe                                            the first two in one, by method
    emulate_int                                        all of them in one

A function named ``quantize`` gives integers, one named ``fake_quantize`` real numbers. The exception is fairseq's own
``quantize`` here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fairseq.modules.quantization.scalar.grid import (
    MAX_BITS,
    MIN_BITS,
    QParams,
    broadcast_qparams,
    check_bits,
    check_tensor,
    clamp_to,
    compute_dtype,
    dequantize,
    fake_quantize,
    quantize_to_int,
    quantized_range,
    range_to_qparams,
    representable_range,
    symmetric_qparams,
)
from fairseq.modules.quantization.scalar.ranges import channel_range, histogram_range, tensor_range

__all__ = [
    "MAX_BITS",
    "METHODS",
    "MIN_BITS",
    "QParams",
    "broadcast_qparams",
    "channel_range",
    "check_bits",
    "check_method",
    "check_tensor",
    "clamp_to",
    "compute_dtype",
    "dequantize",
    "emulate_int",
    "emulate_int4_channel",
    "emulate_int4_histogram",
    "emulate_int4_tensor",
    "emulate_int8_channel",
    "emulate_int8_histogram",
    "emulate_int8_tensor",
    "fake_quantize",
    "histogram_range",
    "observe",
    "quantize",
    "quantize_to_int",
    "quantized_range",
    "range_to_qparams",
    "representable_range",
    "symmetric_qparams",
    "tensor_range",
]

METHODS = ("tensor", "channel", "histogram")


def check_method(method: str) -> str:
    """Return ``method`` if it is one of :data:`METHODS`; ValueError otherwise."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return method


@torch.no_grad()
def observe(
    w: Tensor, bits: int, method: str, axis: int | None = None, name: str = "w", *, symmetric: bool = False
) -> QParams:
    """The scale and zero point that ``method`` gives for ``w``.

    Args:
        w: finite floating tensor of any shape, device and memory layout.
        bits: 2 to 8.
        method: "tensor" (min and max of everything), "channel" (of each slice along ``axis``, default 0) or
            "histogram" (the clip with the smallest squared error; of everything, or of each slice along ``axis``).
        axis: None for the method's default. "tensor" takes none.
        name: how errors call the tensor.
        symmetric: put the zero point in the middle of the grid; see :func:`symmetric_qparams`.

    Raises:
        TypeError, ValueError: what came and what is accepted.
    """
    check_bits(bits)
    check_method(method)
    check_tensor(w, name)
    _check_axis(method, axis)
    to_qparams = symmetric_qparams if symmetric else range_to_qparams
    if method == "channel":
        if w.ndim == 0:
            raise ValueError(f"{name} has no dimensions, so no channels; use method 'tensor' or 'histogram'")
        return to_qparams(*channel_range(w, 0 if axis is None else axis), bits)
    if method == "histogram":
        return to_qparams(*histogram_range(w, bits, axis, symmetric), bits)
    return to_qparams(*tensor_range(w), bits)


def emulate_int(
    w: Tensor,
    bits: int,
    method: str,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    axis: int | None = None,
    name: str = "w",
) -> tuple[Tensor, Tensor, Tensor]:
    """Round ``w`` to ``bits`` wide integers and back to real numbers.

    Args:
        w: finite tensor, float16, bfloat16, float32 or float64, of any shape, device and memory layout.
        bits: 2 to 8.
        method: "tensor", "channel" or "histogram"; see :func:`observe`.
        scale: reused if given, together with ``zero_point``; otherwise both are observed from ``w``.
        zero_point: integers in [0, 2**bits - 1], the shape of ``scale``.
        axis: the axis with a scale each, for "channel" (default 0) and "histogram" (default: one scale in all).
        name: how errors call the tensor.

    Returns:
        (fake-quantized w of the same shape and dtype, scale, zero_point); scale and zero_point of shape (1,) or (C,).

    Raises:
        TypeError, ValueError: what came and what is accepted.

    Example:
        >>> w = torch.tensor([[-1.0, 0.0, 0.52, 2.0]])
        >>> emulate_int(w, 4, "tensor")
        (tensor([[-1.0000,  0.0000,  0.6000,  2.0000]]), tensor([0.2000]), tensor([5], dtype=torch.int32))
    """
    if (scale is None) != (zero_point is None):
        raise ValueError("scale and zero_point go together: give both or neither")
    if scale is None or zero_point is None:
        scale, zero_point = observe(w, bits, method, axis, name)
    else:
        check_bits(bits)
        check_method(method)
        check_tensor(w, name)
        _check_axis(method, axis)
        _check_qparams(scale, zero_point, bits, one=method == "tensor" or (method == "histogram" and axis is None))
    return fake_quantize(w, scale, zero_point, bits, 0 if axis is None else axis), scale, zero_point


def quantize(w: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8, axis: int = 0) -> Tensor:
    """fairseq's name for :func:`fake_quantize`: it returns real numbers. The integers: :func:`quantize_to_int`."""
    return fake_quantize(w, scale, zero_point, bits, axis)


def _check_axis(method: str, axis: int | None) -> None:
    if method == "tensor" and axis is not None:
        raise ValueError(f"method 'tensor' has one scale for everything and takes no axis, got axis={axis}")


def _check_qparams(scale: Tensor, zero_point: Tensor, bits: int, one: bool) -> None:
    if one and scale.numel() != 1:
        raise ValueError(f"this method has one scale for the whole tensor, got scale of shape {tuple(scale.shape)}")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    qmin, qmax = quantized_range(bits)
    if not bool(((zero_point == zero_point.round()) & (zero_point >= qmin) & (zero_point <= qmax)).all()):
        raise ValueError(f"zero_point must hold integers from {qmin} to {qmax} at {bits} bits, got {zero_point}")


Emulation = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""``(w, scale=None, zero_point=None)`` -> (fake-quantized w, scale, zero_point)."""


def _kernel(bits: int, method: str) -> Emulation:
    def emulate(
        w: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return emulate_int(w, bits, method, scale, zero_point)

    emulate.__name__ = emulate.__qualname__ = f"emulate_int{bits}_{method}"
    emulate.__doc__ = f':func:`emulate_int` with ``bits={bits}`` and ``method="{method}"``.'
    return emulate


emulate_int8_tensor = _kernel(8, "tensor")
emulate_int8_channel = _kernel(8, "channel")
emulate_int8_histogram = _kernel(8, "histogram")
emulate_int4_tensor = _kernel(4, "tensor")
emulate_int4_channel = _kernel(4, "channel")
emulate_int4_histogram = _kernel(4, "histogram")
