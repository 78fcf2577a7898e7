"""Buffers that keep their dtype when their module moves to another."""

from __future__ import annotations

from torch import Tensor, nn


def keep_dtypes(module: nn.Module, before: dict[str, Tensor | None]) -> None:
    """Give buffers the numbers and the dtype back that they had ``before``, on the device where they are now."""
    for name, old in before.items():
        new = module._buffers[name]
        if old is not None and new is not None and new.dtype != old.dtype:
            module._buffers[name] = old.to(new.device)
