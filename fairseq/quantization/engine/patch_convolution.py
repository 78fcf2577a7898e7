"""PatchConvolution: a patch embedding in float32 that the native kernels run where that is faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fairseq.modules.quantization.packed import kernels
from fairseq.modules.quantization.packed.kernels import functional, native
from fairseq.modules.quantization.packed.patches import reason_not_packable

SMALLEST = 4
"""Pixels across a patch: those of Swin. Smaller ones take longer to gather than to multiply."""


class PatchConvolution(nn.Conv2d):
    """What an ``nn.Conv2d`` becomes whose patches do not overlap, in the place of its class.

    On the CPU, in float32 and without gradients, it runs as three products of bfloat16, high and low parts of pixels
    and weights, where the instruction set has tiles for them (AMX): twice as fast as the convolution or more, and off
    by a few millionths; see :func:`native.run_patches`. Otherwise it is the convolution. Parameters, their names and
    the state dict stay as they are. A weight that is changed behind PyTorch's back, through ``.data`` in place, is not
    noticed.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out, H // height, W // width), the same dtype."""
        if torch.compiler.is_compiling() or not self._fits(input):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.detach()
        y = native.run_patches(input.contiguous(), self._panels(), bias, self.weight.shape, native.level_number())
        return y.permute(0, 3, 1, 2)

    def _fits(self, input: Tensor) -> bool:
        tensors = [input, self.weight, *([] if self.bias is None else [self.bias])]
        if any(t.dtype != torch.float32 or t.device.type != "cpu" or not t.is_contiguous() for t in tensors[1:]):
            return False
        if input.dtype != torch.float32 or input.device.type != "cpu" or input.ndim != 4:
            return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return False
        if any(size < patch for size, patch in zip(input.shape[2:], self.kernel_size)):
            return False
        if input.shape[1] != self.in_channels or type(input) is not Tensor or torch.is_autocast_enabled("cpu"):
            return False
        if reason_not_packable(self) or functional.recording() or forward_ad.unpack_dual(input).tangent is not None:
            return False
        if not kernels.runs_native("auto") or not native.levels() or native.attention_is_exact():
            return False
        return native.fast_halves(native.level_number())

    def _panels(self) -> Tensor:
        """The weight as the kernels read it, made anew when it has changed."""
        key = (self.weight.data_ptr(), native.version(self.weight), tuple(self.weight.shape))
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] is not self.weight or kept[1] != key:
            kept = self.__dict__["_kept"] = (self.weight, key, native.patch_panels(self.weight.detach()))
        panels: Tensor = kept[2]
        return panels

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


def reason_not_patches(module: nn.Module) -> str | None:
    """Why a module cannot become a :class:`PatchConvolution`, or None."""
    if type(module) is not nn.Conv2d:
        return f"it is a {type(module).__qualname__}, not an nn.Conv2d"
    if min(module.kernel_size) < SMALLEST:
        return f"its patches are of less than {SMALLEST} x {SMALLEST} pixels"
    return reason_not_packable(module)
