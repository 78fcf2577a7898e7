"""FakeQuantizedLinear: a Linear for inference whose weight lies on an n-bit grid, at the speed of the float layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.modules.quantization.scalar import ops
from fairseq.modules.quantization.scalar.modules.replace import moved


class FakeQuantizedLinear(nn.Module):
    """``y = x @ W.T + b`` with W = scale * (q - zero_point), q integers of ``bits`` bits.

    W is kept as real numbers in ``weight`` (out_features, in_features), in the dtype of the layer it was made from;
    ``scale`` (float32) and ``zero_point`` (int32), buffers of shape (1,) or (out_features,), say which grid it is on.
    Parameters take no gradient. Train with :class:`IntLinear` instead.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor, zero_point: Tensor, bits: int, method: str):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.method = bits, method
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @classmethod
    def from_float(cls, linear: nn.Linear, bits: int, method: str, name: str = "linear") -> FakeQuantizedLinear:
        """Quantize the weight of ``linear``, which is not changed; the bias is shared.

        Args:
            linear: an ``nn.Linear``, its weight finite.
            bits: 2 to 8.
            method: "tensor", "channel" or "histogram"; the last one, too, with a scale per output channel.
            name: how errors call the layer.
        """
        axis = 0 if method == "histogram" else None
        weight, scale, zero_point = ops.emulate_int(linear.weight, bits, method, axis=axis, name=f"{name}.weight")
        return cls(weight, linear.bias, scale, zero_point, bits, method).train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> FakeQuantizedLinear:
        kept = self.scale
        super()._apply(fn, recurse)
        self.scale = moved(kept, self.scale.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, method={self.method}"
        )
