"""EmulatedLinear: the trainable twin of a packed layer, with the same integers and the same rounding of activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.scalar.grid import QParams
from fairseq.modules.quantization.scalar.modules.replace import moved
from fairseq.modules.quantization.scalar.modules.straight_through import fake_quantize
from fairseq.modules.quantization.scalar.modules.weight import IntLinear
from fairseq.modules.quantization.scalar.ops import check_bits
from fairseq.modules.quantization.scalar.tokens import (
    check_static_state,
    fake_quantize_tokens,
    static_offset,
    static_qparams,
)
from fairseq.modules.quantization.scalar.weights import (
    check_group_size,
    check_settings,
    join_groups,
    observe_weight,
    settings_tensor,
    split_groups,
    weight_to_int,
)


class EmulatedLinear(IntLinear):
    """An :class:`IntLinear` that computes, in float and with straight-through gradients, what a PackedLinear computes.

    Every weight is quantized (p=1), in training too; "histogram" has a scale per output channel.

    Attributes:
        group_size: input channels that share a scale, or None.
        symmetric: the zero point is in the middle of the grid.
        activations: "dynamic" rounds the input per token, "static" on a fixed grid, None leaves it.
        activation_bits: of the rounded input.
        input_scale: float32 (1,), and input_zero_point, int32 (1,): buffers, None unless static. They are those of a
            PackedLinear, and the scale keeps its dtype in ``.half()``.
        input_factor: (in_features,), a buffer, or None: the input is multiplied by it before it is rounded.
        name: how errors call the layer.
    """

    group_size: int | None = None
    symmetric = False
    activations: str | None = None
    activation_bits = 8
    name = "linear"
    settings: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_factor: Tensor | None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int,
        method: str,
        group_size: int | None = None,
        symmetric: bool = False,
        activations: str | None = None,
        name: str = "linear",
        update_step: int = 100,
        *,
        activation_bits: int = 8,
        input_range: Sequence[float] | None = None,
        input_factor: Tensor | None = None,
    ) -> EmulatedLinear:
        """The emulation of ``linear`` with its very parameters; the range of its weight is observed at once.

        ``input_range`` is (low, high) of the input, for ``activations="static"`` and only for it.

        Raises:
            TypeError, ValueError: not a plain nn.Linear, settings or weights that cannot be quantized, a range that is
                missing, not used, or none.
        """
        check_group_size(group_size, method)
        check_bits(activation_bits)
        layer = cls.from_float(linear, 1, update_step, bits, method)
        assert isinstance(layer, EmulatedLinear)
        layer.group_size, layer.symmetric, layer.activations, layer.name = group_size, symmetric, activations, name
        settings = settings_tensor(bits, layer.in_features, group_size, symmetric)
        layer.register_buffer("settings", settings.to(layer.weight.device))
        layer.activation_bits = activation_bits
        layer.register_buffer("input_factor", None if input_factor is None else input_factor.detach().clone())
        qparams = static_qparams(activations, input_range, activation_bits, name)
        for key, value in zip(("input_scale", "input_zero_point"), qparams, strict=True):
            layer.register_buffer(key, None if value is None else value.to(layer.weight.device))
        layer.observe_weight()
        return layer

    def quantized_weight(self) -> Tensor:
        """The weight on its grid, with straight-through gradients: (out, in)."""
        scale, zero_point = self._grid()
        if self.group_size is None:
            return fake_quantize(self.weight, scale, zero_point, self.bits)
        rows = split_groups(self.weight, self.group_size)
        return join_groups(fake_quantize(rows, scale.flatten(), zero_point.flatten(), self.bits), self.weight.shape)

    def integers(self) -> Tensor:
        """The weight's integers, uint8 of shape (out_features, in_features)."""
        return weight_to_int(self.weight, *self._grid(), self.bits, self.group_size)

    def forward(self, input: Tensor) -> Tensor:
        if self.input_factor is not None:
            input = input * self.input_factor.to(input.dtype)
        if self.activations == "dynamic":
            input = fake_quantize_tokens(input, self.activation_bits)
        elif self.input_scale is not None and self.input_zero_point is not None:
            zero_point = self.input_zero_point + static_offset(self.activation_bits)
            input = fake_quantize(input, self.input_scale, zero_point, self.activation_bits)
        return F.linear(input, self.noisy_weight(), self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> EmulatedLinear:
        kept = self.input_scale
        super()._apply(fn, recurse)
        if kept is not None and self.input_scale is not None:
            self.input_scale = moved(kept, self.input_scale.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        settings = settings_tensor(self.bits, self.in_features, self.group_size, self.symmetric)
        check_settings(state_dict.get(prefix + "settings"), settings, prefix[:-1] or self.name)
        check_static_state(state_dict, prefix, self.activations == "static", prefix[:-1] or self.name)
        own = {"settings": self.settings, "input_scale": self.input_scale, "input_zero_point": self.input_zero_point}
        kept = {prefix + key: value for key, value in own.items() if value is not None}  # if a float model was saved
        super()._load_from_state_dict({**kept, **state_dict}, prefix, *args)

    def extra_repr(self) -> str:
        group = "" if self.group_size is None else f", group_size={self.group_size}"
        bits = "" if self.activation_bits == 8 else f", activation_bits={self.activation_bits}"
        shown = f"{super().extra_repr()}, activations={self.activations}{bits}{group}"
        return f"{shown}{', symmetric' * self.symmetric}"

    def _observed(self) -> QParams:
        with plain_context():
            return observe_weight(
                self.weight, self.bits, self.method, self.group_size, self.symmetric, f"{self.name}.weight"
            )

    def _scale_count(self) -> int:
        if self.method == "tensor":
            return 1
        return self.out_features * (1 if self.group_size is None else -(-self.in_features // self.group_size))
