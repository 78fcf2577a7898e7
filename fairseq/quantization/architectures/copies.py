"""copied: a deep copy of a model, refused where a forward that was replaced would go on calling the original."""

from __future__ import annotations

import copy
import dis
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
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
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed} | (memo or {}))


def check_forwards(model: nn.Module) -> None:
    """The ValueError of :func:`copied`."""
    own = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        made_anew = type(module).__setstate__ is not nn.Module.__setstate__  # as torch.compile(model) makes its own
        forward = None if made_anew else vars(module).get("forward")
        if _shares(forward, own, False, set()):
            where = f"{name}.forward" if name else "forward"
            raise ValueError(
                f"{where} was replaced on this {type(model).__name__} by a function that calls the model which it was "
                f"made for, and would do so in a copy; take it away (del model.{where}), and put one on the quantized "
                "model instead"
            )


def _shares(value: Any, own: set[int], in_function: bool, seen: set[tuple[int, bool]]) -> bool:
    """Whether a copy of ``value`` would hold one of the modules ``own``: a deep copy leaves functions as they are."""
    if isinstance(value, nn.Module):
        return in_function and id(value) in own
    if (id(value), in_function) in seen or isinstance(value, type | ModuleType | CodeType | Tensor):
        return False
    seen.add((id(value), in_function))
    in_function = in_function or isinstance(value, FunctionType)
    return any(_shares(part, own, in_function, seen) for part in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    """What a callable, a container or an object holds."""
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
        found = (value.__globals__.get(name) for name in _global_names(value.__code__))  # of a script or a notebook
        for each in found:
            same_file = isinstance(each, FunctionType) and each.__globals__ is value.__globals__
            if same_file or isinstance(each, nn.Module | MethodType | partial):
                yield each
    elif isinstance(value, dict | list | tuple | set):
        yield from value.values() if isinstance(value, dict) else value
    elif not type(value).__module__.startswith("torch"):
        yield from getattr(value, "__dict__", {}).values()


def _global_names(code: CodeType) -> Iterator[str]:
    """The global variables that a function reads, in comprehensions, too."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
