"""Replacing a layer: which ones cannot be, what the new one takes over, and how scales move with it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def reason_not_quantizable(module: nn.Module) -> str | None:
    """Why ``module`` cannot be replaced, or None if it can."""
    own, last = module._parameters, "as pruning or weight_norm do; make that permanent first (prune.remove, ...)"
    if own.get("weight") is None or "bias" in vars(module):
        return f"its {'weight' if own.get('weight') is None else 'bias'} is computed, {last}"
    if hasattr(module, "_hf_hook"):
        return "accelerate moves its weights; load the model without device_map or offloading"
    if "forward" in vars(module):
        return "its forward was replaced, and a quantized layer would not call that"
    return None


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Put every hook that was registered on ``old`` on ``new``, too: forward and backward, with their options."""
    names = [name for name in vars(old) if "_hooks" in name or name == "_is_full_backward_hook"]
    new.__dict__.update({name: copy.copy(vars(old)[name]) for name in names})


def names_of(model: nn.Module, module: nn.Module) -> list[str]:
    """Every name under which ``model`` has ``module``."""
    return [name for name, other in model.named_modules(remove_duplicate=False) if other is module]


def moved(scale: Tensor, device: torch.device) -> Tensor:
    """``scale`` on ``device``, in its own dtype: a module's ``.half()`` moves a scale but never rounds it."""
    if scale.is_meta or device.type == "meta":
        return torch.empty_like(scale, device=device)
    return scale.to(device)
