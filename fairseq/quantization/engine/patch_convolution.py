"""PatchConvolution: a patch embedding in float32 that the native kernels run where that is faster."""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fairseq.modules.quantization.packed import kernels
from fairseq.modules.quantization.packed.kernels import functional, native, native_calls, operators, patch_products
from fairseq.modules.quantization.packed.patches import reason_not_packable

SMALLEST = 4
"""Pixels across a patch: those of Swin. Smaller ones take longer to gather than to multiply."""
FEWEST = 512
"""Numbers of a patch from which on a product of floats is faster than the convolution: 14 x 14 pixels of three channels
have more; 8 x 8 take 1.2 times as long, 4 x 4 up to three times (AMD EPYC of the fifth generation)."""


class PatchConvolution(nn.Conv2d):
    """What an ``nn.Conv2d`` becomes whose patches do not overlap, in the place of its class.

    On the CPU and in float32 it runs as a product of floats where the instruction set is one of AVX-512, and as three
    of bfloat16, high and low parts of pixels and weights, where it has tiles for them (AMX): faster than the
    convolution, and off by a few millionths; see :func:`~.patch_products.run_patches`. Otherwise it is the convolution,
    as its gradients are, and what a trace or ONNX holds. Parameters, their names and the state dict stay as they are. A
    weight that is changed behind PyTorch's back, through ``.data`` in place, is not noticed.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out, H // height, W // width), the same dtype."""
        if not self._fits(input):
            return super().forward(input)
        return _run(input, self.weight, self.bias)

    def _fits(self, input: Tensor) -> bool:
        tensors = [tensor for tensor in (input, self.weight, self.bias) if tensor is not None]
        if not functional.plain(*tensors) or any(map(_has_tangent, tensors)):  # first: torch.fx takes no branches
            return False
        if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
            return False
        if input.ndim != 4 or input.shape[1] != self.in_channels or torch.is_autocast_enabled("cpu"):
            return False
        if any(size < patch for size, patch in zip(input.shape[2:], self.kernel_size)):
            return False
        if reason_not_packable(self) or functional.recording() or not kernels.runs_native("auto"):
            return False
        return _worthwhile(self.weight[0].numel())

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        patch_products.forget_patches(self.weight)  # whose numbers may change behind PyTorch's back
        return super()._apply(fn, recurse)


def _has_tangent(tensor: Tensor) -> bool:
    """Whether it is differentiated forwards."""
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None


def _run(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    pixels, weight = pixels.contiguous(), weight if weight.is_contiguous() else weight.contiguous()
    gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (pixels, weight, bias))
    if gradients or torch.compiler.is_compiling():
        y = operators.native_patches(pixels, weight, bias)
    else:
        y = patch_products.run_patches(pixels, weight, bias, native.level_number())
    return cast(Tensor, y.permute(0, 3, 1, 2))


def _worthwhile(numbers: int) -> bool:
    """Whether the instruction set that would run multiplies patches of so many numbers faster than PyTorch, and may."""
    if not native.levels() or native_calls.attention_is_exact():
        return False
    level = native.level_number()
    return native.fast_halves(level) or (native.fast_floats(level) and numbers >= FEWEST)


# A compiler takes what they return, as for what choose() decides.
_worthwhile._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reason_not_patches(module: nn.Module) -> str | None:
    """Why a module cannot become a :class:`PatchConvolution`, or None."""
    if type(module) is not nn.Conv2d:
        return f"it is a {type(module).__qualname__}, not an nn.Conv2d"
    if min(module.kernel_size) < SMALLEST:
        return f"its patches are of less than {SMALLEST} x {SMALLEST} pixels"
    return reason_not_packable(module)
