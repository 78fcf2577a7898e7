"""pack: the packed model of an emulated one, with the same integers on the same grids."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from torch import nn

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.modules.quantization.scalar.modules.replace import carry_hooks, names_of
from fairseq.quantization.architectures.copies import copied
from fairseq.quantization.conversion.convert import finish
from fairseq.quantization.engine.fuse import check_engine
from fairseq.quantization.saving.attach import enable_save_pretrained
from fairseq.quantization.training.student import emulated_layers

Model = TypeVar("Model", bound=nn.Module)


def pack(student: Model, engine: str = "auto", weight_storage: str = "packed") -> Model:
    """The packed model of an emulated one, trained or not, in eval mode; ``student`` stays as it is.

    Integers, scales, zero points, biases, input factors and the grids of static inputs are those that the student has
    in eval mode, bit for bit. So the logits differ by the order of sums in float, and by what follows where an
    activation lies on the edge between two integers; in fused blocks attention is rounded to bfloat16, too. Blocks are
    fused, saved and loaded as those of any packed model.

    Args:
        student: what ``ViTQuantizer(execution="emulated").quantize_model`` returned, on any device.
        engine: as for ``quantize_model``.
        weight_storage: "packed", or "unpacked" for a byte per integer.

    Raises:
        TypeError: not a module.
        ValueError: no layer is emulated, a weight or scale is not finite, or as ``quantize_model`` for ``engine``.
        RuntimeError: ``engine="fused"``, and the native kernels were not built.
    """
    emulated_layers(student)
    check_engine(engine)
    with plain_context():
        result = copied(student).eval()
        before = _float_bytes(result)
        shared: dict[Hashable, PackedLinear] = {}
        for name, layer in emulated_layers(result).items():
            new = _packed(layer, name, weight_storage)
            first = shared.setdefault((id(layer.weight), new.config), new)
            if first is not new and _same_integers(first, new):
                new.weight_codes, new.scale, new.zero_point = first.weight_codes, first.scale, first.zero_point
            carry_hooks(layer, new)
            for alias in names_of(result, layer):
                result.set_submodule(alias, new)
        finish(result, engine)
    enable_save_pretrained(result, {"bytes_before": before})
    return result


def _packed(layer: EmulatedLinear, name: str, weight_storage: str) -> PackedLinear:
    """The packed twin of one layer in eval mode."""
    config = LinearConfig(
        layer.bits, layer.method, layer.activations, layer.group_size, layer.symmetric, weight_storage,
        activation_bits=layer.activation_bits,
    )  # fmt: skip
    scale, zero_point = layer.grid()
    grid = layer.input_grid()
    if not bool(layer.weight.isfinite().all()):
        raise ValueError(f"the weight of {name} has NaN or Inf: its training has failed")
    new = PackedLinear.from_integers(
        layer.integers(), scale, zero_point, layer.bias, config, name, None if grid is None else (0.0, 1.0),
        layer.input_factor,
    )  # fmt: skip
    if grid is not None:
        new.set_input_grid(*grid)
    return new.eval()


def _same_integers(one: PackedLinear, other: PackedLinear) -> bool:
    """Whether two layers hold the same numbers, so that they may share the memory."""
    pairs = (
        (one.weight_codes, other.weight_codes), (one.scale, other.scale), (one.zero_point, other.zero_point),
    )  # fmt: skip
    return all(bool((a == b).all()) for a, b in pairs)


def _float_bytes(model: nn.Module) -> int:
    """What the model would take without its grids: all parameters and buffers, but those of emulated layers' grids."""
    layers = [module for module in model.modules() if isinstance(module, EmulatedLinear)]
    grids = {
        id(tensor)
        for layer in layers
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
        if name not in ("weight", "bias")
    }
    tensors = (*model.parameters(), *model.buffers())
    return sum(t.numel() * t.element_size() for t in tensors if id(t) not in grids)
