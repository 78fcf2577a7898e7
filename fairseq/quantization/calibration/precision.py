"""Whether calibration multiplies in bfloat16: where the processor does so in hardware, and a model is wide enough."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

WIDE = 384
"""Input channels of the widest layer from which products in bfloat16 save time."""


def multiplies_in_half(model: nn.Module) -> bool:
    """Whether a float32 model is run, and statistics of it are taken, with products in bfloat16 and sums in float32.

    Hidden states between blocks stay float32. What 4-bit weights change is some twenty times as large.
    """
    like = where(model)
    if like.dtype != torch.float32 or not has_bfloat16(like.device):
        return False
    return max((m.in_features for m in model.modules() if isinstance(m, nn.Linear)), default=0) >= WIDE


def products(model: nn.Module, half: bool) -> AbstractContextManager[object]:
    """Inside, the float layers of ``model`` multiply in bfloat16 if ``half``."""
    if not half:
        return nullcontext()
    return torch.autocast(where(model).device.type, torch.bfloat16, cache_enabled=False)


def where(model: nn.Module) -> Tensor:
    """A parameter that has the device and the dtype of all."""
    return next(p for p in model.parameters() if p.is_floating_point() and p.numel())


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU, or an x86 processor, multiplies in bfloat16 in hardware; False for every other processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
