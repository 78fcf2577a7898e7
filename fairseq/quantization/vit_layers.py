"""Which Linear of a HuggingFace Vision Transformer is attention, MLP or classifier, by its name in memory."""

from __future__ import annotations

import re

from torch import nn

# transformers up to 5.8 | 5.9 and later. Names on disk differ again; they are not looked at.
PATTERNS: dict[str, str] = {
    "attention": r"\.attention\.attention\.(query|key|value)$|\.attention\.output\.dense$"
    r"|\.attention\.(q|k|v|o)_proj$",
    "mlp": r"\.\d+\.intermediate\.dense$|\.\d+\.output\.dense$|\.mlp\.fc[12]$",
    "classifier": r"\.(cls_|distillation_)?classifier$|\.pooler\.dense$",
}


def component_of(name: str) -> str | None:
    """ "attention", "mlp", "classifier" (the pooler of a bare model included), or None for another layer."""
    for component, pattern in PATTERNS.items():
        if re.search(pattern, f".{name}"):
            return component
    return None


def reads_shared_input(name: str) -> bool:
    """Whether the layer is a query, key or value: the three of a layer are called with one and the same tensor."""
    return re.search(r"\.(query|key|value|[qkv]_proj)$", f".{name}") is not None


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear in ``model``, subclasses included, by name and in order; a shared one once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
