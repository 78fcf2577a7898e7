"""NoFloat: a mode in which any operation with a floating number raises. The proof that a computation is of integers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FloatingOperation(RuntimeError):
    """A floating number went into an operation, or came out of it."""


class NoFloat(TorchDispatchMode):
    """Raise :class:`FloatingOperation` on an operation with a floating or complex tensor or number, in or out.

    Attributes:
        count: how many operations it has seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += 1
        for value in tree_leaves((args, kwargs, result)):
            of_float = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
            if of_float or isinstance(value, float | complex):
                what = str(value.dtype) if isinstance(value, Tensor) else repr(value)
                raise FloatingOperation(f"{func} works with {what}, where only integers may be")
        return result
