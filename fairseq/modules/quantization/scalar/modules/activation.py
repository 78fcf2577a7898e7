"""ActivationQuantizer: a forward hook that rounds a module's output to n-bit integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.scalar import ops
from fairseq.modules.quantization.scalar.modules.fingerprint import in_backward
from fairseq.modules.quantization.scalar.modules.straight_through import check_noise, fake_quantize_ste, quant_noise

SCALE, ZERO_POINT = "activation_scale", "activation_zero_point"


class Handle:
    """Takes an ActivationQuantizer off its module again: hooks and buffers."""

    def __init__(self, module: nn.Module, hooks: tuple[RemovableHandle, ...]):
        self.module, self.hooks = module, hooks

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for name in (SCALE, ZERO_POINT):
            self.module._buffers.pop(name, None)


class ActivationQuantizer:
    """Quantize the output of ``module`` from now on; ``.handle.remove()`` undoes it.

    In training an element is quantized with probability ``p``, and the range is observed from the batch every
    ``update_step`` training forwards; in eval every element is quantized with the last range (that of the first batch
    if there was no training). Gradients are straight-through.

    The scale and zero point are the buffers ``activation_scale`` and ``activation_zero_point`` of ``module``, so they
    move, save, load and copy with it: of shape (1,), or (C,) for "channel". They are None until the first forward:
    ``AveragedModel``, which pairs buffers by their order, is to be made after it. As any buffer of any module, the
    scale is rounded by the module's ``.half()``.

    Args:
        module: any module that returns one tensor.
        p: 0 to 1.
        update_step: at least 1.
        bits: 2 to 8.
        method: "tensor", "histogram" (least squared error), or "channel": one scale per feature, the last dimension
            of the output (the channels after a convolution).
        clamp_threshold: before the range is observed, values further than this many standard deviations from the
            mean are clamped to that distance; None observes all of them. The output itself is clipped to the range.

    Raises:
        TypeError: at the forward, if the module returns something else than one tensor.
        ValueError: an argument out of its range, or ``module`` already has an ActivationQuantizer.
    """

    def __init__(
        self,
        module: nn.Module,
        p: float = 1,
        update_step: int = 1000,
        bits: int = 8,
        method: str = "histogram",
        clamp_threshold: float | None = 5,
    ):
        check_noise(p, update_step)
        if clamp_threshold is not None and not clamp_threshold > 0:
            raise ValueError(f"clamp_threshold is a number of standard deviations above 0, or None: {clamp_threshold}")
        if any(isinstance(getattr(h, "__self__", None), ActivationQuantizer) for h in module._forward_hooks.values()):
            raise ValueError(f"this {type(module).__name__} has an ActivationQuantizer already")
        self.module, self.p, self.update_step, self.clamp_threshold = module, p, update_step, clamp_threshold
        self.bits, self.method = ops.check_bits(bits), ops.check_method(method)
        self.steps = 0
        module.register_buffer(SCALE, None)
        module.register_buffer(ZERO_POINT, None)
        hooks = (
            module.register_forward_hook(self.quantize_output),
            module.register_load_state_dict_pre_hook(self.prepare_buffers),
        )
        self.handle = Handle(module, hooks)

    def __repr__(self) -> str:
        return f"ActivationQuantizer(bits={self.bits}, method={self.method}, p={self.p})"

    def quantize_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The hook: the output, quantized."""
        if not isinstance(output, Tensor):
            raise TypeError(f"ActivationQuantizer needs a module that returns a tensor, got {type(output).__name__}")
        counts = module.training and not in_backward()  # what gradient checkpointing repeats is no new batch
        if getattr(module, SCALE) is None or (counts and self.steps % self.update_step == 0):
            self.observe(module, output)
        self.steps += counts
        p = self.p if module.training else 1
        if p == 0:
            return output
        scale, zero_point = getattr(module, SCALE), getattr(module, ZERO_POINT)
        scale = scale.to(ops.compute_dtype(output.dtype))  # .half() on the module rounds its buffers as well
        return quant_noise(output, fake_quantize_ste(output, scale, zero_point, self.bits, self.axis(module)), p)

    def observe(self, module: nn.Module, output: Tensor) -> None:
        """Set the range from this output."""
        x = output.detach()
        if self.clamp_threshold is not None and x.numel() > 1:
            values = x.to(ops.compute_dtype(x.dtype))
            mean, distance = values.mean(), self.clamp_threshold * values.std()
            x = values.clamp(mean - distance, mean + distance)
        axis = self.axis(module) if self.method == "channel" else None
        with plain_context():
            scale, zero_point = ops.observe(
                x, self.bits, self.method, axis, name=f"the output of {type(module).__name__}"
            )
        setattr(module, SCALE, scale)
        setattr(module, ZERO_POINT, zero_point)

    @staticmethod
    def axis(module: nn.Module) -> int:
        """The dimension of the output's features."""
        return -(len(module.kernel_size) + 1) if isinstance(module, _ConvNd) else -1

    @staticmethod
    def prepare_buffers(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Before loading: make room for a saved range, or forget this one where none is saved."""
        for name, old in ((SCALE, getattr(module, SCALE)), (ZERO_POINT, getattr(module, ZERO_POINT))):
            saved = state_dict.get(prefix + name)
            reference = next((p for p in module.parameters()), old)
            device = saved.device if saved is not None and reference is None else getattr(reference, "device", None)
            setattr(module, name, None if saved is None else torch.empty_like(saved, device=device))
