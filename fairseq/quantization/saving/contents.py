"""What files of packed models hold, written with checksums, and read as if somebody had tampered with them.

Such a safetensors file has its tensors under their names on disk (see :mod:`~fairseq.quantization.saving.names`), and
in its metadata, as JSON under "fairseq_vit", a ``description`` (the version of the format and each packed part's
settings, see :mod:`~fairseq.quantization.saving.description`), and ``sha256``: 16 hexadecimal digits for each tensor,
of its dtype, shape and bytes, and for the description. That of an integer-only model is of a later version and has its
structure under "integer", see :mod:`~fairseq.quantization.saving.integer`.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fairseq.quantization.files import plain_file
from fairseq.quantization.json_files import parse_json
from fairseq.quantization.saving.description import read_entry

FORMAT = "fairseq_vit"
LOAD_WITH = "import fairseq.models.vit_quantization before from_pretrained"
QUANT_METHOD = f"{FORMAT} ({LOAD_WITH})"
"""The method in config.json, which transformers repeats in a warning, before it fails, where it is not registered.

It has no entry points by which an installed package could register it, and says nothing else of what is in a folder.
"""
VERSION = 1
INTEGER_VERSION = 2
"""Of files of integer-only models, which a library that knows version 1 alone refuses."""
DESCRIPTION = "description"
MOST_HEADER = 8 * 2**20
"""Bytes; a header has some hundred for each tensor."""
INTEGER_BITS = (2, 3, 4, 8)
"""Of the weights of integer-only models."""
INTEGER_ENTRY = {
    "bits": lambda bits: type(bits) is int and bits in INTEGER_BITS,
    "columns": lambda columns: type(columns) is int and columns > 0,
    "method": lambda method: method == "channel",
    "activations": lambda kind: kind in ("dynamic", "static"),
}  # fmt: skip
"""What an entry of a layer of an integer-only model has."""


def kept_information(information: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is to be kept in a file for people, a copy.

    Raises:
        ValueError: it holds NaN or infinity, which JSON has not, and which is refused when it is read.
    """
    for key, value in (information or {}).items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ValueError(f"information: JSON has only finite numbers, and {key} is {value!r:.80}") from None
    return dict(information or {})


def names_format(quantization_config: Any) -> bool:
    """Whether a ``quantization_config``, a dict or an object of transformers, is of this library, or an earlier one."""
    config = quantization_config
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return isinstance(method, str) and method.partition(" ")[0] == FORMAT


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its name there, dtype as safetensors calls it, shape, and the state of the file."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    state: tuple[int, ...] = ()


@dataclass(frozen=True)
class Contents:
    """What files hold: their description, and each tensor by its name on disk."""

    description: dict[str, Any]
    tensors: dict[str, Entry]

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """The settings of each packed part, by its name on disk."""
        return dict(self.description["layers"])

    @property
    def integer(self) -> Mapping[str, Any] | None:
        """The structure of an integer-only model; None of a packed one."""
        return self.description.get("integer")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the tensors, on the CPU.

        Raises:
            ValueError: a file is another one than when it was inspected.
        """
        found: dict[str, Tensor] = {}
        wanted = set(names)
        for file, state in dict.fromkeys((self.tensors[name].file, self.tensors[name].state) for name in wanted):
            with opened(file) as source:
                here = [name for name in wanted if self.tensors[name].file == file]
                found.update({name: source.get_tensor(self.tensors[name].key) for name in here})
            if _state(file) != state:
                raise ValueError(f"{file} was replaced while it was being read; load it again")
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

    def above(self, prefix: str) -> Contents:
        """The same with names that begin with ``prefix``."""
        layers = {prefix + name: part for name, part in self.parts.items()}
        return Contents({**self.description, "layers": layers}, {prefix + name: e for name, e in self.tensors.items()})

    def only(self, names: Collection[str]) -> Contents:
        """The same tensors, of which those of the parts called ``names`` are of packed parts."""
        layers = {name: part for name, part in self.parts.items() if name in names}
        return Contents({**self.description, "layers": layers}, self.tensors)


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
    wanted, found = descriptions[0].get("tensors", len(tensors)), len(tensors)
    if found != wanted:
        raise ValueError(f"{path}: its model has {wanted} tensors, and {found} are here; a file of it is missing")
    names = sorted(tensors)
    for name in descriptions[0]["layers"]:
        if next(names_of_part(names, name), None) is None:
            raise ValueError(f"{path}: {name!r:.80} is described as packed, and has no tensors")
    return Contents(descriptions[0], tensors)


def names_of_part(names: Sequence[str], part: str) -> Iterator[str]:
    """Those of sorted ``names`` of tensors that are of the packed part called so, a layer or a table."""
    owner, dot, last = part.rpartition(".")
    for prefix in (f"{part}.", f"{owner}{dot}packed_{last}."):
        for place in range(bisect.bisect_left(names, prefix), len(names)):
            if not names[place].startswith(prefix):
                break
            yield names[place]


def write(tensors: dict[str, Tensor], path: Path, description: Mapping[str, Any]) -> None:
    """Write tensors with their checksums and a description."""
    checksums = {name: _digest(tensor) for name, tensor in tensors.items()}
    checksums[DESCRIPTION] = _digest_of_json(description)
    metadata = {"format": "pt", FORMAT: json.dumps({DESCRIPTION: description, "sha256": checksums})}
    save_file(tensors, path, metadata)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of the names, dtypes, shapes and bytes of tensors, whatever their order."""
    return _digest_of_json({name: _digest(tensor) for name, tensor in tensors.items()})


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
    if version > INTEGER_VERSION:
        raise ValueError(
            f"{where}: format_version {version} is later than {INTEGER_VERSION}, which this version of fairseq reads"
        )
    layers = description.get("layers")
    if not isinstance(layers, Mapping) or not layers or not all(isinstance(e, Mapping) for e in layers.values()):
        raise ValueError(f"{where}: layers must map the names of packed layers to their settings, got {layers!r:.80}")
    integer = description.get("integer")
    if (version == INTEGER_VERSION) != isinstance(integer, Mapping):
        raise ValueError(f"{where}: format_version {version} goes with integer={integer!r:.80}")
    for name, entry in layers.items():
        try:
            read_entry(name, entry) if integer is None else _check_integer_entry(name, entry)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not isinstance(description.get("information", {}), Mapping):
        raise ValueError(f"{where}: information must be a mapping, got {description['information']!r:.80}")
    return dict(description)


