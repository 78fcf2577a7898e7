"""modules_to_not_convert, as transformers reads it, as globs of the layers of one model."""

from __future__ import annotations

import glob
import importlib
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from fairseq.quantization.architectures.plan import selected
from fairseq.quantization.config import QuantizationConfig


def exclude_modules(model: nn.Module, config: QuantizationConfig, names: Sequence[str]) -> QuantizationConfig:
    """The settings with those layers excluded, too, that transformers would not convert.

    Also those within a module whose name ends with a whole one, such as "layers.0", which it would.

    Args:
        model: the float model; its weights may be on the meta device.
        config: what is to be done otherwise.
        names: what ``modules_to_not_convert`` holds.

    Raises:
        ValueError: one of them stands for no module of the model.
    """
    if not names:
        return config
    modules = [name for name, _ in model.named_modules() if name]
    for name in names:
        if not any(is_meant(module, [name]) for module in modules):
            raise ValueError(f"modules_to_not_convert: {name!r} matches no module of {type(model).__name__}")
    within = tuple(f".{name}" for name in names)
    meant = [
        glob.escape(name)
        for name in selected(model, config)
        if is_meant(name, names) or any(f".{parent}".endswith(within) for parent in _parents(name))
    ]
    return replace(config, exclude=(*config.exclude, *meant))


def _parents(name: str) -> list[str]:
    """ "a.b.c" -> ["a", "a.b"]."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def is_meant(module: str, names: Sequence[str]) -> bool:
    """Whether transformers would leave the module of that name as it is, given ``modules_to_not_convert``.

    Version 5 has one function for it: a name, as a regular expression, matches from the start to a dot, or it is how
    the module's name ends. In 4.57 each quantizer has its own rule; here, a name is also met anywhere before a dot.
    """
    utilities = importlib.import_module("transformers.quantizers.quantizers_utils")
    if hasattr(utilities, "should_convert_module"):
        return not utilities.should_convert_module(module, list(names))
    return any(f"{name}." in f"{module}." or module.endswith(name) for name in names)
