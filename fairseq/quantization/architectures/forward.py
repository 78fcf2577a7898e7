"""How a model is called, on pictures alone or with text, and which of its outputs stands for all of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

OUTPUTS = ("logits", "logits_per_image", "image_embeds", "last_hidden_state", "reconstruction", "embedding")
"""Outputs that are compared and measured, the first that there is."""
TEXT = ("input_ids", "decoder_input_ids", "decoder_inputs_embeds", "labels")
"""Inputs one of which a model with a text tower needs for a whole forward pass."""


def picture_inputs(model: nn.Module, pixel_values: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """What ``model`` is called with for pictures (N, C, H, W): tensors of length N, which may be split together.

    Pixel values and, where a model takes "noise" to draw its mask from (ViT-MAE), that: the same for the same seed.
    SigLIP 2 takes pictures cut into patches; it gets them so, their sides shortened to multiples of the patch's.
    """
    if _takes(model, "spatial_shapes") and pixel_values.ndim == 4:
        return _in_patches(pixel_values, vision_config(model).patch_size)
    inputs = {"pixel_values": pixel_values}
    if _takes(model, "noise") and pixel_values.ndim == 4:
        inputs["noise"] = _noise(model, pixel_values, seed)
    return inputs


def call(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Run ``model`` and return its outputs by name.

    Without any text among ``inputs``, only the vision tower of a model that has two runs, projection included. The
    one output of a timm model is called "logits", or "embedding" if it has no classes; ViT-MAE's "reconstruction".
    """
    if hasattr(model, "forward_features") and not _takes(model, "pixel_values"):  # timm
        output = model(inputs["pixel_values"])
        return {"logits" if getattr(model, "num_classes", 0) else "embedding": output}
    if not any(inputs.get(name) is not None for name in TEXT):
        if hasattr(model, "get_image_features"):
            return _image_features(model, inputs)
        if _takes(model, "decoder_input_ids"):
            return _mapping(model.get_submodule("encoder")(**inputs))
    if _takes(model, "noise") and inputs.get("noise") is None:
        inputs = {**inputs, "noise": _noise(model, inputs["pixel_values"], 0)}
    output = _mapping(model(**inputs))
    if "ids_restore" in output and "logits" in output:
        return {"reconstruction" if name == "logits" else name: value for name, value in output.items()}
    return output


def output_of(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> tuple[str, Tensor]:
    """The name and the value of the output that stands for all: see :data:`OUTPUTS`.

    Raises:
        ValueError: the model returns none of them.
    """
    output = call(model, picture_inputs(model, inputs) if isinstance(inputs, Tensor) else inputs)
    for name in OUTPUTS:
        if output.get(name) is not None:
            return name, output[name]
    got = getattr(output, "kind", type(output).__name__)
    raise ValueError(f"the model returned {got}, which has none of {', '.join(OUTPUTS)}")


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


def separate_biases(model: nn.Module) -> nn.Module:
    """A copy, on the same tensors, in which timm's BEiT and EVA call their qkv layer and then add its bias.

    Otherwise they multiply by its weight themselves. Other models come back as they are.
    """
    if not any(hasattr(module, "qkv_bias_separate") for module in model.modules()):
        return model
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    result = copy.deepcopy(model, shared)
    for module in result.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # type: ignore[assignment]
    return result


class _Nothing(dict[str, Any]):
    """The outputs of a model that returns no mapping."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind


def _mapping(output: Any) -> Mapping[str, Any]:
    return output if isinstance(output, Mapping) else _Nothing(type(output).__name__)


def _image_features(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The projected embedding of each picture; transformers up to 4.57 returns it bare, 5.x as the pooler's output."""
    features = cast(Any, model).get_image_features(**inputs)
    return {"image_embeds": features if isinstance(features, Tensor) else features.pooler_output}


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the forward of a model has an argument of that name."""
    try:
        return name in inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # a compiled one
        return False


def _noise(model: nn.Module, pixel_values: Tensor, seed: int) -> Tensor:
    """(N, patches), uniform, on the device of ``pixel_values``."""
    patch = vision_config(model).patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    count = (pixel_values.shape[-2] // height) * (pixel_values.shape[-1] // width)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(pixel_values), count, generator=generator).to(pixel_values.device)


def _in_patches(pixel_values: Tensor, size: int) -> dict[str, Tensor]:
    """(N, C, H, W) -> pixel_values (N, patches, size * size * C), their mask, and spatial_shapes (N, 2)."""
    n, channels, height, width = pixel_values.shape
    rows, columns = height // size, width // size
    cut = pixel_values[..., : rows * size, : columns * size].reshape(n, channels, rows, size, columns, size)
    patches = cut.permute(0, 2, 4, 3, 5, 1).reshape(n, rows * columns, -1)
    mask = torch.ones(n, rows * columns, dtype=torch.int32, device=pixel_values.device)
    shapes = torch.tensor([[rows, columns]], device=pixel_values.device).repeat(n, 1)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
