"""The packed parts of a model as JSON, and empty packed parts made from it: what a file says beside its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.patches import PackedPatchEmbedding, reason_not_packable
from fairseq.modules.quantization.packed.table import PackedEmbedding, PackedParameters, PackedTable, install_table
from fairseq.modules.quantization.scalar.modules.replace import names_of
from fairseq.modules.quantization.scalar.weights import check_settings, settings_tensor

ON_DISK = {
    field.name: {"weight_storage": "resident"}.get(field.name, field.name)
    for field in dataclasses.fields(LinearConfig)
    if field.name != "backend"
}
"""The settings of a layer and what they are called in files, which earlier versions read, too.

Which kernels run is up to the machine that loads.
"""
SETTINGS = tuple(ON_DISK.values())
FLAGS = {"bias": True, "input_factor": False, "double": False}
"""Further entries of a layer and their defaults: it has a bias; it has an input factor; its scales are float64."""

Description = dict[str, dict[str, Any]]


class Placeholder(nn.Module):
    """Holds the place of a float part that has no weights yet and will get none.

    Its own ``weight`` and ``bias`` are for code that initializes them; they are no parameters.
    """

    def __init__(self, part: nn.Module):
        super().__init__()
        self.kept = (part,)
        self.weight, self.bias = torch.zeros(1, 1), torch.zeros(1)


def describe(model: nn.Module) -> Description:
    """The settings of each packed part, by the name that it had in the float model; what is a default is left out."""
    return {name: _entry(part) for name, part in packed_parts(model).items()}


def packed_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The packed layers and tables of ``model``, by the name that each had in the float model, a shared one once."""
    found: dict[str, nn.Module] = {}
    inner = {id(m.linear) for m in model.modules() if isinstance(m, PackedPatchEmbedding)}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedPatchEmbedding | PackedTable) and id(module) not in inner:
            found[float_name(model, name)] = module
    return found


def float_name(model: nn.Module, name: str) -> str:
    """The name in the float model of the packed module called ``name``."""
    owner, _, last = name.rpartition(".")
    if isinstance(model.get_submodule(owner), PackedParameters):
        last = last.removeprefix("packed_")
    return f"{owner}.{last}" if owner else last


def packed_name(model: nn.Module, name: str) -> str:
    """The name of the packed module that takes the place of the part called ``name`` in the float ``model``."""
    owner, _, last = name.rpartition(".")
    if last not in model.get_submodule(owner)._modules:
        last = f"packed_{last}"
    return f"{owner}.{last}" if owner else last


