"""Which devices the kernels run on, found out without importing Triton."""

from __future__ import annotations

import functools
import importlib.util

import torch

LEAST = 80
"""Compute capability, 10 * major + minor: the first whose tensor cores multiply int8 as these kernels need it."""
INTERPRETED = 90
"""Whose tiles run where Triton interprets its kernels, which it does on the CPU."""


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported; it comes with PyTorch for CUDA on Linux."""
    return importlib.util.find_spec("triton") is not None


def capability(device: torch.device) -> int:
    """10 * major + minor of a device."""
    return _capability(device.index) if device.type == "cuda" else INTERPRETED


@functools.cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def reason_not_on(device: torch.device) -> str | None:
    """Why these kernels cannot run there, in one sentence; None if they can."""
    if not installed():
        return "Triton is not installed; it comes with PyTorch for CUDA on Linux"
    if torch.version.cuda is None:
        return "PyTorch was built without CUDA"
    if capability(device) < LEAST:
        return f"the device has compute capability {capability(device) / 10}; the kernels need {LEAST / 10} or more"
    return None
