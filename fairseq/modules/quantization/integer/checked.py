"""checked: a mode in which every intermediate integer is held to the width that is documented for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Widths = dict[str, tuple[int, int]]
_SEEN: ContextVar[Widths | None] = ContextVar("checked", default=None)


@contextmanager
def checked() -> Iterator[Widths]:
    """Inside, integer-only functions raise OverflowError where an intermediate is past its documented width.

    Yields what is seen on the way: by the name of each intermediate, the bits documented for it and those it took.
    """
    seen: Widths = {}
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def is_checked() -> bool:
    """Whether intermediates are checked: not while a compiler records operations, which has no numbers."""
    return not torch.compiler.is_compiling() and _SEEN.get() is not None


def largest(x: Tensor | int) -> int:
    """The largest magnitude of integers, as a Python int; 0 of none."""
    if isinstance(x, int):
        return abs(x)
    return max(-int(x.min()), int(x.max())) if x.numel() else 0


def bounded(x: Tensor, bits: int, name: str) -> Tensor:
    """``x`` as it is; in the mode :func:`checked`, OverflowError unless it fits signed integers of ``bits`` bits."""
    seen = _SEEN.get() if is_checked() else None
    if seen is not None and x.numel():
        low, high = int(x.min()), int(x.max())
        used = max(high, ~low, 0).bit_length() + 1
        if used > bits:
            raise OverflowError(f"{name}: {low} to {high} do not fit {bits} bits")
        seen[name] = bits, max(used, seen.get(name, (0, 0))[1])
    return x
