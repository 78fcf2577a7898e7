"""The emulated layers of a model: which they are, and scales that training moves."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from fairseq.modules.quantization.scalar.modules import EmulatedLinear

Model = TypeVar("Model", bound=nn.Module)


def emulated_layers(model: nn.Module) -> dict[str, EmulatedLinear]:
    """The emulated layers of a model by their first name, in order.

    Raises:
        TypeError: not a module.
        ValueError: it has none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the student must be a torch.nn.Module, got {type(model).__name__}")
    found = {name: module for name, module in model.named_modules() if isinstance(module, EmulatedLinear)}
    if not found:
        raise ValueError(
            f"this {type(model).__name__} has no emulated layer: the student is what "
            "ViTQuantizer(execution='emulated').quantize_model returns"
        )
    return found


def learn_scales(model: Model) -> Model:
    """Make parameters of the scales of a model's emulated layers, in place, for an optimizer; returns ``model``.

    Each layer goes on from the grid that it has, and no longer observes its weight: its scales, and those of static
    inputs, get the gradient of learned step size quantization (Esser et al., 2020, https://arxiv.org/abs/1902.08153),
    zero points stay. Inputs that are rounded per token have no scale to learn. Layers that share a weight and its grid
    share the parameter. The state dict has the entries that it had: either kind of model loads that of the other.

    Make the optimizer afterwards. Called again, it changes nothing.

    Args:
        model: what ``ViTQuantizer(execution="emulated").quantize_model`` returned.

    Raises:
        TypeError, ValueError: not such a model.
    """
    first: dict[tuple[object, ...], EmulatedLinear] = {}
    for layer in emulated_layers(model).values():
        key = (id(layer.weight), layer.bits, layer.method, layer.group_size, layer.symmetric)
        layer.learn_scale()
        layer.scale = first.setdefault(key, layer).scale
    return model
