"""The configurations of this library that benchmarks time: ``python peers.py --ours bench_candidates.py``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.models.vit_quantization import ViTQuantizer

SETTINGS: dict[str, dict[str, Any]] = {
    "8-bit channel": {"bits": 8, "method": "channel"},
    "8-bit tensor": {"bits": 8, "method": "tensor"},
    "4-bit channel": {"bits": 4, "method": "channel"},
    "8-bit channel, layers": {"bits": 8, "method": "channel", "engine": "layers"},
    "4-bit channel, layers": {"bits": 4, "method": "channel", "engine": "layers"},
    "8-bit weight-only": {"bits": 8, "method": "channel", "activations": None},
    "4-bit weight-only": {"bits": 4, "method": "channel", "activations": None},
    "4-bit channel, 4-bit inputs": {"bits": 4, "method": "channel", "activation_bits": 4},
    "4-bit groups of 64": {"bits": 4, "method": "channel", "group_size": 64},
    "2-bit groups of 64": {"bits": 2, "method": "channel", "group_size": 64},
    "4-bit weight-only, groups of 64": {"bits": 4, "method": "channel", "activations": None, "group_size": 64},
}
"""What the quantizer is made with; ``engine`` is an argument of ``quantize_model``, and the default where left out."""
INTEGERS: dict[str, dict[str, Any]] = {
    "8-bit integers": {"bits": 8, "method": "channel", "arithmetic": "integer", "rounding": "nearest"},
    "8-bit integers, static": {
        "bits": 8, "method": "channel", "arithmetic": "integer", "rounding": "nearest", "activations": "static",
    },
}  # fmt: skip
"""The same of models of integers alone. Their ranges come from noise, so that only their speed means anything."""
CALIBRATION = 4
"""Pictures of noise."""


def arguments(name: str, model: nn.Module) -> tuple[ViTQuantizer, dict[str, Any]]:
    """The quantizer of the setting called ``name``, and what else its ``quantize_model`` is called with."""
    settings = dict((SETTINGS | INTEGERS)[name])
    keywords = {"engine": settings.pop("engine", "auto")}
    if settings.get("arithmetic") == "integer":
        size: Any = model.config.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        shape = (CALIBRATION, model.config.num_channels, *size)
        keywords["calibration"] = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return ViTQuantizer(**settings), keywords


def quantized(model: nn.Module, name: str) -> nn.Module:
    """A copy of ``model`` in the setting called ``name``."""
    quantizer, keywords = arguments(name, model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="calibrating on")
        return quantizer.quantize_model(model, **keywords)


def candidates(model: nn.Module) -> dict[str, Callable[[Tensor], object]]:
    """A quantized copy of ``model`` for each of the settings, to be called with pixel_values (B, 3, H, W)."""
    return {name: quantized(model, name) for name in SETTINGS}
