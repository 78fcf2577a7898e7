"""The configurations of this library that benchmarks time: ``python peers.py --ours bench_candidates.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
}
"""What the quantizer is made with; ``engine`` is an argument of ``quantize_model``, and the default where left out."""


def quantized(model: nn.Module, name: str) -> nn.Module:
    """A copy of ``model`` in the setting called ``name``."""
    settings = dict(SETTINGS[name])
    engine = settings.pop("engine", "auto")
    return ViTQuantizer(**settings).quantize_model(model, engine=engine)


def candidates(model: nn.Module) -> dict[str, Callable[[Tensor], object]]:
    """A quantized copy of ``model`` for each of the settings, to be called with pixel_values (B, 3, H, W)."""
    return {name: quantized(model, name) for name in SETTINGS}
