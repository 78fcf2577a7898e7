"""Which Linear of a HuggingFace Vision Transformer is which, by its name in memory, and what feeds it."""

from __future__ import annotations

import re
from typing import NamedTuple

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


# Roles within a block, by the end of a name; both generations of transformers, as above.
ROLES: dict[str, str] = {
    "query": r"attention\.query$|attention\.q_proj$",
    "key": r"attention\.key$|attention\.k_proj$",
    "value": r"attention\.value$|attention\.v_proj$",
    "output": r"attention\.output\.dense$|attention\.o_proj$",
    "fc1": r"intermediate\.dense$|mlp\.fc1$",
    "fc2": r"^output\.dense$|mlp\.fc2$",
}
NORMS = ("layernorm_before", "layernorm_after")
PRE_NORM_BLOCKS = ("ViTLayer", "DeiTLayer")
"""Blocks known to feed query, key and value from ``layernorm_before`` alone, and fc1 from ``layernorm_after`` alone."""


class Wiring(NamedTuple):
    """What feeds what in one block.

    Attributes:
        layers: by role: "query", "key", "value", "output", "fc1", "fc2".
        norms: each LayerNorm with the roles of all layers that read its output.
        value_feeds_output: the output projection reads averages of the value layer's output over tokens.
    """

    layers: dict[str, nn.Linear]
    norms: list[tuple[nn.LayerNorm, tuple[str, ...]]]
    value_feeds_output: bool


def block_of(name: str) -> str | None:
    """The name of the encoder block that holds a layer, such as "vit.layers.3"; None outside of blocks."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else None


def role_of(name: str) -> str | None:
    """The role of a layer within its block, or None."""
    inner = name.removeprefix(f"{block_of(name)}.")
    return next((role for role, pattern in ROLES.items() if re.search(pattern, inner)), None)


def layer_paths(block: nn.Module) -> dict[str, str]:
    """Role -> path within ``block``, in the order of :data:`ROLES`, of the layers that have one."""
    names = [name for name, _ in block.named_modules()]
    found = {role: next((n for n in names if re.search(pattern, n)), None) for role, pattern in ROLES.items()}
    return {role: name for role, name in found.items() if name is not None}


def wiring(block: nn.Module) -> Wiring | None:
    """What feeds what in ``block``, or None if it is not one of :data:`PRE_NORM_BLOCKS` with plain layers."""
    layers = {
        role: module
        for name, module in block.named_modules()
        for role, pattern in ROLES.items()
        if re.search(pattern, name) and type(module) is nn.Linear
    }
    before, after = (getattr(block, name, None) for name in NORMS)
    if type(block).__name__ not in PRE_NORM_BLOCKS or set(layers) != set(ROLES):
        return None
    if not (isinstance(before, nn.LayerNorm) and isinstance(after, nn.LayerNorm)):
        return None
    if before.bias is None or after.bias is None:
        return None
    return Wiring(layers, [(before, ("query", "key", "value")), (after, ("fc1",))], value_feeds_output=True)
