"""The one name of each tensor on disk, whichever version of transformers wrote or reads it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from torch import nn

REPAIRED = {"decoder.decoder_encoder.layer.": "decoder.decoder_layers."}
"""What transformers 5 makes of ViT-MAE's names on their way to disk -> what they are."""
COMPUTED = ".relative_position_index"
"""Ends the name of a tensor that a model computes from its config, and only transformers 4 saves."""


def names_on_disk(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name in memory -> name on disk, for tensors or modules of ``model``.

    The names on disk are those that a HuggingFace model has in the memory of transformers 4.57. Version 5 has others
    and renames while it loads, which it is asked for here. Any other model keeps its names.

    Args:
        model: the model, its layers quantized or not.
        names: of its parameters, buffers or modules; a module's name may be looked up as that of a tensor in it.
    """
    names = list(names)
    if not _is_pretrained(model):
        return {name: name for name in names}
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
        loading = importlib.import_module("transformers.core_model_loading")
    except ModuleNotFoundError:  # transformers 4
        return {name: name for name in names}
    steps = mapping.get_model_conversion_mapping(model, add_legacy=False)
    prefixes = [step for step in steps if isinstance(step, loading.PrefixChange)]
    renamings = [
        step.reverse_transform()
        for step in reversed(steps)
        if isinstance(step, loading.WeightRenaming)
        and step not in prefixes
        # those that begin at the beginning are for checkpoints of other classes
        and not any(pattern.startswith("^") for pattern in step.source_patterns)
    ]
    found = {name: _repaired(loading.apply_renamings(name, renamings)) for name in names}
    for step in prefixes:
        prefix = step.source_patterns[0].split(r"\.")[0].removeprefix("^")
        if prefix and not hasattr(model, prefix):
            found = {name: f"{prefix}.{on_disk}" for name, on_disk in found.items()}
    return found


def _is_pretrained(model: nn.Module) -> bool:
    return any(base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__)


def _repaired(name: str) -> str:
    for wrong, right in REPAIRED.items():
        name = name.replace(wrong, right)
    return name
