"""How integers travel through float tensors: one rule, and the checks that keep it.

A layer takes ``(x, scaling_factor)`` and returns ``(y, scaling_factor)``; x / scaling_factor is integer-valued.

**The rule.** A float of p significant bits (24 for float32, 53 for float64) holds integers exactly up to 2**p, and

    q * scale, rounded to p bits and divided by scale again, is off from q by at most abs(q) * 2**-p,

so q is recovered by rounding while abs(q) <= 2**(p - 2), with room to spare. Therefore:

- Inside a layer, integers and scales are float64. No integer may enter or leave past 2**51, and none in between passes
  2**53.
- A layer whose output is declared at most :data:`FLOAT32_BITS` = 23 bits wide (QuantAct, QuantEmbedding, IntSoftmax and
  IntLayerNorm up to that width) returns float32. Every other output (QuantLinear, IntGELU, wider ones) is float64.
- Scales are float64, also after ``model.half()``.
- A product past 2**53, which only requantization needs, is computed in int64.

An integer past its declared width raises OverflowError; nothing wraps, and only what is documented to clamp clamps.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT32_BITS = 23
FLOAT64_LIMIT = 2**51
INT32_LIMIT = 2**31 - 1
MIN_BITS, MAX_BITS = 2, 32
MIN_SCALE, MAX_SCALE = 2.0**-60, 2.0**30
QUANT_MODES = ("none", "symmetric")


def carrier_dtype(bits: int) -> torch.dtype:
    """The dtype that carries integers declared ``bits`` wide: float32 up to 23 bits, float64 above."""
    return torch.float32 if bits <= FLOAT32_BITS else torch.float64


def recoverable_limit(dtype: torch.dtype) -> int:
    """The largest abs(q) that is read back exactly from q * scale in ``dtype``: 2**22 in float32, 2**51 in float64."""
    return int(0.5 / torch.finfo(dtype).eps)


def symmetric_limit(bits: int) -> int:
    """The largest integer of a symmetric grid ``bits`` wide, 2**(bits - 1) - 1; the smallest is its negative."""
    return 2 ** (bits - 1) - 1


def check_width(bits: int, name: str, low: int = MIN_BITS, high: int = MAX_BITS) -> int:
    """Return ``bits`` if it is an int from ``low`` to ``high``; TypeError or ValueError otherwise."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"{name} must be an int from {low} to {high}, got {bits!r} ({type(bits).__name__})")
    if not low <= bits <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {bits}")
    return bits


def check_quant_mode(quant_mode: str) -> str:
    """Return ``quant_mode`` if it is "none" or "symmetric".

    Raises:
        NotImplementedError: "asymmetric".
        ValueError: anything else.
    """
    if quant_mode == "asymmetric":
        raise NotImplementedError("quant_mode 'asymmetric' is not implemented; use 'symmetric' or 'none'")
    if quant_mode not in QUANT_MODES:
        raise ValueError(f"quant_mode must be one of {', '.join(QUANT_MODES)}, got {quant_mode!r}")
    return quant_mode


def check_scale(scale: Tensor | float | None, x: Tensor, name: str, single: bool = False) -> Tensor:
    """Return ``scale`` as a float64 tensor on the device of ``x``, of shape (1,) or (C,), C being its last size.

    Args:
        scale: one number, or one for each entry of the last dimension of ``x``.
        name: the layer, for the message.
        single: accept one number only.

    Raises:
        ValueError: None, not from 2**-60 to 2**30, or of another shape.
    """
    if scale is None:
        raise ValueError(
            f"{name} is quantized and needs the scaling factor of its input; pass the one that came with it"
        )
    values = torch.as_tensor(scale, dtype=torch.float64, device=x.device).detach().reshape(-1)
    if not bool(((values >= MIN_SCALE) & (values <= MAX_SCALE)).all()):
        raise ValueError(f"{name}: a scaling factor must be from 2**-60 to 2**30, got {values.tolist()[:8]}")
    if values.numel() == 1:
        return values
    if single:
        raise ValueError(
            f"{name} needs one scaling factor for the whole input, got {values.numel()}; "
            "put a QuantAct(per_channel=False) in front of it"
        )
    if x.ndim == 0 or values.numel() != x.shape[-1]:
        raise ValueError(
            f"{name}: {values.numel()} scaling factors for an input of shape {tuple(x.shape)}; "
            "give one, or one for each entry of the last dimension"
        )
    return values


def check_magnitude(q: Tensor, limit: int, name: str, advice: str = "") -> None:
    """OverflowError if any integer of ``q`` (int64, or a finite float tensor) is past +-``limit``."""
    if q.numel() == 0:
        return
    low, high = (int(end) for end in torch.aminmax(q.detach()))
    if max(-low, high) > limit:
        value = low if -low > high else high
        raise OverflowError(f"{name}: {value} is past the limit of +-{limit}{'; ' + advice if advice else ''}")


def check_integers(q: Tensor, name: str = "q", limit: int = FLOAT64_LIMIT) -> Tensor:
    """Return ``q`` if it is an int64 tensor within +-``limit``; TypeError or OverflowError otherwise."""
    if not isinstance(q, Tensor) or q.dtype != torch.int64:
        got = f"a tensor of {q.dtype}" if isinstance(q, Tensor) else type(q).__name__
        raise TypeError(f"{name} must be an int64 tensor, got {got}")
    check_magnitude(q, limit, name)
    return q
