"""checked: a mode in which every intermediate integer is held to the width that is documented for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_ON: ContextVar[bool] = ContextVar("checked", default=False)


@contextmanager
def checked() -> Iterator[None]:
    """Inside, integer-only functions raise OverflowError where an intermediate is past its documented width."""
    token = _ON.set(True)
    try:
        yield
    finally:
        _ON.reset(token)


def is_checked() -> bool:
    """Whether intermediates are checked."""
    return _ON.get()


def largest(x: Tensor | int) -> int:
    """The largest magnitude of integers, as a Python int; 0 of none."""
    if isinstance(x, int):
        return abs(x)
    return max(-int(x.min()), int(x.max())) if x.numel() else 0


def bounded(x: Tensor, bits: int, name: str) -> Tensor:
    """``x`` as it is; in the mode :func:`checked`, OverflowError unless it fits signed integers of ``bits`` bits."""
    if is_checked() and x.numel():
        low, high = int(x.min()), int(x.max())
        if low < -(2 ** (bits - 1)) or high >= 2 ** (bits - 1):
            raise OverflowError(f"{name}: {low} to {high} do not fit {bits} bits")
    return x
