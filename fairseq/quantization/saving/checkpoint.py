"""Packed and integer-only models in one safetensors file: written whole, and loaded with a float model of the kind."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed.layout import earlier
from fairseq.quantization.architectures.copies import copied
from fairseq.quantization.architectures.separate import separated
from fairseq.quantization.conversion.convert import finish
from fairseq.quantization.engine.fuse import check_engine
from fairseq.quantization.files import replacing
from fairseq.quantization.integer_only.model import IntegerViT
from fairseq.quantization.saving import integer
from fairseq.quantization.saving.contents import VERSION, Contents, inspect, kept_information, write
from fairseq.quantization.saving.description import check_loaded, describe, empty_part, packed_name, put
from fairseq.quantization.saving.names import COMPUTED, names_on_disk

FLOATS = ("F16", "BF16", "F32", "F64")
CODES = {torch.uint8: "U8", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64"}

Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, path: str | os.PathLike[str], information: Mapping[str, Any] | None = None) -> None:
    """Write a packed or integer-only model to one safetensors file, whole or not at all.

    Args:
        model: what ``quantize_model`` returned; on any device.
        path: of the file, ending in .safetensors.
        information: anything that JSON can hold, for people: it is kept beside the settings.

    Raises:
        TypeError: not a module.
        ValueError: nothing in it is packed, or another suffix.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a packed model is saved as .safetensors; got {str(path)!r}")
    description = description_of(model, information)
    with replacing(path) as temporary:
        write(tensors_on_disk(model), temporary, description)


def load(
    path: str | os.PathLike[str], model: Model | None = None, engine: str = "auto"
) -> tuple[Model, dict[str, Any]]:
    """A packed copy of ``model`` with the weights in a file that :func:`save` wrote, and its information.

    ``model`` stays as it is.

    Args:
        path: of the file.
        model: a float model of the same architecture, with any weights. Of an integer-only model the file has all but
            its config and class, so that it may be None.
        engine: as for ``quantize_model``.

    Raises:
        TypeError: not a module.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, was changed, is of a later version or of another model, or there is no
            ``model`` though it is needed; the message names the file and the tensor or setting.
    """
    check_engine(engine)
    if model is not None:
        check_is_module(model)
    contents = inspect([path])
    information = dict(contents.description.get("information", {}))
    if contents.integer is not None:
        if engine == "fused":
            raise ValueError(f"{path}: an integer-only model has no fused engine; leave engine at 'auto'")
        return cast(Model, integer.read(contents, model)), information
    if model is None:
        raise ValueError(f"{path}: holds packed layers, which go into a float model of the same architecture; pass it")
    result = cast(Model, copied(separated(model)))
    names = part_names(result, contents)
    on_disk = part_tensors(result, contents, names)
    tensors = contents.read(contents.tensors)
    fill(result, contents, names, tensors)
    rest = {
        name: key
        for name, key in names_on_disk(result, result.state_dict()).items()
        if key not in on_disk and not name.endswith(COMPUTED)
    }
    _check_rest(result, rest, contents, on_disk)
    result.load_state_dict({name: tensors[key] for name, key in rest.items()}, strict=False)
    finish(result, engine)
    return result, information


