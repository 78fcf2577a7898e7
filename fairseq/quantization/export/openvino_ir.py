"""OpenVINO's own files, an .xml and a .bin of integers: written from an ONNX graph, and looked into."""

from __future__ import annotations

import importlib
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.quantization.export.written import save_onnx

INTEGERS = ("u4", "i4", "u8", "i8")
IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
FLOATS = ("f16", "bf16", "f32", "f64")
NO_ROUNDING_OF_ITS_OWN = ("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
"""OpenVINO rounds the inputs of layers with 4-bit weights, in groups of 32, unless a model says otherwise."""


def write_openvino(proto: Any, file: Path) -> None:
    """Write the ONNX model ``proto`` of :func:`~fairseq.quantization.export.onnx_graph.onnx_model`, of ops "openvino".

    Args:
        proto: its constants may be larger than the 2 GB of one ONNX file.
        file: the .xml; the .bin lies beside it.
    """
    openvino = importlib.import_module("openvino")
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        source = Path(folder) / "model.onnx"
        save_onnx(proto, source, None)
        model = openvino.Core().read_model(source)
        model.set_rt_info(*NO_ROUNDING_OF_ITS_OWN)
        openvino.save_model(model, file, compress_to_fp16=False)
        del model  # it reads its constants from the file


def multiplies_exactly() -> bool:
    """Whether OpenVINO's products of bytes are exact on this processor: those of 8 bits are not on x86 without VNNI.

    Two neighbouring ones are added in 16 bits there, which saturate.
    """
    openvino: Any = importlib.import_module("openvino")
    ops: Any = importlib.import_module("openvino.opset13")
    x, ends = ops.parameter([2, 64], np.float32), (np.float32(-128), np.float32(127))
    rounded = ops.fake_quantize(x, *ends, *ends, 256)
    integers = ops.convert(ops.constant(np.full((64, 16), 127, np.int8)), np.float32)
    product = ops.matmul(rounded, ops.multiply(integers, np.float32(0.5)), False, False)
    compiled = openvino.Core().compile_model(openvino.Model([product], [x]), "CPU", IN_FLOAT32)
    return bool((compiled(np.full((2, 64), 127, np.float32))[0] == 64 * 127 * 127 / 2).all())


def openvino_tensors(
    path: Path,
) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], dict[str, Tensor], Counter[str]]:
    """What the file holds: integers by name (type, shape, bytes), float tensors by name, and its operators."""
    model = importlib.import_module("openvino").Core().read_model(path)
    integers, floats = {}, {}
    operations = model.get_ordered_ops()
    for constant in (operation for operation in operations if operation.get_type_name() == "Constant"):
        name, kind = constant.get_friendly_name(), constant.get_element_type().get_type_name()
        if kind in INTEGERS:
            integers[name] = (kind, tuple(constant.get_output_shape(0)), constant.get_byte_size())
        elif kind in FLOATS:
            floats[name] = torch.from_numpy(np.array(constant.get_data(dtype=np.float32)))
    return integers, floats, Counter(operation.get_type_name() for operation in operations)
