"""InputGrid: how the input of one layer becomes integers, as every kernel needs to know it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.weight import PackedWeight
from fairseq.modules.quantization.scalar.tokens import quantize_static, quantize_tokens, static_offset


class InputGrid(NamedTuple):
    """x is close to scale * (q - zero_point), q integers of ``bits`` bits that fit int8.

    Dynamic: a scale per token, computed on the fly, and the zero point 0; the other fields are None. Static: one scale
    and zero point, known beforehand, and what is outside of their range saturates.

    Attributes:
        bits: 2 to 8.
        scale: float32 (1,).
        zero_point: int32 (1,).
        correction: (out,), dtype of the weight's scale, to be added to the output; see :func:`correction`.
    """

    bits: int = 8
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    correction: Tensor | None = None

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(M, in) -> the integers, as a tensor of the dtype of ``x``, and the scale of each token, (M, 1)."""
        if self.scale is None or self.zero_point is None:
            return quantize_tokens(x, self.bits)
        return quantize_static(x, self.scale, self.zero_point, self.bits)

    def centre(self, q: Tensor) -> Tensor:
        """q - zero_point, in the dtype of ``q``."""
        return q if self.zero_point is None else q - self.zero_point.to(q.dtype)

    def contains(self, x: Tensor) -> Tensor:
        """Where a static grid does not saturate: bool, the shape of ``x``."""
        assert self.scale is not None
        assert self.zero_point is not None
        half = static_offset(self.bits)
        low, high = (self.scale * (end - self.zero_point) for end in (-half, half - 1))
        return (x >= low) & (x <= high)

    def bias(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to scale * scale of the weight * product of the integers: (out,) as ``dtype``, or None."""
        if bias is None or self.correction is None:
            return self.correction if bias is None else bias.to(dtype)
        return bias.to(dtype) + self.correction

    def key(self) -> tuple[float | None, ...]:
        """The same for two grids that turn every input into the same integers."""
        if self.scale is None or self.zero_point is None:
            return self.bits, None, None
        return self.bits, self.scale.item(), self.zero_point.item()


def correction(weight: PackedWeight, scale: Tensor, zero_point: Tensor) -> Tensor:
    """-scale * zero_point * sum over k of W[n, k]: (out,), what a product of x takes that is one of q.

    x[m, k] = scale * (q[m, k] - zero_point), so y[m, n] = scale * sum over k of q[m, k] * W[n, k] + correction[n].
    """
    codes, code_zero_point = weight.unpacked(), weight.code_zero_point()
    rows = torch.zeros(len(codes), dtype=torch.float64, device=codes.device)
    for group, (start, stop) in enumerate(weight.columns()):
        s, z = (t[:, group] if t.ndim == 2 else t for t in (weight.scale, code_zero_point))
        rows += (codes[:, start:stop].sum(-1) - (stop - start) * z) * s.double()  # a sum of integers has no order
    return (rows * -(scale.double() * zero_point)).to(weight.scale.dtype)