def empty_part(model: nn.Module, name: str, entry: Mapping[str, Any], device: str | torch.device) -> nn.Module:
    """An empty packed part for the float part of ``model`` called ``name``, to load a state dict into.

    Args:
        model: the float model; its weights may be on the meta device.
        name: of a Linear, a patch embedding's convolution, an Embedding, or a parameter of shape (1, rows, columns).
        entry: of a :func:`describe`.
        device: of the new part.

    Raises:
        ValueError: there is no such part in the model, or the entry is none; the message names it.
    """
    holder = _part(model, name)
    part = holder.kept[0] if isinstance(holder, Placeholder) else holder
    config, flags = read_entry(name, entry)
    training = isinstance(holder, nn.Module) and holder.training
    scale_dtype = torch.float64 if flags["double"] else torch.float32
    settings: dict[str, Any] = {"device": device, "dtype": _dtype(part)}
    if isinstance(part, nn.Linear):
        return PackedLinear.empty(
            part.in_features, part.out_features, config, name, flags["bias"], flags["input_factor"],
            scale_dtype=scale_dtype, **settings,
        ).train(training)  # fmt: skip
    if flags["double"] or flags["input_factor"]:
        raise ValueError(f"{name}: only a Linear layer has an input factor or scales of float64")
    try:
        if isinstance(part, nn.Conv2d):
            if reason := reason_not_packable(part):
                raise ValueError(f"{name} cannot be packed: {reason}")
            size = cast(tuple[int, int], tuple(part.kernel_size))
            return PackedPatchEmbedding(
                part.in_channels, part.out_channels, size, config, name, flags["bias"], **settings
            ).train(training)
        if isinstance(part, nn.Embedding):
            rows, columns = part.weight.shape
            return PackedEmbedding(rows, columns, config, name, padding_idx=part.padding_idx, **settings).train(
                part.training
            )
        if isinstance(part, nn.Parameter) and part.ndim == 3 and len(part) == 1:
            return PackedTable(part.shape[1], part.shape[2], config, name, **settings)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    raise ValueError(
        f"{name} is packed in the file, and in this model a {type(part).__name__}; load it into a float model"
    )


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a packed part, or what holds its place, where ``model`` has the float part called ``name``."""
    owner, _, last = name.rpartition(".")
    part = model.get_submodule(owner)._modules.get(last)
    if part is None:
        install_table(model.get_submodule(owner), last, cast(PackedTable, new))
    else:
        for alias in names_of(model, part):
            model.set_submodule(alias, new)


def check_loaded(name: str, part: nn.Module) -> None:
    """Raise unless the integers, scales and zero points that were loaded into ``part`` are such.

    Raises:
        ValueError: an integer out of range, or a scale that is not positive and finite.
    """
    layer = part.linear if isinstance(part, PackedPatchEmbedding) else part
    assert isinstance(layer, PackedLinear | PackedTable)
    config, columns = layer.config, layer.columns if isinstance(layer, PackedTable) else layer.in_features
    check_settings(layer.settings, settings_tensor(config.bits, columns, config.group_size, config.symmetric), name)
    largest = 2**config.bits - 1
    if int(layer.zero_point.max()) > largest:
        raise ValueError(f"zero points of {name} must be from 0 to {largest}; one is {int(layer.zero_point.max())}")
    if config.symmetric and not bool((layer.zero_point == 2 ** (config.bits - 1)).all()):
        raise ValueError(f"{name} is symmetric, so that its zero point must be {2 ** (config.bits - 1)} everywhere")
    _check_scale(f"the scale of {name}", layer.scale)
    if isinstance(layer, PackedLinear) and layer.input_scale is not None and layer.input_zero_point is not None:
        _check_scale(f"the input_scale of {name}", layer.input_scale)
        low, high = -(2 ** (config.activation_bits - 1)), 2 ** (config.activation_bits - 1) - 1
        if not low <= int(layer.input_zero_point) <= high:
            got = int(layer.input_zero_point)
            raise ValueError(f"the input_zero_point of {name} must be from {low} to {high}; it is {got}")


def _check_scale(what: str, scale: Tensor) -> None:
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"{what} must be positive and finite")


def _part(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    owner_name, _, last = name.rpartition(".")
    try:
        owner = model.get_submodule(owner_name)
        table = owner._modules.get(f"packed_{last}")
        if isinstance(table, PackedTable):
            return nn.Parameter(torch.empty(1, table.rows, table.columns, device="meta", dtype=table.like.dtype))
        return cast("nn.Module | nn.Parameter", getattr(owner, last))
    except AttributeError:
        message = f"{name} is packed in the file, and this model ({type(model).__name__}) has no such part"
        raise ValueError(message) from None


def _dtype(part: nn.Module | nn.Parameter) -> torch.dtype:
    weight = part if isinstance(part, nn.Parameter) else getattr(part, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) else torch.float32


def _entry(part: nn.Module) -> dict[str, Any]:
    layer = part.linear if isinstance(part, PackedPatchEmbedding) else part
    config = cast(LinearConfig, layer.config)
    default = LinearConfig()
    entry = {
        key: getattr(config, name) for name, key in ON_DISK.items() if getattr(config, name) != getattr(default, name)
    }
    if isinstance(layer, PackedLinear):
        flags = {
            "bias": layer.bias is not None, "input_factor": layer.input_factor is not None,
            "double": layer.scale.dtype == torch.float64,
        }  # fmt: skip
        entry |= {key: value for key, value in flags.items() if value != FLAGS[key]}
    return entry


def read_entry(name: str, entry: Mapping[str, Any]) -> tuple[LinearConfig, dict[str, bool]]:
    """The settings and flags in one entry of a :func:`describe`.

    Raises:
        ValueError: one is unknown or is not accepted; the message names the layer.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name}: its entry must be a mapping of settings, got {entry!r}")
    unknown = set(entry) - set(SETTINGS) - set(FLAGS)
    if unknown:
        raise ValueError(f"{name}: unknown setting {sorted(unknown)[0]!r}; known are {', '.join((*SETTINGS, *FLAGS))}")
    flags = {key: entry.get(key, default) for key, default in FLAGS.items()}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: {key} must be true or false, got {value!r}")
    try:
        config = LinearConfig(**{name: entry[key] for name, key in ON_DISK.items() if key in entry})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    return config, flags
