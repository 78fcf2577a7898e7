"""An IntegerViT as a model of transformers: of the class that it was made from, with that class's methods."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.quantization.integer_only.model import IntegerViT


class PretrainedIntegerViT(IntegerViT):
    """Put before the class of a HuggingFace model: its name, config and files, and for the rest an IntegerViT.

    So ``pipeline``, ``Trainer`` and whatever asks for a model of that class take it. It has no parameters; its dtype is
    that of the logits.
    """

    original: type

    @property
    def device(self) -> torch.device:
        """Where the integers are."""
        return self.pixel_start.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None, labels: Tensor | None = None, **others: Any
    ) -> Any:
        """As :meth:`IntegerViT.forward`; with ``labels``, int64 (B,), also the loss of the float model's class."""
        output = super().forward(pixel_values, return_dict, **others)
        if labels is None:
            return output
        model: Any = self
        if isinstance(output, tuple):
            return model.loss_function(labels, output[0], self.config), *output
        return type(output)({"loss": model.loss_function(labels, output.logits, self.config), **output})

    def _get_name(self) -> str:
        return IntegerViT.__name__

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, (type(self).original,), self.__getstate__()


def as_pretrained(model: IntegerViT, like: nn.Module) -> IntegerViT:
    """Make ``model``, in place, one of the class of ``like`` if that is HuggingFace's, with a copy of its config."""
    model.config = copy.deepcopy(getattr(like, "config", None))
    kind: Any = type(like)
    if any(base.__module__ == "transformers.modeling_utils" for base in kind.__mro__):
        own = vars(nn.Module()).keys() | vars(model).keys() | {"quantization_information"}
        kept = {n: value for n, value in vars(like).items() if n not in own and not callable(value)}
        vars(model).update(kept)
        model.__class__ = _class_of(kind)
    return model


def become(model: nn.Module, integers: IntegerViT) -> None:
    """Make of ``model``, in place, what ``integers`` is: for a loader that returns the object which it has made."""
    vars(model).clear()
    vars(model).update(vars(integers))
    model.__class__ = type(integers)


@functools.cache
def _class_of(kind: type) -> Any:
    """The class of an integer-only model made from one of ``kind``."""
    content = {"__module__": __name__, "__doc__": PretrainedIntegerViT.__doc__, "original": kind}
    return type(kind.__name__, (PretrainedIntegerViT, kind), content)


def _new(kind: type) -> Any:
    """An empty model of such a class, for pickle and copy, which know no class made on the fly."""
    made = _class_of(kind)
    return made.__new__(made)
