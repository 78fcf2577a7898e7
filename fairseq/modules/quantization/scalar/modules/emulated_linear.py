"""EmulatedLinear: the trainable twin of a packed layer, with the same integers and the same rounding of activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.scalar.grid import QParams
from fairseq.modules.quantization.scalar.modules.learned import become_parameter, positive, scales_kept
from fairseq.modules.quantization.scalar.modules.straight_through import fake_quantize_ste
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

ACTIVATIONS = ("dynamic", "static", None)


class EmulatedLinear(IntLinear):
    """An :class:`IntLinear` that computes, in float and with straight-through gradients, what a PackedLinear computes.

    Every weight is quantized, in training too (``p`` of 1); "histogram" has a scale per output channel.

    Args:
        in_features, out_features, bias, p, update_step, bits, method: as :class:`IntLinear`.
        group_size: input channels that share a scale, or None.
        symmetric: the zero point is in the middle of the grid.
        activations: "dynamic" rounds the input per token, "static" on a fixed grid, None leaves it.
        name: how errors call the layer.
        activation_bits: of the rounded input.
        input_range: (low, high) of the input, for ``activations="static"`` and only for it.
        input_factor: (in_features,), or None: the input is multiplied by it before it is rounded.

    Attributes:
        input_scale: float32 (1,), and input_zero_point, int32 (1,): buffers, None unless static. They are those of a
            PackedLinear, and the scale keeps its dtype in ``.half()``. After :meth:`learn_scale` it is a parameter.

    Raises:
        TypeError, ValueError: settings that do not exist or do not go together, a range that is missing, not used, or
            none.
    """

    settings: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_factor: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 1,
        update_step: int = 100,
        bits: int = 8,
        method: str = "histogram",
        *,
        group_size: int | None = None,
        symmetric: bool = False,
        activations: str | None = None,
        name: str = "linear",
        activation_bits: int = 8,
        input_range: Sequence[float] | None = None,
        input_factor: Tensor | None = None,
    ):
        super().__init__(in_features, out_features, bias, p, update_step, bits, method)
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations of {name} must be 'dynamic', 'static' or None, got {activations!r}")
        self.group_size, self.symmetric = check_group_size(group_size, method), symmetric
        self.activations, self.activation_bits, self.name = activations, check_bits(activation_bits), name
        scale, zero_point = static_qparams(activations, input_range, activation_bits, name)
        buffers = {
            "settings": settings_tensor(bits, in_features, group_size, symmetric),
            "input_factor": None if input_factor is None else input_factor.detach().clone(),
            "input_scale": scale,
            "input_zero_point": zero_point,
        }
        for key, value in buffers.items():
            self.register_buffer(key, value)
        self._place_buffers()

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
        with plain_context():
            layer = cls.from_float(
                linear, 1, update_step, bits, method, group_size=group_size, symmetric=symmetric,
                activations=activations, name=name, activation_bits=activation_bits, input_range=input_range,
                input_factor=input_factor,
            )  # fmt: skip
            layer._place_buffers()
        layer.observe_weight()
        return layer

    def quantized_weight(self) -> Tensor:
        """The weight on its grid, with straight-through gradients: (out, in)."""
        scale, zero_point = self._grid()
        if self.group_size is None:
            return fake_quantize_ste(self.weight, scale, zero_point, self.bits)
        rows = split_groups(self.weight, self.group_size)
        return join_groups(fake_quantize_ste(rows, scale.flatten(), zero_point.flatten(), self.bits), self.weight.shape)

    def grid(self) -> QParams:
        """Scale and zero point of the weight as it is now, a learned scale above 0: shapes as ``scale``."""
        return self._grid()

    def input_grid(self) -> QParams | None:
        """Scale and zero point of the input, a learned scale above 0; None unless static."""
        if self.input_scale is None or self.input_zero_point is None:
            return None
        scale = positive(self.input_scale) if "input_scale" in self._parameters else self.input_scale
        return scale, self.input_zero_point

    def integers(self) -> Tensor:
        """The weight's integers, uint8 of shape (out_features, in_features)."""
        return weight_to_int(self.weight, *self._grid(), self.bits, self.group_size)

    def forward(self, input: Tensor) -> Tensor:
        if self.input_factor is not None:
            input = input * self.input_factor.to(input.dtype)
        if self.activations == "dynamic":
            input = fake_quantize_tokens(input, self.activation_bits)
        elif (grid := self.input_grid()) is not None:
            zero_point = grid[1] + static_offset(self.activation_bits)
            sharing = input.numel() // max(len(input), 1)  # of one picture
            input = fake_quantize_ste(input, grid[0], zero_point, self.activation_bits, sharing=sharing)
        return F.linear(input, self.noisy_weight(), self.bias)

    def learn_scale(self) -> None:
        """Make parameters of ``scale`` and, where there is one, of ``input_scale``; see :class:`QuantizedWeight`."""
        super().learn_scale()
        if self.input_scale is not None:
            become_parameter(self, "input_scale")

    def _apply(self, fn: Any, recurse: bool = True) -> EmulatedLinear:
        with scales_kept(self, "input_scale"):
            super()._apply(fn, recurse)
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

    def _place_buffers(self) -> None:
        """Put the buffers where the weight is; they are never left on the meta device, on which the layer is built."""
        if not self.weight.is_meta:
            for key, value in self._buffers.items():
                self._buffers[key] = None if value is None else value.to(self.weight.device)

    def _observed(self) -> QParams:
        with plain_context():
            return observe_weight(
                self.weight, self.bits, self.method, self.group_size, self.symmetric, f"{self.name}.weight"
            )

    def _scale_count(self) -> int:
        if self.method == "tensor":
            return 1
        return self.out_features * (1 if self.group_size is None else -(-self.in_features // self.group_size))
