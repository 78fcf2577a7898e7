"""Packing the embeddings of a model, in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.patches import PackedPatchEmbedding, unfold
from fairseq.modules.quantization.packed.table import PackedEmbedding, PackedTable, install_table
from fairseq.modules.quantization.scalar.modules.replace import carry_hooks, names_of
from fairseq.quantization.architectures.forward import Pixels
from fairseq.quantization.calibration import processes
from fairseq.quantization.calibration.statistics import BATCH_SIZE, collect
from fairseq.quantization.config import MAKE_UP_FOR_DRIFT, LayerConfig, resolve_rounding
from fairseq.quantization.conversion.quantize_layer import quantize_layer
from fairseq.quantization.evaluation.report import LayerReport
from fairseq.quantization.rounding.statistics import Statistics


def pack_embeddings(
    model: nn.Module, embeddings: Mapping[str, LayerConfig | str], pixel_values: Pixels | None
) -> list[LayerReport]:
    """Pack embeddings in place; patches are rounded by GPTQ where there are pictures, (N, C, H, W)."""
    return [_pack(model, name, decision, pixel_values) for name, decision in embeddings.items()]


def _pack(model: nn.Module, name: str, decision: LayerConfig | str, pixel_values: Pixels | None) -> LayerReport:
    owner_name, _, last = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    part = getattr(owner, last)
    weight = part if isinstance(part, nn.Parameter) else part.weight
    matrix = weight.detach().flatten(1) if isinstance(part, nn.Conv2d) else weight.detach().flatten(0, -2)
    before = _bytes(part)
    rows, columns = matrix.shape
    record = LayerReport(name, "embeddings", (rows, columns), before, before)
    if isinstance(decision, str):
        return replace(record, skipped=decision)
    new: PackedPatchEmbedding | PackedTable
    if isinstance(part, nn.Conv2d):
        new, notes = _patches(part, matrix, name, decision, pixel_values)
        _swap(model, part, new)
    else:
        done = quantize_layer(matrix, None, None, decision, name)
        place = (rows, columns, decision, name, weight.device, weight.dtype)
        if isinstance(part, nn.Embedding):
            new = PackedEmbedding(*place, part.padding_idx).train(part.training)
            _swap(model, part, new)
        else:
            new = PackedTable(*place)
            install_table(owner, last, new)
        new.set_integers(*done[:3])
        notes = done.record
    return replace(record, bytes_after=_bytes(new), bits=decision.bits, method=decision.method, **notes)


def _patches(
    conv: nn.Conv2d, weight: Tensor, name: str, settings: LayerConfig, pixel_values: Pixels | None
) -> tuple[PackedPatchEmbedding, dict[str, Any]]:
    """The packed twin of a convolution, and what the report says of it."""
    note = None
    if settings.activations == "static":
        settings = replace(settings, activations="dynamic")
        note = "dynamic instead of static: patches are rounded one by one"
    statistics = None if pixel_values is None else _statistics(conv, name, pixel_values)
    if resolve_rounding(settings.rounding, statistics is not None, settings.bits, settings.method) in MAKE_UP_FOR_DRIFT:
        settings = replace(settings, rounding="gptq")  # no layer comes before that could err
    done = quantize_layer(weight, conv.bias, statistics, settings, name)
    linear = PackedLinear.from_integers(*done[:4], done.settings, f"{name}.linear").train(conv.training)
    return PackedPatchEmbedding.from_conv(conv, linear, name), {**done.record, "note": note}


def _statistics(conv: nn.Conv2d, name: str, pixel_values: Pixels) -> Statistics:
    """Of the patches, every one with the same weight."""
    size = (conv.kernel_size[0], conv.kernel_size[1])
    own = processes.share(len(pixel_values))
    pictures = (pixel_values[i : min(i + BATCH_SIZE, own.stop)] for i in range(own.start, own.stop, BATCH_SIZE))
    batches = (unfold(x.to(conv.weight.device, conv.weight.dtype), size).flatten(0, -2) for x in pictures)
    return collect(batches, [torch.empty(0)], [name])[0]


def _swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    carry_hooks(old, new)
    for alias in names_of(model, old):
        model.set_submodule(alias, new)


def _bytes(part: nn.Module | nn.Parameter) -> int:
    tensors = [part] if isinstance(part, nn.Parameter) else [*part.parameters(), *part.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)
