"""LearnedLinear: a quantized layer whose integers, scale and bias can be learned."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.scalar.grid import quantized_range
from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.modules.quantization.scalar.tokens import fake_quantize_tokens, static_offset

QuantizedLinear = PackedLinear | EmulatedLinear

MARGIN = 0.45
"""How far from its integer a weight may begin, in units of it: at 0.5 the first step would change the integer."""


class Learned(NamedTuple):
    """What a layer has learned: real = scale * (integers - zero_point).

    Attributes:
        integers: uint8 (out, in).
        scale: in the shape and dtype of the layer's.
        bias: (out,) in the dtype of the layer's, or None.
        real: the weight before it is rounded, on the same grid, (out, in), in the dtype in which it was learned.
        stretch: by which the fixed range of the input is multiplied; 1.0 unless there is one.
    """

    integers: Tensor
    scale: Tensor
    bias: Tensor | None
    real: Tensor
    stretch: float = 1.0


class LearnedLinear(nn.Module):
    """The float twin of a quantized layer, with the same integers and scale to begin with, and gradients for both.

    The weight is scale * (clamp(round(latent), 0, 2**bits - 1) - zero_point), with a straight-through gradient to
    ``latent`` where that rounds to the grid, and the true one to the logarithm of the scale: Chen et al., EfficientQAT
    (2024, https://arxiv.org/abs/2407.11062), in units of the integers. The input is rounded as by the layer where that
    is felt, below 8 bits or on one fixed grid, whose scale is learned, too (Esser et al., LSQ, 2020,
    https://arxiv.org/abs/1902.08153); rounding to 8 bits per token is left out here.

    Args:
        layer: it stays as it is.
        weight: what its integers were rounded from, (out, in), or None if that is not known.
        dtype: in which it learns, float32 or float64.
    """

    def __init__(self, layer: QuantizedLinear, weight: Tensor | None = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        if isinstance(layer, PackedLinear):
            config: Any = layer.config
            scale, zero_point = layer.scale, layer.zero_point
        else:
            config = layer
            scale, zero_point = layer._grid()
        self.top, self.group_size = quantized_range(config.bits)[1], config.group_size
        self.activations, self.activation_bits = config.activations, config.activation_bits
        self.kept = layer
        integers = layer.integers().to(dtype)
        self.in_features = integers.shape[1]
        self.scale, self.zero_point = scale.detach().to(dtype), self._per_weight(zero_point.to(dtype))
        start = integers
        if weight is not None:
            wanted = weight.detach().to(dtype) / self._per_weight(self.scale) + self.zero_point
            start = integers + (wanted - integers).clamp_(-MARGIN, MARGIN)
        self.latent = nn.Parameter(start)
        self.log_scale = nn.Parameter(torch.zeros_like(self.scale))
        static = layer.input_scale
        self.log_stretch = None if static is None else nn.Parameter(torch.zeros_like(static))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(dtype, copy=True))

    def integers(self) -> Tensor:
        """What ``latent`` is rounded to: uint8 (out, in)."""
        return self.latent.detach().round().clamp_(0, self.top).to(torch.uint8)

    def weight(self) -> Tensor:
        """(out, in), in the dtype in which it learns."""
        rounded = _rounded(self.latent, 0.0, float(self.top))
        return (rounded - self.zero_point) * self._per_weight(self.scale * self.log_scale.exp())

    def forward(self, input: Tensor) -> Tensor:
        layer = self.kept
        if layer.input_factor is not None:
            input = input * layer.input_factor.to(input.dtype)
        if self.activations == "dynamic" and self.activation_bits < 8:
            input = fake_quantize_tokens(input, self.activation_bits)
        elif self.activations == "static":
            input = self._on_fixed_grid(input)
        return F.linear(input, self.weight(), self.bias)

    @torch.no_grad()
    def learned(self) -> Learned:
        """What it is now."""
        layer = self.kept
        own = layer.scale
        assert own is not None
        scale = (self.scale * self.log_scale.exp()).reshape(own.shape).to(own.dtype)
        bias = None if self.bias is None or layer.bias is None else self.bias.detach().to(layer.bias.dtype)
        stretch = 1.0 if self.log_stretch is None else float(self.log_stretch.exp())
        real = (self.latent - self.zero_point) * self._per_weight(self.scale * self.log_scale.exp())
        return Learned(self.integers(), scale, bias, real, stretch)

    def _on_fixed_grid(self, input: Tensor) -> Tensor:
        """The input rounded with the layer's static scale, stretched as learned."""
        layer = self.kept
        assert layer.input_scale is not None
        assert layer.input_zero_point is not None
        assert self.log_stretch is not None
        zero_point = layer.input_zero_point + static_offset(self.activation_bits)
        scale = layer.input_scale * self.log_stretch.exp()
        low, high = (float(end - zero_point) for end in quantized_range(self.activation_bits))
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        return (_rounded(wide / scale, low, high) * scale).to(input.dtype)

    def _per_weight(self, parameter: Tensor) -> Tensor:
        """A scale or zero point of any of the three shapes against a weight: (1, 1), (out, 1) or (out, in)."""
        per_row = parameter.reshape(-1, 1) if parameter.ndim == 1 else parameter
        if self.group_size is None:
            return per_row
        return per_row.repeat_interleave(self.group_size, dim=1)[:, : self.in_features]


def _rounded(x: Tensor, low: float, high: float) -> Tensor:
    """Rounded half to even and cut to [low, high], which are integers; the gradient is 1 for all that round to those.

    What rounds to an end from beyond it may so come back.
    """
    near = x.clamp(low - 0.5, high + 0.5)
    return near + (near.detach().round().clamp_(low, high) - near.detach())
