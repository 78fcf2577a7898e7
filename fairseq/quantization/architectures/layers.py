"""The Linear layers of a model: all of them, which share a weight, and which block holds each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear in ``model``, subclasses included, by name and in order; a shared one once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is one of transformers, or derived from one; asked without importing that."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__)


def block_of(name: str) -> str | None:
    """The name of the encoder block that holds a layer, such as "vit.layers.3"; None outside of blocks."""
    # Swin: blocks within stages; torchvision: "encoder_layer_3"
    found = re.match(r"(.*?\.(?:encoder_layer_)?\d+(?:\.blocks\.\d+)?)\.", name)
    return found[1] if found else None


def tied_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each Linear whose weight another module uses, too: the names of all Linear layers with that weight.

    A layer alone in its tuple shares its weight with something else, such as an embedding.
    """
    users = _users(model)
    weights = {name: id(layer._parameters.get("weight")) for name, layer in linear_layers(model).items()}
    shared = {name: weight for name, weight in weights.items() if users[weight] > 1}
    return {name: tuple(other for other in shared if shared[other] == weight) for name, weight in shared.items()}


def tied_blocks(model: nn.Module, blocks: Iterable[str]) -> frozenset[str]:
    """Those of the blocks called so that hold a parameter or a module which is in a second place, too."""
    users = _users(model)
    parents = Counter(id(child) for parent in model.modules() for child in {*parent._modules.values()})

    def shares(block: nn.Module) -> bool:
        inside = [module for module in block.modules() if module is not block]
        return any(parents[id(module)] > 1 for module in inside) or any(
            users[id(p)] > 1 for module in block.modules() for p in module._parameters.values()
        )

    return frozenset(name for name in blocks if shares(model.get_submodule(name)))


def _users(model: nn.Module) -> Counter[int]:
    """How many modules use each parameter, by its id; one that is not there counts once."""
    found = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found[id(None)] = 1
    return found
