"""save_pretrained of the HuggingFace models in, around or made from a quantized one: who saves what.

A packed model, a part of one and a model that somebody builds around one save their integers. What has float weights
only is saved by transformers, as ever.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from fairseq.quantization.integer_only.model import IntegerViT
from fairseq.quantization.saving.contents import names_format
from fairseq.quantization.saving.description import packed_parts
from fairseq.quantization.saving.pretrained import information_of, save_pretrained

OF_PARTS = ("calibration_images",)


def enable_save_pretrained(model: nn.Module, information: Mapping[str, Any] | None = None) -> None:
    """Let each HuggingFace model in a quantized one save what it has; other modules stay as they are.

    The attributes that it sets on them go through copy, pickle and torch.save. A model that somebody builds around one
    of them later is seen by the ``save_pretrained`` of transformers' PreTrainedModel, which is wrapped here, once.

    Args:
        model: a quantized model, packed or emulated.
        information: see :func:`checkpoint.save`; kept in ``quantization_information``.
    """
    known = dict(information_of(model) if information is None else information)
    for part in pretrained_models(model):
        vars(part)["quantization_information"] = known if part is model else of_parts(known)
        vars(part)["save_pretrained"] = functools.partial(_save, part)
        _wrap(_base(type(part)))


def of_parts(information: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a packed model that is true of its parts, too."""
    return {key: information[key] for key in OF_PARTS if key in information}


def disable_save_pretrained(model: nn.Module) -> None:
    """Undo :func:`enable_save_pretrained`, of a model with float layers again."""
    for part in pretrained_models(model):
        for name in ("save_pretrained", "quantization_information"):
            vars(part).pop(name, None)
        vars(part.config).pop("quantization_config", None)


def pretrained_models(model: nn.Module) -> Iterator[Any]:
    """The HuggingFace models among the modules of ``model``, itself included."""
    return (part for part in model.modules() if _base(type(part)) is not None)


def _base(kind: type) -> Any:
    """transformers' PreTrainedModel, if ``kind`` is one."""
    bases = (base for base in kind.__mro__ if base.__module__ == "transformers.modeling_utils")
    return next((base for base in bases if "save_pretrained" in vars(base)), None)


def _wrap(base: Any) -> None:
    if not hasattr(base.save_pretrained, "sees_packed_parts"):
        base.save_pretrained = _wrapped(base.save_pretrained)


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save(model: nn.Module, *args: Any, **keywords: Any) -> Any:
        return _choose(model, original, args, keywords)

    vars(save)["sees_packed_parts"] = True
    return save


def _save(model: Any, *args: Any, **keywords: Any) -> Any:
    """What is called as ``model.save_pretrained``."""
    own = type(model).save_pretrained
    return _choose(model, own.__wrapped__ if hasattr(own, "sees_packed_parts") else own, args, keywords)


def _choose(model: Any, original: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Save a model as what it is now; ``original`` is transformers' way, which also says what ``args`` are called."""
    adapters = getattr(model, "_hf_peft_config_loaded", False)  # they alone are saved
    packed = isinstance(model, IntegerViT) or bool(packed_parts(model))
    if packed and not adapters:
        places = list(inspect.signature(original).parameters)[1:]
        if len(args) > len(places):
            raise TypeError(f"save_pretrained takes {len(places)} positional arguments, got {len(args)}")
        return save_pretrained(model, **dict(zip(places, args)), **keywords)
    if not packed and any(name.endswith("input_factor") for name in model.state_dict()):
        warnings.warn(
            "the layers of this emulated model multiply their input by input_factor, which from_pretrained does not "
            "know; to load the folder there, save ViTQuantizer.dequantize_model(model) instead",
            UserWarning,
            stacklevel=3,
        )
    with _float_config(model):
        return original(model, *args, **keywords)


@contextmanager
def _float_config(model: Any) -> Iterator[None]:
    """The config of a float part without what it says of the packed model that it shares the config with."""
    settings = vars(model.config)
    ours = names_format(settings.get("quantization_config"))
    kept = settings.pop("quantization_config") if ours else None
    try:
        yield
    finally:
        if ours:
            settings["quantization_config"] = kept
