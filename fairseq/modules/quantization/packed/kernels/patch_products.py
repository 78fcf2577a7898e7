"""A convolution over patches that do not overlap, as products in the compiled library: of floats, or of bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from fairseq.modules.quantization.packed.kernels import arguments, library, memory, native
from fairseq.modules.quantization.packed.kernels.structures import Patches
from fairseq.modules.quantization.packed.panels import WIDTH

PATCH_STEP = 32
"""Numbers of a patch are filled up to a multiple of it, as csrc/api.h says."""


def patch_panels(weight: Tensor, halves: bool) -> Tensor:
    """A convolution's weight, float32 (out, C, height, width), as its product reads it.

    Its numbers are filled up with zeros to a multiple of 32, and so are its outputs. In float32 (panels of 32 outputs,
    numbers, 32). In bfloat16 (panels, pairs of numbers, 32, 2): the high parts of the weights, bfloat16(w), the low
    ones, bfloat16(w - high), and the high ones once more.
    """
    rows = weight.detach().reshape(len(weight), -1)
    rows = F.pad(rows, (0, -rows.shape[1] % PATCH_STEP, 0, -len(rows) % WIDTH))
    if not halves:
        return rows.view(-1, WIDTH, rows.shape[1]).transpose(1, 2).contiguous()
    high = rows.to(torch.bfloat16)
    numbers = torch.cat([high, (rows - high.to(rows.dtype)).to(torch.bfloat16), high], 1)
    return numbers.view(-1, WIDTH, numbers.shape[1] // 2, 2).transpose(1, 2).contiguous()


_patch_panels: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _kept_patch_panels(weight: Tensor, halves: bool) -> Tensor:
    """The panels of a weight, made anew when it was written to; a change through ``.data`` in place is not noticed."""
    key = (weight.data_ptr(), arguments.version(weight), halves)
    kept = _patch_panels.get(weight)
    if kept is None or kept[0] != key:
        kept = _patch_panels[weight] = (key, patch_panels(weight, halves))
    panels: Tensor = kept[1]
    return panels


def forget_patches(weight: Tensor) -> None:
    """Drop the panels of a convolution's weight, which may have other numbers without having been written to."""
    _patch_panels.pop(weight, None)


def run_patches(pixels: Tensor, weight: Tensor, bias: Tensor | None, level: int) -> Tensor:
    """A convolution over patches that do not overlap, in float32.

    Where products of bfloat16 are many times as fast (:func:`.native.fast_halves`), it is three of those that give
    nearly those of floats: the error is at most ``(3 * 2**-18 + 3 * K * 2**-24) * sum(abs(x * w))`` over the K numbers
    of a patch, and an Inf makes NaN. Elsewhere each sum is in the order of its terms, rounded once for each, with the
    same bits on every processor: off by at most ``K * 2**-24 * sum(abs(x * w))``.

    Args:
        pixels: float32 (images, C, H, W); what does not fill a patch, at the right and at the bottom, is left out.
        weight: float32 (out, C, height, width).
        bias: float32 (out,) or None.
        level: the number of an instruction set.

    Returns:
        float32 (images, H // height, W // width, out).

    Raises:
        ValueError: another dtype, shape or stride, or pictures of less than a patch.
    """
    out, channels, patch_height, patch_width = weight.shape
    arguments.check("weight", weight, torch.float32, (out, channels, patch_height, patch_width))
    arguments.check("pixels", pixels, torch.float32, (len(pixels), channels, *pixels.shape[2:]))
    if bias is not None:
        arguments.check("bias", bias, torch.float32, (out,))
    images, _, height, width = pixels.shape
    if height < patch_height or width < patch_width:
        raise ValueError(f"pictures of {height} x {width} have no patch of {patch_height} x {patch_width}")
    y = memory.empty((images, height // patch_height, width // patch_width, out))
    if y.numel():
        panels = _kept_patch_panels(weight, native.fast_halves(level))  # held by this name, whatever other threads do
        patches = Patches(
            panels.data_ptr(), arguments.pointer(bias), channels, height, width, patch_height, patch_width, out
        )  # fmt: skip
        threads = torch.get_num_threads()
        library.check_memory(
            library.loaded().fairseq_patches(level, patches, pixels.data_ptr(), images, y.data_ptr(), threads)
        )
    return y
