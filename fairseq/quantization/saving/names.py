"""The one name of each tensor on disk, whichever version of transformers wrote or reads it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fairseq.quantization.architectures.layers import is_pretrained

REPAIRED = {"decoder.decoder_encoder.layer.": "decoder.decoder_layers."}
"""What transformers 5 makes of ViT-MAE's names on their way to disk -> what they are."""
COMPUTED = ".relative_position_index"
"""Ends the name of a tensor that a model computes from its config, and only transformers 4 saves."""

_renaming: WeakKeyDictionary[nn.Module, Callable[[str], str]] = WeakKeyDictionary()
"""Of each model that was asked for, as looking whether names arrive takes a while."""


def names_on_disk(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name in memory -> name on disk, for tensors or modules of ``model``.

    The names on disk are those that a HuggingFace model has in the memory of transformers 4.57. Version 5 has others
    and renames while it loads, which it is asked for here, both ways: where names as of 4.57 would not arrive where
    they belong, they are those that version 5 itself saves, or else those in memory. Any other model keeps its names.

    Args:
        model: the model, its layers quantized or not.
        names: of its parameters, buffers or modules; a module's name may be looked up as that of a tensor in it.
    """
    names = list(names)
    if is_pretrained(model) and model not in _renaming:
        _renaming[model] = _way_to_disk(model)
    rename = _renaming.get(model, str)
    return {name: rename(name) for name in names}


def _way_to_disk(model: nn.Module) -> Callable[[str], str]:
    """What renames the tensors of a HuggingFace model, see :func:`names_on_disk`."""
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
        loading = importlib.import_module("transformers.core_model_loading")
    except ModuleNotFoundError:  # transformers 4
        return str
    steps = mapping.get_model_conversion_mapping(model, add_legacy=False)
    ways = (_as_of_4_57(model, steps, loading), _as_saved(steps, loading), str)
    return next((way for way in ways if _arrives(model, steps, loading, way)), ways[0])


def _as_of_4_57(model: nn.Module, steps: Sequence[Any], loading: Any) -> Callable[[str], str]:
    """What renames from memory to the names of transformers 4.57."""
    prefixes = [step for step in steps if isinstance(step, loading.PrefixChange)]
    renamings = [
        step.reverse_transform()
        for step in reversed(steps)
        if isinstance(step, loading.WeightRenaming)
        and step not in prefixes
        # those that begin at the beginning are for checkpoints of other classes
        and not any(pattern.startswith("^") for pattern in step.source_patterns)
    ]
    added = {step: step.source_patterns[0].split(r"\.")[0].removeprefix("^") for step in prefixes}
    inside = [  # of a model within this one, which CLIP as a whole calls like the prefix
        step.reverse_transform()
        for step, prefix in added.items()
        if step.scope_prefix and step.scope_prefix.rpartition(".")[2] != prefix
    ]
    whole = [prefix for step, prefix in added.items() if not step.scope_prefix]
    missing = [prefix for prefix in whole if prefix and not hasattr(model, prefix)]

    def rename(name: str) -> str:
        on_disk = _repaired(loading.apply_renamings(name, renamings + inside))
        return ".".join((*reversed(missing), on_disk))

    return rename


def _as_saved(steps: Sequence[Any], loading: Any) -> Callable[[str], str]:
    """What renames from memory to the names that transformers 5 saves."""
    renamings = [
        step.reverse_transform()
        for step in reversed(steps)
        if isinstance(step, loading.WeightRenaming) and not isinstance(step, loading.PrefixChange)
    ]
    return lambda name: loading.apply_renamings(name, renamings)


def _arrives(model: Any, steps: Sequence[Any], loading: Any, rename: Callable[[str], str]) -> bool:
    """Whether transformers 5 brings each tensor of a model, renamed so, back to its place."""
    renamings = [step for step in steps if isinstance(step, loading.WeightRenaming)]
    state = dict.fromkeys([name for name, _ in (*model.named_parameters(), *model.named_buffers())], True)
    return all(
        loading.rename_source_key(rename(name), renamings, [], model.base_model_prefix, state)[0] == name
        for name in state
    )


def _repaired(name: str) -> str:
    for wrong, right in REPAIRED.items():
        name = name.replace(wrong, right)
    return name
