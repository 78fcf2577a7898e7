"""A folder with a saved model, looked at before transformers reads it: what its JSON says is within reason."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from torch import nn

from fairseq.quantization.files import plain_file
from fairseq.quantization.json_files import read_json
from fairseq.quantization.saving.contents import check_header

INDEX = "model.safetensors.index.json"
READ_BY_TRANSFORMERS = (
    "config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "generation_config.json", "adapter_config.json", INDEX,
)  # fmt: skip
COUNTS = {r"(.*_)?(layers|depths?|blocks)": 1000, "num_labels": 10**6}
"""Names of numbers in config.json by which transformers builds parts one by one, and the largest that are taken."""
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": (lambda value: isinstance(value, str), "a name"),
    "architectures": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value), "a list of names"
    ),
    "quantization_config": (
        lambda value: isinstance(value, dict) and isinstance(value.get("quant_method", ""), str),
        "an object with a quant_method",
    ),
}  # fmt: skip
"""What transformers takes for granted of entries of config.json."""
LARGEST = 2**40
"""Of other whole numbers: sizes that a tensor can have."""
WEIGHTS_A_BYTE, MADE_UP = 4, 2**26
"""Numbers that a model has at most: for each byte of its files (as integers of 2 bits), and in a head that is new."""


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Look at what transformers would read in a folder.

    Links are followed, as HuggingFace's cache is made of them: what counts is that a plain file is at the end.

    Raises:
        FileNotFoundError: no config.json.
        OSError, ValueError: a file is no plain one, or its JSON says what no model has; the message names the file.
    """
    folder = Path(folder)
    read_config(folder)
    for name in READ_BY_TRANSFORMERS[1:]:
        if os.path.lexists(folder / name):
            read_json(folder / name, finite=False)
    for file in weight_files(folder):
        if os.path.lexists(file):  # of several kinds of files, there is one
            check_header(file)
    for file in folder.glob("*.json"):
        if file.exists():  # or it is a link to nothing, as in a cache that is filled in part
            plain_file(file)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no object in JSON, or has sizes that no model has.
    """
    file = folder / "config.json"
    if not os.path.lexists(file):
        raise FileNotFoundError(f"{folder}: no saved model in this folder: it has no config.json")
    config = read_json(file, finite=False)
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(config).__name__}")
    for key, (accepted, what) in KINDS.items():
        if config.get(key) is not None and not accepted(config[key]):
            raise ValueError(f"{file}: {key} must be {what}, got {config[key]!r:.80}")
    _check_numbers({key: value for key, value in config.items() if key != "quantization_config"}, str(file))
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those in the index, or else the one of that name, which need not be there.

    Raises:
        ValueError: the index is damaged, or names a file that is not in the folder.
    """
    index = folder / INDEX
    if not os.path.lexists(index):
        return [folder / "model.safetensors"]
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} is damaged: it must map names of tensors to files, as its weight_map")
    check_inside(names.values(), str(index))
    return [folder / name for name in sorted(set(names.values()))]


def check_inside(names: Iterable[Any], where: str) -> None:
    """ValueError unless all ``names`` are of safetensors files in one folder or below it."""
    for name in names:
        parts = PurePath(name).parts if isinstance(name, str) else ()
        if (
            not parts or os.path.isabs(name) or PurePath(name).drive or ".." in parts or "\0" in name
            or not name.endswith(".safetensors") or len(name) > 255
        ):  # fmt: skip
            raise ValueError(f"{where}: {name!r:.80} is no name of a .safetensors file in this folder")


def check_size(model: nn.Module, files: Iterable[str | os.PathLike[str]], where: str) -> None:
    """ValueError if a model, on the meta device, is far larger than the files that its weights are to come from."""
    count = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    size = sum(os.path.getsize(file) for file in files)
    if count > WEIGHTS_A_BYTE * size + MADE_UP:
        raise ValueError(
            f"{where}: config.json is of a {type(model).__name__} with {count:,} weights, and the files have "
            f"{size:,} bytes; they do not belong together"
        )


def _check_numbers(value: Any, where: str, name: str = "") -> None:
    """ValueError for a count or size of a config that no model has; ``name``: of what ``value`` is part of."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_numbers(item, where, key)
    elif isinstance(value, list):
        for item in value:
            _check_numbers(item, where, name)
    elif isinstance(value, int):
        most = next((most for pattern, most in COUNTS.items() if re.fullmatch(pattern, name)), LARGEST)
        if abs(value) > most:
            raise ValueError(f"{where}: {name} must be at most {most}, got {value!s:.40}")
