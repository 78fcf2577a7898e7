"""export: a quantized model as a file of ONNX, OpenVINO, TorchScript or torch.export, verified before it is there."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.config import check_one_of
from fairseq.quantization.architectures.forward import call, picture_inputs, tensors_in
from fairseq.quantization.conversion.convert import tuple_while_tracing
from fairseq.quantization.engine.fuse import optimize
from fairseq.quantization.export.export_report import ExportReport
from fairseq.quantization.export.free_size import always_resized, free_shapes, other_sizes, size_settings
from fairseq.quantization.export.integer import sample_inputs, verify_integers, write_integers
from fairseq.quantization.export.integer_c import write_c
from fairseq.quantization.export.integer_graph import INPUTS
from fairseq.quantization.export.onnx_graph import ONNX_OPS, onnx_model
from fairseq.quantization.export.openvino_ir import write_openvino
from fairseq.quantization.export.verify import verify
from fairseq.quantization.export.written import any_batch, save_onnx
from fairseq.quantization.files import folder_beside, move_files
from fairseq.quantization.integer_only.layers import IntegerLinear
from fairseq.quantization.integer_only.model import IntegerViT

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".pt", "torch_export": ".pt2", "c": ".bin"}

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
FREE_SIZE = ("onnx", "openvino", "torch_export")
OLDEST_FREE_SIZE = "2.10"
NAMES = {"onnx": "ONNX", "openvino": "OpenVINO"}


class Positional(nn.Module):
    """A model that takes its inputs by position and returns the tensors of its output as a tuple.

    Args:
        model: to be called.
        inputs: their names.
        outputs: the names of the tensors in its output.
        settings: what it is always called with, too.
    """

    def __init__(
        self, model: nn.Module, inputs: list[str], outputs: list[str], settings: Mapping[str, Any] | None = None
    ):
        super().__init__()
        self.model = model
        self.inputs, self.outputs, self.settings = inputs, outputs, dict(settings or {})

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        output = call(self.model, {**dict(zip(self.inputs, tensors)), **self.settings})
        return tuple(tensors_in(output).values())


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = "onnx",
    sample: Any = None,
    *,
    external_data: bool | None = None,
    onnx_ops: str = "onnxruntime",
    pixels: str | None = None,
    free_size: bool = False,
) -> ExportReport:
    """Write a quantized model as a file that needs no fairseq, and verify the file before it appears at ``path``.

    That of an integer-only model gives its "integer_logits" to the last bit, and has nothing but integers in it. The
    file takes any batch size from 1 to 1024. It is loaded in a new process in which fairseq cannot be imported, run
    on two batch sizes, compared with the model, and searched for float copies of the weights. ONNX files are of opset
    21. Weights of 2 to 4 bits take 4 bits in them, 5 to 8 bits a byte.

    Args:
        model: what ``quantize_model`` returned with ``execution="packed"``, on the CPU; it is not changed.
        path: with the suffix .onnx, .xml, .pt, .pt2 or .bin. Beside an .xml lies its .bin.
        format: "onnx", "openvino", "torchscript" or "torch_export"; or "c", of an integer-only model, for the program
            in ``examples/vision_transformer/integer_c``, with a header beside it.
        sample: what a processor returned, a mapping of names to tensors or a tensor of pixel values, batch first; None
            for noise of the size that the model's configuration names.
        external_data: whether the weights of an ONNX file lie in a second one, ``path`` with .data added; None for
            those that are too large for one file (2 GB).
        onnx_ops: "standard" uses only operators of ONNX itself, for any runtime; "onnxruntime" also some of
            onnxruntime's own, which are faster there. ONNX only; those of an integer-only model are standard.
        pixels: what the file of an integer-only model takes: "uint8", the pixels themselves, or "float32", pixel values
            as the float model takes them, which are rounded first, by the only operations with floats. None for uint8.
        free_size: whether the file takes pictures of any height and width, of 2 to 512 whole patches each; of models
            that resize their position embeddings, if asked (``interpolate_pos_encoding=True``) or always. It is
            verified on two more sizes. "onnx", "openvino" and "torch_export" only.

    Raises:
        TypeError: not a module, or a sample that is none.
        ValueError: an unknown format or suffix; the model is not packed, or not on the CPU; ``pixels`` of a packed one;
            ``free_size`` of a model that takes pictures of one size only, or for a format or a torch without it.
        FileNotFoundError: the folder does not exist.
        ImportError: onnx, onnxscript or onnxruntime is missing ("onnx" only), or openvino, onnx or onnxscript
            ("openvino" only).
        RuntimeError: the file does not run, gives other numbers, or holds float weights; it was not kept.
    """
    path = Path(path)
    _check(model, path, format, external_data, onnx_ops, free_size)
    if isinstance(model, IntegerViT):
        check_one_of("pixels", pixels or "uint8", tuple(INPUTS) if format != "c" else ("uint8",))
        inputs = sample_inputs(model, sample, pixels or "uint8")
        with torch.no_grad(), _in_place(path) as file:
            if format == "c":
                return write_c(model, inputs["pixels"], file)
            with _errors_of_writers(model, format):
                write_integers(model, inputs, file, format, external_data)
            return verify_integers(model, inputs, file, format)
    if pixels is not None:
        raise ValueError(f"pixels={pixels!r} is for integer-only models; a packed one takes what the float model takes")
    with torch.no_grad():
        portable = optimize(model, engine="layers").eval().float()
        for key, hook in list(portable._forward_hooks.items()):
            if hook is tuple_while_tracing:  # the names of the outputs are needed
                del portable._forward_hooks[key]
        inputs = _inputs(portable, sample)
        settings = size_settings(portable) if free_size else {}
        names = _output_names(portable, {**inputs, **settings})
        wrapper = Positional(portable, list(inputs), names, settings).eval()
        shapes = tuple(free_shapes(portable, inputs).values()) if free_size else tuple({0: any_batch()} for _ in inputs)
        others = other_sizes(wrapper, portable, inputs) if free_size else []
        with _in_place(path) as file:
            with _errors_of_writers(model, format), always_resized(portable) if free_size else nullcontext():
                _write(wrapper, inputs, file, format, external_data, onnx_ops, shapes)
            return verify(wrapper, inputs, file, format, others)


@contextmanager
def _in_place(path: Path) -> Iterator[Path]:
    """A file in a new folder beside ``path``; at the end, what lies in there takes its place, or nothing does."""
    with folder_beside(path) as folder:
        file = folder / path.name
        yield file
        move_files(
            sorted(folder.iterdir(), key=lambda written: written == file), path.parent
        )  # what is opened comes last


@contextmanager
def _errors_of_writers(model: nn.Module, format: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # exporters raise nearly anything, and long texts
        raise RuntimeError(
            f"torch {torch.__version__} cannot write {type(model).__name__} as {format!r}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    """The first sentence of the innermost cause."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _check(
    model: nn.Module, path: Path, format: str, external_data: bool | None, onnx_ops: str, free_size: bool
) -> None:
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
    if free_size and format not in FREE_SIZE:
        raise ValueError(f"free_size is for the formats {', '.join(map(repr, FREE_SIZE))}, got {format!r}")
    if free_size and torch.__version__ < OLDEST_FREE_SIZE:
        raise ValueError(
            f"free_size needs torch {OLDEST_FREE_SIZE} or later, whose exporter can; got {torch.__version__}"
        )
    if free_size and isinstance(model, IntegerViT):
        raise ValueError("free_size is not for integer-only models: their position embeddings are of one size")
    if not any(isinstance(module, PackedLinear | IntegerLinear) for module in model.modules()):
        raise ValueError(
            "nothing in the model is packed; pass what ViTQuantizer(...).quantize_model(model) returned with "
            "execution='packed'"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(
                f"the model is on {tensor.device} ({name}); export a copy of it: copy.deepcopy(model).to('cpu')"
            )
    signatures = (inspect.signature(type(module).forward).parameters for module in model.modules())
    if any({"pixel_values", "spatial_shapes"} <= names.keys() for names in signatures):
        raise ValueError(
            f"{type(model).__name__} resizes its position embeddings to each picture's shape, one by one, and no file "
            "for any batch size can"
        )
    if format == "c" and not isinstance(model, IntegerViT):
        raise ValueError(f"format 'c' is for integer-only models, arithmetic='integer', not {type(model).__name__}")
    functions = model.blocks[0].attention.functions if isinstance(model, IntegerViT) else "default"  # type: ignore[union-attr]
    if format == "openvino" and isinstance(model, IntegerViT):
        raise ValueError(
            "OpenVINO multiplies wide integers in float32, so format 'openvino' has no integer-only models; onnx, "
            "torchscript, torch_export and c have"
        )
    if format in ("onnx", "c") and functions != "default":
        raise ValueError(f"format {format!r} has no functions={functions!r}; torchscript and torch_export have")
    for package in PACKAGES.get(format, ()):
        if package == "onnxscript" and isinstance(model, IntegerViT):
            continue
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f'exporting to {NAMES[format]} needs {package}: pip install -e ".[{format}]"') from error


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


def _output_names(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    return list(tensors_in(call(model, inputs)))


def _write(
    wrapper: Positional,
    inputs: dict[str, Tensor],
    file: Path,
    format: str,
    external: bool | None,
    ops: str,
    free: Sequence[Any],
) -> None:
    """``free``: the free dimensions of each input, as ``torch.export`` takes them."""
    shapes = (tuple(free),)
    if format == "torchscript":
        torch.jit.trace(wrapper, tuple(inputs.values()), check_trace=False).save(str(file))
    elif format == "torch_export":
        torch.export.save(torch.export.export(wrapper, tuple(inputs.values()), dynamic_shapes=shapes), str(file))
    elif format == "openvino":
        write_openvino(onnx_model(wrapper, inputs, wrapper.outputs, shapes, "openvino"), file)
    else:
        proto = onnx_model(wrapper, inputs, wrapper.outputs, shapes, ops)
        save_onnx(proto, file, external)
