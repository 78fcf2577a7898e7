"""Integer-only models as files: written, searched for floats, and run elsewhere, where no integer may differ."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq.modules.quantization.integer.no_float import FloatingOperation, NoFloat
from fairseq.quantization.export.export_report import ExportReport
from fairseq.quantization.export.integer_check import not_integers
from fairseq.quantization.export.integer_graph import INPUTS, integer_model, output_names
from fairseq.quantization.export.verify import INTEGER_OPS, run_elsewhere, tensors_of
from fairseq.quantization.export.written import any_batch, save_onnx
from fairseq.quantization.integer_only.model import PIXELS, IntegerOutputs, IntegerViT

NOISE = 3
"""Pictures of noise that a file is also verified on."""


def sample_inputs(model: IntegerViT, sample: Any, pixels: str) -> dict[str, Tensor]:
    """What a file is called with, at least two pictures, by the name of its input.

    Args:
        sample: what a processor returned, pixel values, or uint8 the pixels themselves; None for noise.
        pixels: "uint8" or "float32".
    """
    if isinstance(sample, Mapping):
        sample = sample.get("pixel_values")
    if sample is None:
        sample = noise(model, 2)
    rounded = model.round_pixels(sample)  # what is wrong with it is said there
    if pixels == "uint8":
        sample = rounded
    elif sample.dtype == torch.uint8:
        sample = values_of(model, sample)
    sample = sample.detach().cpu()
    sample = sample if pixels == "uint8" else sample.float()
    return {INPUTS[pixels]: torch.cat([sample, sample]) if len(sample) == 1 else sample}


def noise(model: IntegerViT, count: int) -> Tensor:
    """uint8 (count, channels, H, W), the same every time; the first picture is black, the second white in part."""
    shape = (count, len(model.pixel_start), *model.size)
    pixels = torch.randint(0, PIXELS, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[0], pixels[1:2, :, : model.size[0] // 2] = 0, PIXELS - 1
    return pixels


def values_of(model: IntegerViT, pixels: Tensor) -> Tensor:
    """Pixels as pixel values, float32."""
    start, step = (t[:, None, None] for t in (model.pixel_start, model.pixel_step))
    return (start + step * pixels).float()


def write_integers(
    model: IntegerViT, inputs: dict[str, Tensor], file: Path, format: str, external: bool | None
) -> None:
    """Write a file; ``inputs`` are those of :func:`sample_inputs`."""
    wrapper, (name, x) = IntegerOutputs(model).eval(), next(iter(inputs.items()))
    if format == "torchscript":
        torch.jit.trace(wrapper, (x,), check_trace=False).save(str(file))
    elif format == "torch_export":
        torch.export.save(torch.export.export(wrapper, (x,), dynamic_shapes=({0: any_batch()},)), str(file))
    else:
        proto = integer_model(model, next(kind for kind, known in INPUTS.items() if known == name))
        save_onnx(proto, file, external)


def verify_integers(model: IntegerViT, inputs: dict[str, Tensor], file: Path, format: str) -> ExportReport:
    """Look for floats in an exported file, and run it by itself.

    Args:
        model: that was exported.
        inputs: of :func:`sample_inputs`.
        file: alone in its folder, but for external data; the report names it as if it lay one folder higher.
        format: "onnx", "torchscript" or "torch_export".

    Raises:
        RuntimeError: something in it is not of integers, it does not run, or one integer is another than the model's.
    """
    name, x = next(iter(inputs.items()))
    floats = _floats(file, format, x[:1], rounds=name == INPUTS["float32"])
    if floats:
        raise RuntimeError(f"the exported file is not of integers alone: {floats}")
    more = noise(model, NOISE)
    batches = [{name: x}, {name: x[:1]}, {name: more if x.dtype == torch.uint8 else values_of(model, more)}]
    for batch, found in zip(batches, run_elsewhere(format, file, batches)):
        expected = model.integer_outputs(model.round_pixels(batch[name])).values()
        for output, got, wanted in zip(output_names(model), found, expected, strict=True):
            if got.dtype != wanted.dtype or not torch.equal(got, wanted):
                raise RuntimeError(
                    f"{output} of the exported file, {got.dtype} of shape {tuple(got.shape)}, are not those of the "
                    "model"
                )
    return report_of(model, file, format)


def report_of(model: IntegerViT, file: Path, format: str) -> ExportReport:
    """What lies in the folder of ``file``, named as if it lay one folder higher, and found equal to the model."""
    integers, floats, operators = tensors_of(format, file)
    weights = [size for name, (_, _, size) in integers.items() if name.endswith((".weight", ".weight_codes"))]
    files = sorted(file.parent.iterdir(), key=lambda written: written != file)
    return ExportReport(
        format, tuple(str(file.parent.parent / f.name) for f in files), sum(f.stat().st_size for f in files),
        len(weights), sum(weights), sum(t.nbytes for t in floats.values()),
        {name: operators[name] for name in INTEGER_OPS if operators[name]}, output_names(model), 0.0, 0.0, 0.0, 1.0,
    )  # fmt: skip


def _floats(file: Path, format: str, x: Tensor, rounds: bool) -> str:
    """What is not of integers in a file, in words."""
    if format == "onnx":
        model = importlib.import_module("onnx").load(str(file), load_external_data=False)
        return "; ".join(not_integers(model, INPUTS["uint8"] if rounds else None)[:3])
    if rounds:
        return ""
    loaded = torch.jit.load(str(file)) if format == "torchscript" else torch.export.load(str(file)).module()
    with contextlib.suppress(RuntimeError), torch.no_grad(), _Remembering() as seen:
        loaded(x)
    return seen.first


class _Remembering(NoFloat):
    """What it saw first: TorchScript makes another error, of many lines, of the one that is raised."""

    first = ""

    def __torch_dispatch__(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            return super().__torch_dispatch__(*arguments, **keywords)
        except FloatingOperation as error:
            self.first = self.first or str(error)
            raise
