"""Packed models in safetensors files: written whole, with checksums, and read as if somebody had tampered with them.

Such a file has its tensors under their names on disk (see :mod:`~fairseq.quantization.saving.names`), and in its
metadata, as JSON under "fairseq_vit", a ``description`` (the version of the format and each packed part's settings, see
:mod:`~fairseq.quantization.saving.description`), and ``sha256``: 16 hexadecimal digits for each tensor, of its dtype,
shape and bytes, and for the description.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fairseq.quantization.architectures.forward import separate_biases
from fairseq.quantization.conversion.convert import finish
from fairseq.quantization.engine.fuse import check_engine
from fairseq.quantization.files import replacing
from fairseq.quantization.saving.description import check_loaded, describe, empty_part, packed_name, put
from fairseq.quantization.saving.names import COMPUTED, names_on_disk

FORMAT = "fairseq_vit"
VERSION = 1
DESCRIPTION = "description"
FLOATS = ("F16", "BF16", "F32", "F64")
CODES = {torch.uint8: "U8", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64"}

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its name there, dtype as safetensors calls it, and shape."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """What files hold: their description, and each tensor by its name on disk."""

    description: dict[str, Any]
    tensors: dict[str, Entry]

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """The settings of each packed part, by its name on disk."""
        return dict(self.description["layers"])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the tensors, on the CPU."""
        found: dict[str, Tensor] = {}
        wanted = set(names)
        for file in dict.fromkeys(self.tensors[name].file for name in wanted):
            with safe_open(file, framework="pt") as opened:
                here = (name for name in wanted if self.tensors[name].file == file)
                found.update({name: opened.get_tensor(self.tensors[name].key) for name in here})
        return found

    @property
    def files(self) -> str:
        """The files, for messages."""
        return ", ".join(str(file) for file in dict.fromkeys(entry.file for entry in self.tensors.values()))

    def below(self, prefix: str) -> Contents:
        """What has names that begin with ``prefix``, without it."""
        layers = {name.removeprefix(prefix): part for name, part in self.parts.items() if name.startswith(prefix)}
        tensors = {name.removeprefix(prefix): e for name, e in self.tensors.items() if name.startswith(prefix)}
        return Contents({**self.description, "layers": layers}, tensors)


def save(model: nn.Module, path: str | os.PathLike[str], information: Mapping[str, Any] | None = None) -> None:
    """Write a packed model to one safetensors file, whole or not at all.

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


def load(path: str | os.PathLike[str], model: Model, engine: str = "auto") -> tuple[Model, dict[str, Any]]:
    """A packed copy of ``model`` with the weights in a file that :func:`save` wrote, and its information.

    ``model`` stays as it is.

    Args:
        path: of the file.
        model: a float model of the same architecture, with any weights.
        engine: as for ``quantize_model``.

    Raises:
        TypeError: not a module.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, was changed, is of a later version or of another model; the message names the
            file and the tensor or setting.
    """
    check_engine(engine)
    check_is_module(model)
    contents = inspect([path])
    names = part_names(model, contents)
    result = cast(Model, copy.deepcopy(separate_biases(model)))
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
    return result, dict(contents.description.get("information", {}))


def inspect(files: Iterable[str | os.PathLike[str]], *, verify: bool = True) -> Contents:
    """What is in the files of one model, after all their checksums were compared.

    Args:
        files: their paths.
        verify: False reads only the headers, not the tensors, whose checksums are then not compared.

    Raises:
        FileNotFoundError, ValueError: see :func:`load`.
    """
    descriptions: list[dict[str, Any]] = []
    tensors: dict[str, Entry] = {}
    for path in map(Path, files):
        description, entries = _inspect(path, verify)
        descriptions.append(description)
        for name, entry in entries.items():
            if name in tensors:
                raise ValueError(f"{path}: {name} is in {tensors[name].file.name}, too")
            tensors[name] = entry
    if any(other != descriptions[0] for other in descriptions):
        raise ValueError(f"{path}: its description is not that of the other files; they were not saved together")
    return Contents(descriptions[0], tensors)


def description_of(model: nn.Module, information: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON description of a packed model.

    Raises:
        TypeError: not a module.
        ValueError: nothing in it is packed.
    """
    check_is_module(model)
    parts = describe(model)
    if not parts:
        raise ValueError("nothing in the model is packed; pass what quantize_model returned with execution='packed'")
    names = names_on_disk(model, parts)
    layers = {names[name]: entry for name, entry in parts.items()}
    return {"format_version": VERSION, "layers": layers, "information": dict(information or {})}


