"""export: a quantized model as a file for ONNX, TorchScript or torch.export that is verified before it is there."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.config import check_one_of
from fairseq.quantization.architectures.forward import call, picture_inputs
from fairseq.quantization.conversion.convert import tuple_while_tracing
from fairseq.quantization.engine.fuse import optimize
from fairseq.quantization.export.export_report import ExportReport
from fairseq.quantization.export.onnx_graph import ONNX_OPS, onnx_model
from fairseq.quantization.export.verify import verify

FORMATS = {"onnx": ".onnx", "torchscript": ".pt", "torch_export": ".pt2"}
PROTOBUF_LIMIT = 2**31 - 2**24
MAX_BATCH = 1024


class Positional(nn.Module):
    """A model that takes its inputs by position and returns the tensors of its output as a tuple."""

    def __init__(self, model: nn.Module, inputs: list[str], outputs: list[str]):
        super().__init__()
        self.model = model
        self.inputs, self.outputs = inputs, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        output = call(self.model, dict(zip(self.inputs, tensors)))
        return tuple(value for value in output.values() if isinstance(value, Tensor))


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = "onnx",
    sample: Any = None,
    *,
    external_data: bool | None = None,
    onnx_ops: str = "onnxruntime",
) -> ExportReport:
    """Write a quantized model as a file that needs no fairseq, and verify the file before it appears at ``path``.

    The file takes any batch size from 1 to 1024. It is loaded in a new process in which fairseq cannot be imported, run
    on two batch sizes, compared with the model, and searched for float copies of the weights. ONNX files are of opset
    21. Weights of 2 to 4 bits take 4 bits in them, 5 to 8 bits a byte.

    Args:
        model: what ``quantize_model`` returned with ``execution="packed"``, on the CPU; it is not changed.
        path: with the suffix .onnx, .pt or .pt2.
        format: "onnx", "torchscript" or "torch_export".
        sample: what a processor returned, a mapping of names to tensors or a tensor of pixel values, batch first; None
            for noise of the size that the model's configuration names.
        external_data: whether the weights of an ONNX file lie in a second one, ``path`` with .data added; None for
            those that are too large for one file (2 GB).
        onnx_ops: "standard" uses only operators of ONNX itself, for any runtime; "onnxruntime" also some of
            onnxruntime's own, which are faster there. ONNX only.

    Raises:
        TypeError: not a module, or a sample that is none.
        ValueError: an unknown format or suffix; the model is not packed, or not on the CPU.
        FileNotFoundError: the folder does not exist.
        ImportError: onnx, onnxscript or onnxruntime is missing ("onnx" only).
        RuntimeError: the file does not run, gives other numbers, or holds float weights; it was not kept.
    """
    path = Path(path)
    _check(model, path, format, external_data, onnx_ops)
    with torch.no_grad():
        portable = optimize(model, engine="layers").eval().float()
        for key, hook in list(portable._forward_hooks.items()):
            if hook is tuple_while_tracing:  # the names of the outputs are needed
                del portable._forward_hooks[key]
        inputs = _inputs(portable, sample)
        wrapper = Positional(portable, list(inputs), _output_names(portable, inputs)).eval()
        folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            folder.mkdir()
            file = folder / path.name
            try:
                _write(wrapper, inputs, file, format, external_data, onnx_ops)
            except Exception as error:  # exporters raise nearly anything, and long texts
                raise RuntimeError(
                    f"torch {torch.__version__} cannot write {type(model).__name__} as {format!r}: {_first_line(error)}"
                ) from error
            report = verify(wrapper, inputs, file, format)
            files = sorted(folder.iterdir(), key=lambda written: written == file)  # the one that is opened comes last
            for written in files:
                os.replace(written, path.with_name(written.name))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return report


def _first_line(error: Exception) -> str:
    """The first sentence of the innermost cause."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _check(model: nn.Module, path: Path, format: str, external_data: bool | None, onnx_ops: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_one_of("format", format, tuple(FORMATS))
    check_one_of("onnx_ops", onnx_ops, ONNX_OPS)
    if path.suffix != FORMATS[format]:
        raise ValueError(f"a file of format {format!r} ends in {FORMATS[format]}, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    if external_data is not None and format != "onnx":
        raise ValueError(f"external_data is for format 'onnx' only, got {format!r}")
    if not any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError(
            "nothing in the model is packed; pass what ViTQuantizer(...).quantize_model(model) returned with "
            "execution='packed'"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(
                f"the model is on {tensor.device} ({name}); export a copy of it: copy.deepcopy(model).to('cpu')"
            )
    if any("spatial_shapes" in inspect.signature(type(module).forward).parameters for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} resizes its position embeddings to each picture's shape, one by one, and no file "
            "for any batch size can"
        )
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ImportError(f'exporting to ONNX needs {package}: pip install "fairseq[onnx]"') from error


def _inputs(model: nn.Module, sample: Any) -> dict[str, Tensor]:
    """The sample by name, at least two rows of it, floats as float32."""
    if sample is None:
        sample = _noise(model)
    if isinstance(sample, Tensor):
        sample = picture_inputs(model, sample)
    if not isinstance(sample, Mapping) or not all(isinstance(t, Tensor) and t.ndim for t in sample.values()):
        raise TypeError(
            f"sample must be a tensor of pixel values or a mapping of names to tensors, got {type(sample).__name__}; "
            "of a processor, ask for return_tensors='pt'"
        )
    inputs = {name: t.detach().cpu() for name, t in sample.items()}
    inputs = {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}
    lengths = {name: len(t) for name, t in inputs.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"all tensors of the sample must have the same batch size, at least 1; got {lengths}")
    return {n: torch.cat([t, t]) if len(t) == 1 else t for n, t in inputs.items()}  # one row looks like a constant


def _noise(model: nn.Module) -> Tensor:
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if size is None:
        raise ValueError("the model's configuration names no image_size; pass sample=inputs")
    height, width = (size, size) if isinstance(size, int) else size
    shape = (2, getattr(config, "num_channels", 3), height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _output_names(model: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    output = call(model, inputs)
    return [name for name, value in output.items() if isinstance(value, Tensor)]


def _write(
    wrapper: nn.Module, inputs: dict[str, Tensor], file: Path, format: str, external: bool | None, ops: str
) -> None:
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    shapes = (tuple({0: batch} for _ in inputs),)
    if format == "torchscript":
        torch.jit.trace(wrapper, tuple(inputs.values()), check_trace=False).save(str(file))
    elif format == "torch_export":
        torch.export.save(torch.export.export(wrapper, tuple(inputs.values()), dynamic_shapes=shapes), str(file))
    else:
        proto = onnx_model(wrapper, inputs, wrapper.outputs, shapes, ops)  # type: ignore[arg-type]
        large = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > PROTOBUF_LIMIT
        importlib.import_module("onnx").save(
            proto, str(file), save_as_external_data=large if external is None else external,
            all_tensors_to_one_file=True, location=f"{file.name}.data", size_threshold=1024,
        )  # fmt: skip
