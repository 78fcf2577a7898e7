"""copied: a deep copy of a model, refused where a forward that was replaced would go on calling the original."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """A deep copy, with the ``memo`` of :func:`copy.deepcopy`; of tensors that are computed (pruning), as they are now.

    Raises:
        ValueError: ``forward`` was replaced, on the model or on a module in it, by a function that calls the model it
            was made for, as ``model.forward = torch.compile(model.forward)`` does: a copy would call that, too.
    """
    check_forwards(model)
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]
    return copy.deepcopy(model, {id(value): value.detach() for value in computed} | (memo or {}))


def check_forwards(model: nn.Module) -> None:
    """The ValueError of :func:`copied`."""
    own = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        made_anew = type(module).__setstate__ is not nn.Module.__setstate__  # as torch.compile(model) makes its own
        forward = None if made_anew else vars(module).get("forward")
        if _reaches(forward, own):
            where = f"{name}.forward" if name else "forward"
            raise ValueError(
                f"{where} was replaced on this {type(model).__name__} by a function that calls the model which it was "
                f"made for, and would do so in a copy; take it away (del model.{where}), and put one on the quantized "
                "model instead"
            )


def _reaches(forward: Any, own: set[int]) -> bool:
    """Whether a callable holds modules that a deep copy does not replace: those in a function's variables."""
    if isinstance(forward, MethodType):
        return _reaches(forward.__func__, own)
    if isinstance(forward, partial):
        return _reaches(forward.func, own)
    return isinstance(forward, FunctionType) and _holds(forward, own, set())


def _holds(value: Any, own: set[int], seen: set[int]) -> bool:
    """Whether one of the modules ``own`` is in ``value``, or in what that calls."""
    if isinstance(value, nn.Module):
        return id(value) in own
    if id(value) in seen or not isinstance(value, MethodType | partial | FunctionType | list | tuple | dict):
        return False
    seen.add(id(value))
    return any(_holds(part, own, seen) for part in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, FunctionType):
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # it has not been filled
                continue
        for name in value.__code__.co_names:  # of a script or a notebook
            found = value.__globals__.get(name)
            if not isinstance(found, FunctionType) or found.__globals__ is value.__globals__:
                yield found
    else:
        yield from value.values() if isinstance(value, dict) else value
