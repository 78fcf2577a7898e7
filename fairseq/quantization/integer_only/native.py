"""native_outputs and native_pixels: an IntegerViT on the native kernels wherever they may run, with its integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.integer.checked import is_checked
from fairseq.modules.quantization.packed.kernels import (
    ENVIRONMENT,
    functional,
    library,
    native,
    native_calls,
    runs_native,
)
from fairseq.quantization.integer_only.native_model import NativeViT, NotNative

SETTINGS = ("bits", "zero", "dynamic", "size", "patch", "tokens", "norm_first", "outputs", "functions")
"""Attributes of parts that decide what they compute, beside parts and buffers."""


class Known:
    """What is known of a model as it was: the kernels' constants, or why there are none.

    Args:
        model: an :class:`~.model.IntegerViT`.
    """

    def __init__(self, model: nn.Module):
        self.modules = [(m, dict(m._modules), dict(m._buffers), _settings(m)) for m in model.modules()]
        self.inner = [module for module, *_ in self.modules if module is not model]
        self.numbers = [(t, t.data_ptr(), t._version) for t in model.buffers() if not t.is_inference()]
        self.native: NativeViT | None = None
        self.reason: str | None = None
        try:
            with plain_context():
                self.native = NativeViT(model)
        except NotNative as reason:
            self.reason = str(reason)

    def is_current(self) -> bool:
        """Whether the model has the parts, buffers, numbers and settings that were seen."""
        return all(
            _same(module._modules, parts) and _same(module._buffers, buffers) and _settings(module) == settings
            for module, parts, buffers, settings in self.modules
        ) and all(t.data_ptr() == pointer and t._version == number for t, pointer, number in self.numbers)

    def is_watched(self) -> bool:
        """Whether a part has hooks, or a forward of its own, that would see its inputs or outputs."""
        if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
            return True
        return any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in self.inner)


def _settings(module: nn.Module) -> list[Any]:
    return [module.__dict__.get(name) for name in SETTINGS]


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return len(now) == len(before) and all(now.get(name) is value for name, value in before.items())


def native_outputs(model: Any, pixels: Tensor) -> dict[str, Tensor] | None:
    """int32 by output from the native kernels, or None where the reference is to run.

    That is: on another device, without the library, while something records or watches operations, in the mode
    ``checked``, with hooks on a part of the model, or where the kernels cannot compute it: :func:`reason_not_native`.
    """
    if not _runs_here(pixels) or pixels.dtype != torch.uint8 or is_checked():
        return None
    known = _known(model)
    return None if known.native is None or known.is_watched() else known.native(pixels)


def _known(model: Any) -> Known:
    known = model.prepared
    if not isinstance(known, Known) or not known.is_current():
        known = model.prepared = Known(model)
    return known


def native_pixels(pixel_values: Tensor, start: Tensor, step: Tensor) -> Tensor | None:
    """Pixels rounded by the native kernels, or None where the reference is to run, or where there is NaN or Inf."""
    if not _runs_here(pixel_values) or pixel_values.dtype != torch.float32 or not pixel_values.is_contiguous():
        return None
    return native_calls.round_pixels(pixel_values, start, step, native.level_number())


def _runs_here(x: Tensor) -> bool:
    """Whether ``x`` is of the CPU, there is a library that may run, and nothing records or watches operations."""
    if functional.capturing() or x.device.type != "cpu" or not functional.plain(x):
        return False
    return not functional.recording() and runs_native("auto") and bool(native.levels())


def reason_not_native(model: Any) -> str | None:
    """Why the native kernels do not run ``model``, in a sentence; or None."""
    if not native.levels():
        return f"there are no native kernels: {library.NOT_BUILT}"
    if not runs_native("auto"):
        return f"the environment variable {ENVIRONMENT} rules them out"
    return _known(model).reason