def description_of(model: nn.Module, information: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON description of a packed or integer-only model.

    Raises:
        TypeError: not a module.
        ValueError: nothing in it is packed.
    """
    check_is_module(model)
    if isinstance(model, IntegerViT):
        return integer.description_of(model, information)
    parts = describe(model)
    if not parts:
        raise ValueError("nothing in the model is packed; pass what quantize_model returned with execution='packed'")
    names = names_on_disk(model, parts)
    layers = {names[name]: entry for name, entry in parts.items()}
    return {"format_version": VERSION, "layers": layers, "information": kept_information(information)}


def tensors_on_disk(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A state dict, or the model's, under its names on disk, on the CPU, no two tensors in the same memory."""
    if isinstance(model, IntegerViT):
        return integer.tensors_on_disk(model, state)
    state = model.state_dict() if state is None else state
    state = {name: tensor for name, tensor in state.items() if not name.endswith(COMPUTED)}
    names = names_on_disk(model, state)
    seen: set[int] = set()
    tensors = {}
    for name, tensor in state.items():
        tensor = tensor.detach().contiguous().cpu()
        tensors[names[name]] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return tensors


def part_names(model: nn.Module, contents: Contents) -> dict[str, str]:
    """The names in the memory of the float ``model`` of the packed parts in a file, by their names on disk.

    Raises:
        ValueError: the model has not such a part.
    """
    memory = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
    names = {on_disk: name for name, on_disk in names_on_disk(model, memory).items()}
    for on_disk in contents.parts:
        if on_disk not in names:
            raise ValueError(
                f"{contents.files}: {on_disk} is packed in it, and the model ({type(model).__name__}) has no such layer"
            )
    return {on_disk: names[on_disk] for on_disk in contents.parts}


def part_tensors(model: nn.Module, contents: Contents, names: Mapping[str, str]) -> set[str]:
    """The names on disk of all tensors of the packed parts, which are of the dtypes and shapes that the model needs.

    Raises:
        ValueError: one is missing or is of another dtype or shape.
    """
    found = set()
    for on_disk, name in names.items():
        try:
            state = part_state(model, name, contents.parts[on_disk])
        except ValueError as error:
            raise ValueError(f"{contents.files}: {error}") from None
        for key, wanted in state.items():
            entry = contents.tensors.get(key)
            if entry is None:
                raise ValueError(f"{contents.files}: {key} is missing")
            floating = key.rpartition(".")[2] in ("bias", "input_factor")
            dtypes = FLOATS if floating else (CODES[wanted.dtype],)
            if entry.dtype not in dtypes or entry.shape != tuple(wanted.shape):
                codes = key.endswith("weight_codes")
                why = earlier(contents.parts[on_disk].get("bits", 8), entry.shape, tuple(wanted.shape)) if codes else ""
                raise ValueError(
                    f"{entry.file}: {key} must be {' or '.join(dtypes)} of shape {tuple(wanted.shape)}, "
                    f"got {entry.dtype} of shape {entry.shape}{why}"
                )
            found.add(key)
    return found


def part_state(model: nn.Module, name: str, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a packed part has in its state dict, by the names on disk; on the meta device."""
    part = empty_part(model, name, entry, "meta")
    state = part.state_dict()
    return {place: state[key] for key, place in _on_disk(model, packed_name(model, name), part).items()}


def fill(
    model: nn.Module, contents: Contents, names: Mapping[str, str], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Put packed parts into ``model`` in place of float ones, with what the files hold, part by part.

    Args:
        model: it has the float parts still, or whatever holds their places.
        contents: of the files; checked by :func:`part_tensors`.
        names: from :func:`part_names`.
        tensors: if they are read already.

    Raises:
        ValueError: integers or scales that are none.
    """
    for on_disk, name in names.items():
        part = empty_part(model, name, contents.parts[on_disk], "meta")
        keys = _on_disk(model, packed_name(model, name), part)
        found = contents.read(keys.values()) if tensors is None else tensors
        dtypes = {key: tensor.dtype for key, tensor in part.state_dict().items()}  # biases follow the model
        device = _device(model, name)
        state = {key: found[place].to(device, dtypes[key], copy=True) for key, place in keys.items()}
        try:
            part.load_state_dict(state, assign=True)
            for owner in part.modules():
                for key, buffer in list(owner.named_buffers(recurse=False)):
                    if buffer.is_meta:  # an empty one, that no file holds
                        setattr(owner, key, buffer.new_empty(0, device=device))
            check_loaded(name, part)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{contents.files}: {' '.join(str(error).split())}") from None
        put(model, name, part)


def check_is_module(model: object) -> None:
    """TypeError unless ``model`` is an ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _on_disk(model: nn.Module, name: str, part: nn.Module) -> dict[str, str]:
    """The keys of a part's state dict -> their names on disk, the part being called ``name``."""
    names = names_on_disk(model, [f"{name}.{key}" for key in part.state_dict()])
    return {full.removeprefix(f"{name}."): on_disk for full, on_disk in names.items()}


def _device(model: nn.Module, name: str) -> torch.device:
    """Where the rest of a part's surroundings is: of the nearest module around it that has weights somewhere."""
    while name:
        name = name.rpartition(".")[0]
        for tensor in (*model.get_submodule(name).parameters(), *model.get_submodule(name).buffers()):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")


def _check_rest(model: nn.Module, rest: Mapping[str, str], contents: Contents, packed: set[str]) -> None:
    """ValueError unless the file has the tensors of what is not packed, too, and no others."""
    state = model.state_dict()
    for name, key in rest.items():
        entry = contents.tensors.get(key)
        if entry is None:
            raise ValueError(f"{contents.files}: {key} is missing")
        if entry.shape != tuple(state[name].shape):
            raise ValueError(
                f"{entry.file}: {key} must be of shape {tuple(state[name].shape)}, as in the model; got {entry.shape}"
            )
    guards = {f"{name}.weight" for name in contents.parts}  # of a folder that save_pretrained wrote
    more = contents.tensors.keys() - set(rest.values()) - packed - guards
    if more:
        raise ValueError(f"{contents.files}: the model ({type(model).__name__}) has no {min(more)}")
