"""How a model is called, on pictures alone or with text, and which of its outputs stands for all of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fairseq.quantization.architectures.picture_forms import Form, in_a_row, in_patches

OUTPUTS = ("logits", "logits_per_image", "image_embeds", "last_hidden_state", "reconstruction", "embedding")
"""Outputs that are compared and measured, the first that there is; without any of them see :func:`output_of`."""
CLASSES = ("logits", "logits_per_image")
"""Outputs that may have a dimension of classes, or of prompts that stand for them."""
TOKENS = 8
"""Of a text that stands in for any."""
TEXT = ("input_ids", "decoder_input_ids", "decoder_inputs_embeds", "labels")
"""Inputs one of which a model with a text tower needs for a whole forward pass."""


class Pixels(Protocol):
    """Pixel values of pictures: a tensor (N, C, H, W), or what is read when it is asked for."""

    @property
    def shape(self) -> Sequence[int]:
        """(N, C, H, W)."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Some of them, one after the other."""


def picture_inputs(model: nn.Module, pixel_values: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """What ``model`` is called with for pictures (N, C, H, W): tensors of length N, which may be split together.

    Pixel values and, where a model takes "noise" to draw its mask from (ViT-MAE), that: the same for the same seed.
    Models that take pictures in another form get them so, see
    :mod:`~fairseq.quantization.architectures.picture_forms`; of Qwen2-VL the tensors are not of length N. A model that
    cannot do without text (OWL-ViT) gets the same few words for each picture.
    """
    inputs = {"pixel_values": pixel_values}
    if pixel_values.ndim != 4:
        return inputs
    config = vision_config(model)
    if _takes(model, "spatial_shapes"):
        return in_patches(pixel_values, config.patch_size)
    if _takes(model, "image_grid_thw"):
        return in_a_row(pixel_values, config.patch_size, Form.of(config))
    if _takes(model, "pixel_attention_mask"):
        return {"pixel_values": pixel_values.unsqueeze(1)}  # one for each prompt
    if _needs(model, "input_ids") and not hasattr(model, "get_image_features"):
        words = torch.arange(1, TOKENS + 1, device=pixel_values.device)  # which no picture looks at
        inputs["input_ids"] = words.repeat(len(pixel_values), 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if _draws_a_mask(model):
        inputs["noise"] = _noise(model, pixel_values.shape, seed).to(pixel_values.device)
    return inputs


def picture_batch(model: nn.Module, pixel_values: Pixels, rows: slice, like: Tensor) -> dict[str, Tensor]:
    """:func:`picture_inputs` of some of the pictures, as they are among those of all, where a parameter ``like`` is."""
    inputs = picture_inputs(model, pixel_values[rows])
    if "noise" in inputs:
        inputs["noise"] = _noise(model, pixel_values.shape, 0)[rows]
    return {
        key: x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device) for key, x in inputs.items()
    }


def call(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Run ``model`` and return its outputs by name.

    Without any text among ``inputs``, only the vision tower of a model that has two runs, projection included. A
    forward without an argument "pixel_values" gets the pictures by position.

    Outputs without names are called "output_0", "output_1" of a tuple, and "output" otherwise: one tensor, or a list of
    feature maps. One tensor (N, classes) is called "logits" where the model's ``num_classes`` says so, timm's also
    "embedding" if it has no classes, and ViT-MAE's logits "reconstruction".
    """
    if not any(inputs.get(name) is not None for name in TEXT):
        if hasattr(model, "get_image_features"):
            return _image_features(model, inputs)
        if hasattr(model, "encode_image") and _takes(model, "text"):  # of OpenCLIP
            return {"image_embeds": cast(Any, model).encode_image(inputs["pixel_values"])}
        if _takes(model, "decoder_input_ids"):
            return _named(model.get_submodule("encoder")(**inputs))
    if _draws_a_mask(model) and inputs.get("noise") is None:
        pictures = inputs["pixel_values"]
        inputs = {**inputs, "noise": _noise(model, pictures.shape, 0).to(pictures.device)}
    output = _run(model, inputs)
    if isinstance(output, Tensor):
        return {_name_of(model, output): output}
    output = _named(output)
    if "ids_restore" in output and "logits" in output:
        return {"reconstruction" if name == "logits" else name: value for name, value in output.items()}
    return output


def output_of(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> tuple[str, Tensor]:
    """The name and the value of the output that stands for all.

    That is the first of :data:`OUTPUTS` that there is, else the first floating tensor that is more than a number, in
    the order in which the model returns them. Of several in one output (feature maps, hidden states) it is the last,
    the deepest, which is then called "feature_maps[3]".

    Raises:
        ValueError: the model returns no such tensor.
    """
    output = call(model, picture_inputs(model, inputs) if isinstance(inputs, Tensor) else inputs)
    names = dict.fromkeys((*(name for name in OUTPUTS if name in output), *output))
    found = next((found for name in names if (found := _floating(name, output[name]))), None)
    if found is None:
        kinds = ", ".join(f"{name}: {type(value).__name__}" for name, value in output.items())
        raise ValueError(
            f"{type(model).__name__} returned no floating tensor of one dimension or more, which calibration and "
            f"comparisons need; it returned {kinds or 'nothing'}"
        )
    return found


def tensors_in(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among outputs, by name; where there are none, those in lists, as "feature_maps[0]"."""
    found = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    lists = ((name, value) for name, value in output.items() if isinstance(value, list | tuple))
    return found or {f"{name}[{i}]": x for name, value in lists for i, x in enumerate(value) if isinstance(x, Tensor)}


def class_dimension(name: str, value: Tensor, pixel_values: Tensor | None = None) -> int | None:
    """The dimension of the classes in an output, 1 or -1; None if there are none, or not two to choose from.

    By the shape of the logits: (N, classes); (N, queries, classes) of a detector, or words; (N, classes, H, W), a class
    for each pixel. Logits (N, H, W) as large as the pictures are a map without classes.

    Args:
        name: of the output, as :func:`output_of` gives it.
        value: of the output.
        pixel_values: what the model was called with, if it was.
    """
    if name not in CLASSES or value.ndim < 2:
        return None
    if value.ndim == 3 and pixel_values is not None and value.shape[1:] == pixel_values.shape[-2:]:
        return None
    dimension = 1 if value.ndim > 3 else -1
    return dimension if value.shape[dimension] > 1 else None


def vision_config(model: nn.Module) -> Any:
    """The config of a model's vision tower, or of the whole model if that has but one; None without a config."""
    config = getattr(model, "config", None)
    for name in ("vision_config", "encoder"):
        inner = getattr(config, name, None)
        if hasattr(inner, "model_type"):
            return inner
    return config


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every submodule's training flag as before after it."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What ``model`` returns, called by names; or, if it has no name for pictures, with them by position.

    Such a model also gets those of the other inputs that it knows: processors return more than every model reads.
    """
    parameters = _parameters(model)
    kinds = {parameter.kind for parameter in parameters.values()}
    if (
        "pixel_values" in parameters
        or "pixel_values" not in inputs
        or not kinds
        or inspect.Parameter.VAR_KEYWORD in kinds
    ):
        return model(**inputs)
    known = {name: value for name, value in inputs.items() if name in list(parameters)[1:]}
    return model(inputs["pixel_values"], **known)


def _name_of(model: nn.Module, output: Tensor) -> str:
    """How the only output of a model is called."""
    classes = getattr(model, "num_classes", None)
    if hasattr(model, "forward_features"):  # timm
        return "logits" if classes else "embedding"
    return "logits" if output.ndim == 2 and output.shape[1] == classes else "output"


def _named(output: Any) -> Mapping[str, Any]:
    """What a model returned, by name."""
    fields = fields_of(output)
    if fields is not None:
        return fields
    if isinstance(output, tuple):
        return {f"output_{i}": value for i, value in enumerate(output)}
    return {"output": output}


def fields_of(value: Any) -> Mapping[str, Any] | None:
    """The entries of a mapping, a dataclass or a named tuple; None of anything else."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value._asdict() if hasattr(value, "_asdict") else None


def _floating(name: str, value: Any) -> tuple[str, Tensor] | None:
    """The first floating tensor in ``value`` and its name; of a list or tuple the last, as these run shallow to deep.

    A number is none: a loss says nothing of a picture.
    """
    if isinstance(value, Tensor):
        return (name, value) if value.is_floating_point() and value.ndim and value.numel() else None
    fields = fields_of(value)
    items: list[tuple[str, Any]] = []
    if fields is not None:
        items = [(f"{name}.{key}", inner) for key, inner in fields.items()]
    elif isinstance(value, tuple | list):
        items = [(f"{name}[{i}]", inner) for i, inner in enumerate(value)][::-1]
    return next((found for item in items if (found := _floating(*item))), None)


def _image_features(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The projected embedding of each picture, or of its tokens; transformers 5 has it as the pooler's output."""
    features = cast(Any, model).get_image_features(**inputs)
    if not isinstance(features, Tensor | list | tuple):
        features = features.pooler_output
    if isinstance(features, list | tuple):  # of each picture
        alike = len({x.shape for x in features}) == 1
        features = torch.stack(list(features)) if alike else torch.cat(list(features))
    return {"image_embeds": features}


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the forward of a model has an argument of that name."""
    return name in _parameters(model)


def _needs(model: nn.Module, name: str) -> bool:
    """Whether the forward of a model cannot be called without an argument of that name."""
    parameter = _parameters(model).get(name)
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of a model's forward, also of a compiled one; none where they cannot be known."""
    try:
        return inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    except (TypeError, ValueError):
        return {}


def _draws_a_mask(model: nn.Module) -> bool:
    """Whether a model takes noise, one value per patch, as ViT-MAE does."""
    return _takes(model, "noise") and hasattr(vision_config(model), "patch_size")


def _noise(model: nn.Module, shape: Sequence[int], seed: int) -> Tensor:
    """(N, patches), uniform, for pictures of the ``shape`` (N, C, H, W)."""
    patch = vision_config(model).patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    count = (shape[-2] // height) * (shape[-1] // width)
    return torch.rand(shape[0], count, generator=torch.Generator().manual_seed(seed))
