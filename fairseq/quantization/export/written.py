"""What files have in common, of whatever model: any batch size, and ONNX files of two parts."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

PROTOBUF_LIMIT = 2**31 - 2**24
MAX_BATCH = 1024


def any_batch() -> Any:
    """The dimension of pictures, for torch.export."""
    return torch.export.Dim("batch", min=1, max=MAX_BATCH)


def save_onnx(model: Any, file: Path, external: bool | None) -> None:
    """Write a ModelProto; its constants to a second file if ``external``, or if None and they are too large for one."""
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > PROTOBUF_LIMIT
    importlib.import_module("onnx").save(
        model, str(file), save_as_external_data=large if external is None else external,
        all_tensors_to_one_file=True, location=f"{file.name}.data", size_threshold=1024,
    )  # fmt: skip
