"""What transformers is told of packed parts as it loads: which keys are theirs, which weights are of another size."""

from __future__ import annotations

import functools
import importlib.util
import re
from typing import Any

from fairseq.quantization.saving.description import packed_name
from fairseq.quantization.saving.fitting import Fit

VERSION_5 = importlib.util.find_spec("transformers.core_model_loading") is not None


def tell(model: Any, found: Fit) -> dict[str, Any]:
    """Let transformers know which keys are of packed parts, and which weights are of another size.

    Of the other keys it then says what it says of a float model's. The sizes it refuses or, if it is told to ignore
    them, it makes up those weights.

    Returns:
        What the attributes of ``model`` were that have to be put back; None for one that it did not have.
    """
    prefix = f"{model.base_model_prefix}."
    packed = {*found.names, *(packed_name(model, name) for name in found.names.values())}
    names = "|".join(re.escape(name.removeprefix(prefix)) for name in packed)
    ours = rf"(^|\.)({names})(\.linear)?\.[^.]+$"
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), ours]
    told: dict[str, Any] = {"_keys_to_ignore_on_load_unexpected": set(ignored) if VERSION_5 else ignored}
    if VERSION_5:
        told["_adjust_missing_and_unexpected_keys"] = functools.partial(_with_sizes, model, found)
    else:
        told["_fix_state_dict_key_on_load"] = functools.partial(_as_weight, model, found)
    before = {name: vars(model).get(name) for name in told}
    vars(model).update(told)
    return before


def empty_of_floats(model: Any) -> None:
    """Take all modules out of a model, in place, and let transformers pass over everything in the files."""
    for name in list(model._modules):
        delattr(model, name)
    vars(model)["_is_hf_initialized"] = True  # some classes would initialize a head that is not there any more
    every = ["."]
    vars(model)["_keys_to_ignore_on_load_unexpected"] = set(every) if VERSION_5 else every


def _with_sizes(model: Any, found: Fit, info: Any, *more: Any) -> Any:
    """transformers 5 asks for this before it says what did not fit."""
    known = {entry[0] for entry in info.mismatched_keys}
    for entry in found.resized:
        if entry.name not in known:
            info.mismatched_keys.add((entry.name, entry.shape, tuple(model.get_parameter(entry.name).shape)))
        info.missing_keys.discard(entry.name)
    return type(model)._adjust_missing_and_unexpected_keys(model, info, *more)


def _as_weight(model: Any, found: Fit, key: str) -> tuple[str, bool]:
    """transformers 4 asks for this what a key in the files stands for: settings, of no weight's shape, for a weight."""
    weights = {entry.settings: entry.on_disk for entry in found.resized}
    return (weights[key], True) if key in weights else type(model)._fix_state_dict_key_on_load(key)
