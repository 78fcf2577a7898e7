"""Embeddings of a whole model: which there are, and packing them in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.patches import PackedPatchEmbedding, reason_not_packable, unfold
from fairseq.modules.quantization.packed.table import PackedEmbedding, pack_parameter
from fairseq.modules.quantization.scalar.modules.replace import carry_hooks, names_of, reason_not_quantizable
from fairseq.modules.quantization.scalar.weights import weight_to_real
from fairseq.quantization.architectures.layers import Family, embedding_kind, tower_of
from fairseq.quantization.architectures.plan import SKIPPED
from fairseq.quantization.calibration.stream import BATCH_SIZE, collect
from fairseq.quantization.config import LayerConfig, QuantizationConfig, resolve_rounding
from fairseq.quantization.evaluation.report import LayerReport
from fairseq.quantization.rounding.gptq import Statistics, round_weight
from fairseq.quantization.rounding.quality import decibels, weight_statistics

TABLE = LayerConfig(bits=8, method="channel", activations=None)
"""How position embeddings are held: they are few, and every token reads them."""


def find_embeddings(model: nn.Module, family: Family, config: QuantizationConfig) -> dict[str, LayerConfig | str]:
    """For each embedding by name, module or parameter, its settings or why it stays; {} unless they are asked for.

    Raises:
        ValueError: they are asked for and there is none.
    """
    if not config.quantize_embeddings:
        return {}
    found: dict[str, LayerConfig | str] = {}
    tables = {name: p for name, p in model.named_parameters() if p.ndim == 3}
    for name, part in (*model.named_modules(), *tables.items()):
        kind = embedding_kind(name, family)
        wanted = nn.Conv2d if kind == "patches" else (nn.Embedding, nn.Parameter)
        if kind is not None and isinstance(part, wanted) and config.selects_tower(tower_of(name, family)):
            found[name] = _decide(name, part, config)
    if not found:
        raise ValueError(
            f"quantize_embeddings=True, and this model ({family.name}) has no patch embedding and no position "
            "embeddings that are known; leave it at False"
        )
    return found


def _decide(name: str, part: nn.Module | nn.Parameter, config: QuantizationConfig) -> LayerConfig | str:
    settings = config.for_layer(name)
    if settings.skip:
        return SKIPPED
    if isinstance(part, nn.Parameter):
        return TABLE if len(part) == 1 else f"its shape {tuple(part.shape)} is not (1, rows, columns)"
    if reason := reason_not_quantizable(part):
        return reason
    if isinstance(part, nn.Conv2d):
        return reason_not_packable(part) or settings
    return TABLE


def pack_embeddings(
    model: nn.Module, embeddings: Mapping[str, LayerConfig | str], pixel_values: Tensor | None
) -> list[LayerReport]:
    """Pack embeddings in place; patches are rounded by GPTQ where there are pictures, (N, C, H, W)."""
    return [_pack(model, name, decision, pixel_values) for name, decision in embeddings.items()]


def _pack(model: nn.Module, name: str, decision: LayerConfig | str, pixel_values: Tensor | None) -> LayerReport:
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
    if isinstance(part, nn.Conv2d):
        new, notes = _patches(part, matrix, name, decision, pixel_values)
        _swap(model, part, new)
        return replace(record, bytes_after=_bytes(new), bits=decision.bits, method=decision.method, **notes)
    table: nn.Module
    if isinstance(part, nn.Embedding):
        table = PackedEmbedding.from_float(part, decision, name)
        real = table.read()
        _swap(model, part, table)
    else:
        table = pack_parameter(owner, last, decision, name)
        real = table.read()
    measures: dict[str, Any] = weight_statistics(matrix, real.to(matrix.dtype), per_tensor=False)
    return replace(
        record, bytes_after=_bytes(table), bits=decision.bits, method=decision.method, rounding="nearest", **measures
    )


def _patches(
    conv: nn.Conv2d, weight: Tensor, name: str, settings: LayerConfig, pixel_values: Tensor | None
) -> tuple[PackedPatchEmbedding, dict[str, Any]]:
    """The packed twin of a convolution, and what the report says of it."""
    notes: dict[str, Any] = {}
    if settings.activations == "static":
        settings = replace(settings, activations="dynamic")
        notes["note"] = "dynamic instead of static: patches are rounded one by one"
    statistics = None if pixel_values is None else _statistics(conv, name, pixel_values)
    rounding = resolve_rounding(settings.rounding, statistics is not None)
    rounding = "gptq" if rounding == "gptaq" else rounding  # no layer comes before that could err
    rounded = round_weight(weight, statistics, settings, rounding, f"{name}.weight")
    real = weight_to_real(*rounded, settings.group_size, dtype=rounded.scale.dtype)
    bias: Tensor | None = conv.bias
    if statistics is not None:
        error = (weight - real).to(statistics.mean.dtype)
        notes["output_sqnr"] = decibels(_energy(weight.to(error.dtype), statistics), _energy(error, statistics))
        if settings.bias_correction and (bias is not None or settings.bias_correction == "add"):
            correction = (error @ statistics.mean).to(weight.dtype)
            bias = correction if bias is None else bias.detach() + correction
    linear = PackedLinear.from_integers(*rounded, bias, settings, f"{name}.linear").train(conv.training)
    measures = weight_statistics(weight, real, per_tensor=settings.method == "tensor")
    notes.update(rounding=rounding, activations=settings.activations, **measures)
    return PackedPatchEmbedding.from_conv(conv, linear, name), notes


def _statistics(conv: nn.Conv2d, name: str, pixel_values: Tensor) -> Statistics:
    """Of the patches, every one with the same weight."""
    size = (conv.kernel_size[0], conv.kernel_size[1])
    batches = (
        unfold(x.to(conv.weight.device, conv.weight.dtype), size).flatten(0, -2) for x in pixel_values.split(BATCH_SIZE)
    )
    return collect(batches, [torch.empty(0)], [name])[0]


def _energy(weight: Tensor, statistics: Statistics) -> float:
    """tr(W H W^T): the mean squared norm of what the layer makes of its inputs."""
    return float(((weight @ statistics.second_moment) * weight).sum())


def _swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    carry_hooks(old, new)
    for alias in names_of(model, old):
        model.set_submodule(alias, new)


def _bytes(part: nn.Module | nn.Parameter) -> int:
    tensors = [part] if isinstance(part, nn.Parameter) else [*part.parameters(), *part.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)
