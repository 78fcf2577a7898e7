"""QuantAct, which rounds activations over a running range, and the freezing of those ranges in a whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.integer.buffers import keep_dtypes
from fairseq.modules.quantization.integer.carrier import carrier_dtype, check_quant_mode, check_width
from fairseq.modules.quantization.integer.ranges import symmetric_linear_quantization_params
from fairseq.modules.quantization.integer.straight_through import SymmetricQuantFunction, fixedpoint_mul
from fairseq.modules.quantization.scalar import ops

Pair = tuple[Tensor, Tensor | None]
"""(x, scaling_factor); the scaling factor is None where x is real."""


class QuantAct(nn.Module):
    """Round activations to ``activation_bit`` wide integers over a running range.

    In training the range of each batch enters the running one; in eval the running one is used as it is. Values
    outside the range are clamped to its ends, and get gradient 0.

    The range and its scale are float64 buffers: ``x_min``, ``x_max``, ``act_scaling_factor``, each of shape (1,) or
    (channel_len,), and the flag ``calibrated``, False until the first observation. They keep their dtype when the
    module is cast.

    Args:
        activation_bit: 2 to 32.
        act_range_momentum: 0 to 1, the weight of the old range when a batch enters; -1 keeps the widest range seen.
        per_channel: one range for each entry of the last dimension, else one for everything.
        channel_len: the size of the last dimension, for ``per_channel``; None otherwise.
        quant_mode: "none" (ranges are observed all the same) or "symmetric".
    """

    x_min: Tensor
    x_max: Tensor
    act_scaling_factor: Tensor
    calibrated: Tensor

    def __init__(
        self,
        activation_bit: int,
        act_range_momentum: float = 0.95,
        per_channel: bool = False,
        channel_len: int | None = None,
        quant_mode: str = "none",
    ):
        super().__init__()
        if not (act_range_momentum == -1 or 0 <= act_range_momentum <= 1):
            raise ValueError(f"act_range_momentum must be from 0 to 1, or -1 for the widest; got {act_range_momentum}")
        if per_channel != (channel_len is not None):
            raise ValueError(
                f"channel_len goes with per_channel=True only; got per_channel={per_channel}, channel_len={channel_len}"
            )
        self.activation_bit = check_width(activation_bit, "activation_bit")
        self.act_range_momentum, self.per_channel, self.channel_len = act_range_momentum, per_channel, channel_len
        self.quant_mode = check_quant_mode(quant_mode)
        self.running_stat = True
        for name in ("x_min", "x_max", "act_scaling_factor"):
            self.register_buffer(name, torch.zeros(channel_len or 1, dtype=torch.float64))
        self.register_buffer("calibrated", torch.tensor(False))

    def extra_repr(self) -> str:
        return f"activation_bit={self.activation_bit}, quant_mode={self.quant_mode}"

    def fix(self) -> None:
        """Stop observing: training forwards leave the range as it is."""
        self.running_stat = False

    def unfix(self) -> None:
        """Observe again in training forwards."""
        self.running_stat = True

    def forward(
        self,
        x: Tensor,
        pre_act_scaling_factor: Tensor | None = None,
        identity: Tensor | None = None,
        identity_scaling_factor: Tensor | None = None,
        specified_min: Tensor | float | None = None,
        specified_max: Tensor | float | None = None,
    ) -> Pair:
        """Quantize ``x``, or ``x + identity``.

        Args:
            x: real numbers, or integers times ``pre_act_scaling_factor``, of any shape. Finite.
            pre_act_scaling_factor: None if ``x`` is real; given, its integers are requantized in integer arithmetic.
            identity: a second tensor to add, such as a residual.
            identity_scaling_factor: its factor; given if and only if ``pre_act_scaling_factor`` and ``identity`` are.
            specified_min, specified_max: take the place of the running ends in this forward.

        Returns:
            (y, scaling_factor): float32 up to 23 bits, else float64; "none": (x + identity, None).

        Raises:
            RuntimeError: no range has been observed yet, and none is specified.
            ValueError: NaN or Inf, scaling factors that do not fit, an ``x`` that is not a multiple of its factor.
            OverflowError: an input integer that its dtype does not hold exactly.
        """
        total = x if identity is None else x + identity
        if self.training and self.running_stat:
            self.observe(total)
        if self.quant_mode == "none":
            return total, None
        scale = self._scale(specified_min, specified_max)
        if pre_act_scaling_factor is None:
            if identity_scaling_factor is not None:
                raise ValueError("QuantAct: identity_scaling_factor needs pre_act_scaling_factor; give both or neither")
            ops.check_tensor(total, "the input of QuantAct")
            q = SymmetricQuantFunction.apply(total, self.activation_bit, False, scale, -1)
        else:
            q = fixedpoint_mul.apply(
                x,
                pre_act_scaling_factor,
                self.activation_bit,
                self.quant_mode,
                scale,
                identity,
                identity_scaling_factor,
            )
        return (q.double() * scale).to(carrier_dtype(self.activation_bit)).reshape(total.shape), scale

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Let the range of ``x`` enter the running range, and update the scale."""
        values = ops.check_tensor(x.detach(), "the input of QuantAct")
        if self.per_channel and (x.ndim == 0 or x.shape[-1] != self.channel_len):
            raise ValueError(f"QuantAct has channel_len={self.channel_len}, got an input of shape {tuple(x.shape)}")
        rows = values.reshape(-1, self.channel_len or 1)  # (*, C)
        low, high = (end.to(self.x_min) for end in torch.aminmax(rows, dim=0))
        if self.calibrated:
            if self.act_range_momentum == -1:
                low, high = torch.minimum(self.x_min, low), torch.maximum(self.x_max, high)
            else:
                low, high = (
                    torch.lerp(new, old, self.act_range_momentum)
                    for new, old in ((low, self.x_min), (high, self.x_max))
                )
        self.x_min.copy_(low)
        self.x_max.copy_(high)
        self.act_scaling_factor.copy_(self._range_scale(low, high))
        self.calibrated.fill_(True)

    def _range_scale(self, low: Tensor, high: Tensor) -> Tensor:
        return symmetric_linear_quantization_params(self.activation_bit, low, high, self.per_channel)

    def _scale(self, specified_min: Tensor | float | None, specified_max: Tensor | float | None) -> Tensor:
        if (specified_min is None or specified_max is None) and not self.calibrated:
            raise RuntimeError(
                "QuantAct has not observed a range yet: run a few batches through it in training mode "
                "(model.train(), not frozen), load a state_dict, or give specified_min and specified_max"
            )
        if specified_min is None and specified_max is None:
            return self.act_scaling_factor.clone()
        ends = []
        for given, running in ((specified_min, self.x_min), (specified_max, self.x_max)):
            end = running if given is None else torch.as_tensor(given, dtype=running.dtype, device=running.device)
            ends.append(end.expand_as(running))
        return self._range_scale(*ends)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantAct:
        """Move as any module does, but keep the range and scale in float64: float16 would round them."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        return self


def freeze_model(model: nn.Module) -> None:
    """Stop every QuantAct in ``model``, those inside other layers included, from observing ranges."""
    for module in model.modules():
        if isinstance(module, QuantAct):
            module.fix()


def unfreeze_model(model: nn.Module) -> None:
    """Let every QuantAct in ``model``, those inside other layers included, observe ranges in training again."""
    for module in model.modules():
        if isinstance(module, QuantAct):
            module.unfix()
