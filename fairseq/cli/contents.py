"""What is inside a saved model, from the headers of its files and its config.json."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from fairseq.cli.output import table
from fairseq.quantization.evaluation.report import megabytes
from fairseq.quantization.saving.contents import FORMAT, Contents, Entry, inspect, names_format, names_of_part, opened
from fairseq.quantization.saving.folder import read_config, weight_files

DEFAULTS = {"bits": 8, "method": "tensor", "activations": "dynamic", "activation_bits": 8, "group_size": None}
INFORMATION = {"bytes_before": int, "calibration_images": int, "metrics": dict}
BYTES = {"U8": 1, "I8": 1, "BOOL": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}


def read(path: Path, verify: bool = False) -> dict[str, Any] | None:
    """A packed model's settings and sizes; None for a folder or file that holds a float model.

    Args:
        path: a folder that save_pretrained wrote, or a .safetensors file.
        verify: also read the weights and compare their checksums.

    Raises:
        FileNotFoundError: there is no such thing.
        ValueError: it is damaged, or no model.
    """
    config: dict[str, Any] | None = None
    files = [path]
    if path.is_dir():
        config, files = read_config(path), weight_files(path)
        if not names_format(config.get("quantization_config")):
            return None
    elif path.is_file() and path.suffix == ".safetensors" and _is_float(path):
        return None
    found = inspect(files, verify=verify)
    if config is not None and config["quantization_config"].get("description") != found.description:
        raise ValueError(f"{path}: config.json describes another model than the weights do")
    return _result(path, files, config or {}, found, verify)


def text(result: dict[str, Any], layers: bool) -> str:
    """For people."""
    sizes, information = result["sizes"], result["information"]
    before = f", {megabytes(sizes['float'])} in float" if sizes["float"] else ""
    lines = {
        "Model": result["architecture"] or "unknown (the file alone does not say)",
        "Weights": _counted(f"{e['bits']}-bit {e['method']}" for e in result["layers"].values()),
        "Activations": _counted(_activations(e) for e in result["layers"].values()),
        "Arithmetic": "integers alone (--integer runs it)" if result["arithmetic"] == "integer" else "",
        "Bits": f"{result['average_bits']:.3g} per quantized weight, {len(result['layers'])} layers",
        "Size": f"{megabytes(sizes['packed'])} packed, {megabytes(sizes['rest'])} not quantized, "
        f"{megabytes(sizes['total'])} on disk{before}",
        "Calibration": f"{information['calibration_images']} pictures" if information.get("calibration_images") else "",
        "Metrics": ", ".join(f"{k} {v}" for k, v in (information.get("metrics") or {}).items()),
        "Format": f"version {result['format_version']}"
        + (f", transformers {result['transformers_version']}" if result["transformers_version"] else ""),
        "Files": ", ".join(result["files"]),
        "Checksums": "compared, all right" if result["verified"] else "not compared (--verify does)",
    }
    parts = ["\n".join(f"{name + ':':<13}{line}" for name, line in lines.items() if line)]
    if layers:
        header = ["layer", "weights", "bits", "method", "group", "activations", "bytes"]
        parts.append(table(header, [_row(name, entry) for name, entry in result["layers"].items()]))
    return "\n\n".join(parts)


def _result(path: Path, files: list[Path], config: dict[str, Any], found: Contents, verify: bool) -> dict[str, Any]:
    layers, packed, names = {}, 0, sorted(found.tensors)
    for name, entry in found.parts.items():
        tensors = {key: found.tensors[key] for key in names_of_part(names, name)}
        size = sum(_bytes(e) for e in tensors.values())
        packed += size
        settings = {**DEFAULTS, **{key: value for key, value in entry.items() if key in DEFAULTS}}
        layers[name] = {**settings, "weights": _weight_count(tensors, name, settings["bits"]), "bytes": size}
    information = dict(found.description.get("information", {}))
    for key, kind in INFORMATION.items():  # anything that JSON can hold may be there
        if not isinstance(information.get(key), kind):
            information.pop(key, None)
    total = sum(file.stat().st_size for file in files)
    count = sum(layer["weights"] for layer in layers.values())
    return {
        "path": str(path), "quantized": True, "arithmetic": "float" if found.integer is None else "integer",
        "architecture": next(iter(config.get("architectures") or ()), None),
        "format_version": found.description["format_version"],
        "transformers_version": config.get("transformers_version"),
        "average_bits": sum(e["bits"] * e["weights"] for e in layers.values()) / max(count, 1),
        "sizes": {
            "packed": packed, "rest": sum(map(_bytes, found.tensors.values())) - packed, "total": total,
            "float": information.get("bytes_before"),
        },
        "information": information, "files": [file.name for file in files], "verified": verify, "layers": layers,
    }  # fmt: skip


def _is_float(file: Path) -> bool:
    """Whether a whole safetensors file is of a model that nothing was packed in."""
    try:
        with opened(file) as source:
            return FORMAT not in (source.metadata() or {})
    except ValueError:
        return False  # the reader says what is wrong


def _bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * BYTES.get(entry.dtype, 1)


def _weight_count(tensors: dict[str, Entry], name: str, bits: int) -> int:
    """How many integers the rows hold, from their shape; a row's last byte may be filled up."""
    codes = tensors.get(f"{name}.weight_codes") or tensors.get(f"{name}.weight")
    return 0 if codes is None else math.prod(codes.shape) * 8 // bits


def _activations(entry: dict[str, Any]) -> str:
    kind = entry["activations"]
    return "float" if kind is None else f"{entry['activation_bits']}-bit {kind}"


def _counted(kinds: Any) -> str:
    return ", ".join(f"{kind} ({count} layers)" for kind, count in Counter(kinds).most_common())


def _row(name: str, entry: dict[str, Any]) -> list[str]:
    group = "-" if entry["group_size"] is None else str(entry["group_size"])
    sizes = f"{entry['weights']}", str(entry["bits"]), entry["method"], group
    return [name, *sizes, _activations(entry), str(entry["bytes"])]