def tensors_on_disk(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A state dict, or the model's, under its names on disk, on the CPU, no two tensors in the same memory."""
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


def write(tensors: dict[str, Tensor], path: Path, description: Mapping[str, Any]) -> None:
    """Write tensors with their checksums and a description."""
    checksums = {name: _digest(tensor) for name, tensor in tensors.items()}
    checksums[DESCRIPTION] = _digest_of_json(description)
    metadata = {"format": "pt", FORMAT: json.dumps({DESCRIPTION: description, "sha256": checksums})}
    save_file(tensors, path, metadata)


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
            state = _state(model, name, contents.parts[on_disk])
        except ValueError as error:
            raise ValueError(f"{contents.files}: {error}") from None
        for key, wanted in state.items():
            entry = contents.tensors.get(key)
            if entry is None:
                raise ValueError(f"{contents.files}: {key} is missing")
            floating = key.rpartition(".")[2] in ("bias", "input_factor")
            dtypes = FLOATS if floating else (CODES[wanted.dtype],)
            if entry.dtype not in dtypes or entry.shape != tuple(wanted.shape):
                raise ValueError(
                    f"{entry.file}: {key} must be {' or '.join(dtypes)} of shape {tuple(wanted.shape)}, "
                    f"got {entry.dtype} of shape {entry.shape}"
                )
            found.add(key)
    return found


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
        state = {key: found[place].to(_device(model, name), dtypes[key], copy=True) for key, place in keys.items()}
        try:
            part.load_state_dict(state, assign=True)
            check_loaded(name, part)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{contents.files}: {' '.join(str(error).split())}") from None
        put(model, name, part)


def check_is_module(model: object) -> None:
    """TypeError unless ``model`` is an ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_description(description: Any, where: str) -> dict[str, Any]:
    """A description that this version of the library reads.

    Raises:
        ValueError: it is none, or of a later version.
    """
    if not isinstance(description, Mapping):
        raise ValueError(f"{where}: the description must be a mapping, got {type(description).__name__}")
    version = description.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"{where}: format_version must be a whole number of at least 1, got {version!r}")
    if version > VERSION:
        raise ValueError(
            f"{where}: format_version {version} is later than {VERSION}, which this version of fairseq reads"
        )
    layers = description.get("layers")
    if not isinstance(layers, Mapping) or not layers or not all(isinstance(e, Mapping) for e in layers.values()):
        raise ValueError(f"{where}: layers must map the names of packed layers to their settings, got {layers!r:.80}")
    return dict(description)


def _inspect(path: Path, verify: bool) -> tuple[dict[str, Any], dict[str, Entry]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: packed models are read from .safetensors files only")
    try:
        with safe_open(path, framework="pt") as opened:
            said, checksums = _metadata(path, opened.metadata())
            names = set(opened.keys())
            if names != checksums.keys() - {DESCRIPTION}:
                name = min(names ^ (checksums.keys() - {DESCRIPTION}))
                raise ValueError(f"{path}: {name} " + ("has no checksum" if name in names else "is missing"))
            entries = {}
            for name in sorted(names):
                view = opened.get_slice(name)
                entries[name] = Entry(path, name, view.get_dtype(), tuple(view.get_shape()))
                if verify and _digest(opened.get_tensor(name)) != checksums[name]:
                    raise ValueError(f"{path}: {name} is damaged: its checksum is not the one that was saved")
    except (SafetensorError, OSError, UnicodeDecodeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    return said, entries


def _metadata(path: Path, metadata: Mapping[str, str] | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The description and the checksums in a file's metadata."""
    if FORMAT not in (metadata or {}):
        raise ValueError(f"{path}: its metadata have no {FORMAT!r}; it is no packed model, or was rewritten without it")
    try:
        content = json.loads((metadata or {})[FORMAT])
        description, checksums = content[DESCRIPTION], content["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: the metadata {FORMAT!r} are damaged ({type(error).__name__}: {error})") from None
    if not isinstance(checksums, dict):
        raise ValueError(f"{path}: sha256 must map names to checksums, got {type(checksums).__name__}")
    description = check_description(description, str(path))
    if checksums.get(DESCRIPTION) != _digest_of_json(description):
        raise ValueError(f"{path}: the {DESCRIPTION} is damaged: its checksum is not the one that was saved")
    return description, checksums


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), usedforsecurity=False)
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _digest_of_json(description: Mapping[str, Any]) -> str:
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode(), usedforsecurity=False).hexdigest()[:16]


def _state(model: nn.Module, name: str, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a packed part has in its state dict, by the names on disk; on the meta device."""
    part = empty_part(model, name, entry, "meta")
    state = part.state_dict()
    return {place: state[key] for key, place in _on_disk(model, packed_name(model, name), part).items()}


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