def _check_integer_entry(name: str, entry: Mapping[str, Any]) -> None:
    if entry.keys() != INTEGER_ENTRY.keys():
        raise ValueError(f"{name} must have {', '.join(INTEGER_ENTRY)}, got {', '.join(map(str, entry))}")
    for key, accepted in INTEGER_ENTRY.items():
        if not accepted(entry[key]):
            raise ValueError(f"{name}: {key}={entry[key]!r:.80} is none of an integer-only model")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, opened to be read.

    Raises:
        FileNotFoundError, ValueError: it is none; its header is longer than the file, or than :data:`MOST_HEADER`.
    """
    check_header(path)
    try:
        with safe_open(path, framework="pt") as source:
            yield source
    except (SafetensorError, OSError, UnicodeDecodeError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def check_header(path: Path) -> None:
    """See how long the header of a safetensors file is before somebody reads it.

    Raises:
        FileNotFoundError, ValueError: no plain file; it is longer than the file, or than :data:`MOST_HEADER`.
    """
    with plain_file(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if not 2 <= length <= min(size - 8, MOST_HEADER):
        raise ValueError(
            f"{path} is not a whole safetensors file: its header says that it has {length} bytes, of {size} in all; "
            f"accepted are from 2 to {MOST_HEADER}"
        )


def _inspect(path: Path, verify: bool) -> tuple[dict[str, Any], dict[str, Entry]]:
    plain_file(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: packed models are read from .safetensors files only")
    state = _state(path)
    with opened(path) as source:
        said, checksums = _metadata(path, source.metadata())
        names = set(source.keys())
        if names != checksums.keys() - {DESCRIPTION}:
            name = min(names ^ (checksums.keys() - {DESCRIPTION}))
            raise ValueError(f"{path}: {name!r} " + ("has no checksum" if name in names else "is missing"))
        entries = {}
        for name in sorted(names):
            view = source.get_slice(name)
            entries[name] = Entry(path, name, view.get_dtype(), tuple(view.get_shape()), state)
            if verify and _digest(source.get_tensor(name)) != checksums[name]:
                raise ValueError(f"{path}: {name} is damaged: its checksum is not the one that was saved")
    return said, entries


def _state(path: Path) -> tuple[int, ...]:
    """Of a file: another one that took its place, or that was written to, has another."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _metadata(path: Path, metadata: Mapping[str, str] | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The description and the checksums in a file's metadata."""
    if FORMAT not in (metadata or {}):
        raise ValueError(f"{path}: its metadata have no {FORMAT!r}; it is no packed model, or was rewritten without it")
    content = parse_json((metadata or {})[FORMAT], f"{path}: what its metadata say as {FORMAT!r}")
    try:
        description, checksums = content[DESCRIPTION], content["sha256"]
    except (TypeError, KeyError) as error:
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
