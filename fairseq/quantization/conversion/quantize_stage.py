"""quantize_stage: the layers of one encoder block, or those outside of blocks, equalized, rounded and swapped."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.modules.quantization.scalar.modules.replace import carry_hooks, names_of
from fairseq.modules.quantization.scalar.tokens import static_qparams
from fairseq.modules.quantization.scalar.weights import weight_to_real
from fairseq.quantization.architectures.blocks import BlockPlan, block_plan, class_of
from fairseq.quantization.architectures.observe import folds
from fairseq.quantization.architectures.plan import LayerPlan, ModelPlan
from fairseq.quantization.calibration.calibration import Calibration
from fairseq.quantization.config import LayerConfig, QuantizationConfig
from fairseq.quantization.conversion.quantize_layer import QuantizedLayer, quantize_layer
from fairseq.quantization.conversion.resume import DoneStage
from fairseq.quantization.engine import memory
from fairseq.quantization.rounding.equalization import equalize, input_factor
from fairseq.quantization.rounding.shrinkage import tried_out
from fairseq.quantization.rounding.statistics import Rounded, Statistics

NOT_REACHED = "not calibrated: pictures do not reach it"


class Tied(NamedTuple):
    """A weight that layers share, rounded once for all that are rounded alike.

    Attributes:
        weight: in float, (out, in), before it was rounded.
        rounded: its integers.
        layer: the first of the quantized layers.
    """

    weight: Tensor
    rounded: Rounded
    layer: PackedLinear | EmulatedLinear


@dataclass(frozen=True)
class Finished:
    """What is done so far.

    Attributes:
        records: by layer, fields of its ``LayerReport``.
        tied: the weights that layers share, by the names of these and how it is rounded.
    """

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    tied: dict[object, Tied] = field(default_factory=dict)


Watch = Callable[[LayerPlan, nn.Linear, Statistics | None, Tensor | None], None]
"""Is told of each layer before it is rounded: the layer in float, of its inputs the statistics and the factor."""


class Factors(NamedTuple):
    """What equalization moved, by layer: (in,) each.

    Attributes:
        own: by which a layer multiplies its input itself.
        all: by which its input is multiplied in comparison with the float model's, in whatever way.
        outputs: by which its output is, (out,).
    """

    own: Mapping[str, Tensor]
    all: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


def quantize_stage(
    model: nn.Module,
    stage: Sequence[LayerPlan],
    plan: ModelPlan,
    config: QuantizationConfig,
    finished: Finished,
    calibration: Calibration | None = None,
    done: DoneStage | None = None,
    keep_weights: bool = False,
    watch: Watch | None = None,
) -> Iterator[LayerPlan]:
    """Quantize one stage of ``model`` in place; yields each layer that is done.

    Args:
        model: its layers of this stage hold their float weights.
        stage: the chosen layers of one block, or those outside of blocks.
        plan, config: of the model.
        finished: is added to.
        calibration: of the model, or None to round without pictures.
        done: an empty one, which is filled.
        keep_weights: ``done`` gets the float weights that are rounded, too.
        watch: is told of each layer.
    """
    if calibration is not None:
        calibration.enter(stage)
    factors = _equalize(model, stage, plan, calibration) if config.equalize else Factors({}, {}, {})
    if done is not None:
        done.parameters |= _rescaled(model, stage, config.execution)
    for group in _groups(stage, factors.own):
        first = group[0].name
        statistics: list[Statistics | None] = [None] * len(group)
        if calibration is not None:
            ends = group == [stage[-1]] and group[0].block is not None and not group[0].tied
            statistics = calibration.statistics(group, factors.own.get(first), factors.all.get(first), ends)
            statistics = [_of_layer(model, x, found, factors) for x, found in zip(group, statistics, strict=True)]
            memory.release()  # what taking them left behind, before rounding takes as much again
        for layer, found in zip(group, statistics, strict=True):
            factor = factors.own.get(layer.name)
            linear = cast(nn.Linear, model.get_submodule(layer.name))
            if watch is not None:
                watch(layer, linear, found, factor)
            if done is not None and keep_weights:
                weight = linear.weight.detach()
                done.weights[layer.name] = weight.clone() if config.execution == "emulated" else weight
            rounded = _round(model, layer, found, finished)
            if calibration is not None and found is None:
                rounded.record["note"] = NOT_REACHED
            _swap(model, layer, rounded, factor, finished, config.execution)
            if done is not None:
                done.layers[layer.name] = rounded, factor
            yield layer


@torch.no_grad()
def restore_stage(
    model: nn.Module, stage: Sequence[LayerPlan], config: QuantizationConfig, finished: Finished, done: DoneStage
) -> Iterator[LayerPlan]:
    """Do with one stage what :func:`quantize_stage` did, of which ``done`` is the result; yields each layer."""
    parameters = dict(model.named_parameters())
    for name, x in done.parameters.items():
        parameters[name].copy_(x)
    for layer in stage:
        rounded, factor = done.layers[layer.name]
        place = model.get_submodule(layer.name).get_parameter("weight").device
        moved = (None if x is None else x.to(place) for x in rounded[:4])
        _swap(
            model, layer, QuantizedLayer(*moved, *rounded[4:]), None if factor is None else factor.to(place), finished,  # type: ignore[arg-type, call-arg]
            config.execution,
        )  # fmt: skip
        yield layer


def _rescaled(model: nn.Module, stage: Sequence[LayerPlan], execution: str) -> dict[str, Tensor]:
    """Copies of the parameters that equalization may change; not of weights that become packed integers."""
    inside = tuple(f"{name}." for name in ({stage[0].block} - {None} or {layer.name for layer in stage}))
    left_out = {f"{layer.name}.weight" for layer in stage} if execution == "packed" else set()
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if name.startswith(inside) and name not in left_out
    }


def _groups(stage: Sequence[LayerPlan], own: Mapping[str, Tensor]) -> list[list[LayerPlan]]:
    """The layers of a stage, those together that read one tensor, as it is, and round it alike."""

    def key(layer: LayerPlan) -> tuple[object, ...]:
        settings = layer.settings
        return (layer.name,) if layer.name in own else (layer.source, settings.activations, settings.activation_bits)

    return [list(group) for _, group in itertools.groupby(stage, key)]


@torch.no_grad()
def _equalize(
    model: nn.Module, stage: Sequence[LayerPlan], plan: ModelPlan, calibration: Calibration | None
) -> Factors:
    """Rescale the layers of a stage whose weights nothing else uses."""
    layers = [layer for layer in stage if not layer.tied]
    samples = {} if calibration is None else calibration.samples(layers)
    moved: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    fed: set[str] = set()
    name = stage[0].block
    if name is not None and name not in plan.tied_blocks:
        block = model.get_submodule(name)
        known = block_plan(block, class_of(type(block)))
        roles = {} if known is None else {known.role(x.name.removeprefix(f"{name}.")): x for x in layers}
        by_role = {role: layer for role, layer in roles.items() if role is not None}
        if known is not None and _gains(by_role.values()) and _may_fold(block, known, plan, name):
            seen = {role: samples[x.name] for role, x in by_role.items() if x.name in samples}
            rescaled = equalize(block, known, {role: x.settings for role, x in by_role.items()}, seen)
            moved |= {x.name: rescaled[role] for role, x in by_role.items() if role in rescaled}
            if known.value_feeds_output and "output" in rescaled and "value" in by_role:
                outputs[by_role["value"].name] = rescaled["output"]
            not_fed = {"fc2"} if known.value_feeds_output else {"fc2", "output"}
            fed = {layer.name for role, layer in by_role.items() if role not in not_fed}
    own = {}
    for layer in sorted(layers, key=lambda layer: layer.name):
        if layer.name in fed:
            continue
        linear = cast(nn.Linear, model.get_submodule(layer.name))
        factor = input_factor(linear.weight, layer.settings, samples.get(layer.name))
        if factor is not None:
            linear.weight.div_(factor)
            own[layer.name] = moved[layer.name] = factor.detach()
    return Factors(own, moved, outputs)


def _of_layer(model: nn.Module, layer: LayerPlan, found: Statistics | None, factors: Factors) -> Statistics | None:
    """What pictures tell of a layer as it is now; how much its weight makes up for is one number at every width."""
    if found is None:
        return None
    if found.outputs is not None and layer.name in factors.outputs:
        found = found._replace(outputs=found.outputs.rescaled(factors.outputs[layer.name]))
    return tried_out(model.get_submodule(layer.name).get_parameter("weight"), found)


def _round(model: nn.Module, layer: LayerPlan, statistics: Statistics | None, finished: Finished) -> QuantizedLayer:
    """Round one layer; of a weight that layers share, the integers that there are already."""
    linear = cast(nn.Linear, model.get_submodule(layer.name))
    tied = finished.tied.get(_tie(layer)) if layer.tied else None
    weight = linear.weight.detach() if tied is None else tied.weight
    return quantize_layer(weight, linear.bias, statistics, layer.settings, layer.name, tied and tied.rounded)


def _swap(
    model: nn.Module,
    layer: LayerPlan,
    done: QuantizedLayer,
    factor: Tensor | None,
    finished: Finished,
    execution: str,
) -> None:
    """Put the quantized twin of a layer in its place, wherever the model has it."""
    old = cast(nn.Linear, model.get_submodule(layer.name))
    tied = finished.tied.get(_tie(layer)) if layer.tied else None
    weight = old.weight.detach().clone() if layer.tied and tied is None else old.weight
    twin = packed_twin if execution == "packed" else _emulated
    new = twin(old, done, layer, factor, tied and tied.layer)
    if layer.tied:
        finished.tied.setdefault(_tie(layer), Tied(weight, Rounded(*done[:3]), new))
    carry_hooks(old, new)
    for alias in names_of(model, old):
        model.set_submodule(alias, new)
    finished.records[layer.name] = done.record


def replace_layer(
    model: nn.Module, layer: LayerPlan, done: QuantizedLayer, factor: Tensor | None, real: Tensor | None = None
) -> None:
    """Put another layer with other integers, scales and bias in the place of one that is quantized already.

    Args:
        model: whose layer it is.
        layer: shares its weight with no other.
        done, factor: of the new one.
        real: the weight before it is rounded, (out, in), which an emulated layer holds where it gives these integers;
            elsewhere it holds what they stand for.
    """
    old = model.get_submodule(layer.name)
    new: PackedLinear | EmulatedLinear
    if isinstance(old, EmulatedLinear):
        new = copy.deepcopy(old)
        with torch.no_grad():
            if done.bias is not None and new.bias is not None:
                new.bias.copy_(done.bias)
            if real is not None:
                new.weight.copy_(real)
                new.set_range(done.scale, done.zero_point)
                on_grid = weight_to_real(*done[:3], done.settings.group_size).to(new.weight.dtype)
                new.weight.copy_(torch.where(new.integers() == done.integers, new.weight, on_grid))
        static = static_qparams(done.settings.activations, done.input_range, done.settings.activation_bits, layer.name)
        for key, value in zip(("input_scale", "input_zero_point"), static, strict=True):
            new.register_buffer(key, None if value is None else value.to(new.weight.device))
        _set_integers(new, done)
    else:
        new = packed_twin(cast(nn.Linear, old), done, layer, factor)
    carry_hooks(old, new)
    for alias in names_of(model, old):
        model.set_submodule(alias, new)


def _tie(layer: LayerPlan) -> object:
    """Names a weight that layers share, and how it is rounded."""
    return layer.tied, _of_the_weight(layer.settings)


def packed_twin(
    old: nn.Linear, done: QuantizedLayer, layer: LayerPlan, factor: Tensor | None, tied: nn.Module | None = None
) -> PackedLinear:
    """The packed twin of a layer; integers that layers share are in memory once."""
    new = PackedLinear.from_integers(*done[:4], done.settings, layer.name, done.input_range, factor)
    if isinstance(tied, PackedLinear):
        new.weight_codes, new.scale, new.zero_point = tied.weight_codes, tied.scale, tied.zero_point
    return new.train(old.training)


def _emulated(
    old: nn.Linear, done: QuantizedLayer, layer: LayerPlan, factor: Tensor | None, tied: nn.Module | None
) -> EmulatedLinear:
    """The trainable twin with the parameters of a layer of the copy, on the grid that rounding chose.

    Layers that are rounded alike go on sharing a weight. Where rounding changes it, they get one of their own, so that
    what is not quantized keeps the weight as it was.
    """
    settings = done.settings
    if done.bias is not None and (old.bias is None or not torch.equal(done.bias, old.bias)):
        old.bias = nn.Parameter(done.bias)
    if isinstance(tied, EmulatedLinear):
        old.weight = cast(nn.Parameter, tied.weight)
    new = EmulatedLinear.from_linear(
        old, settings.bits, settings.method, settings.group_size, settings.symmetric, settings.activations,
        layer.name, activation_bits=settings.activation_bits, input_range=done.input_range, input_factor=factor,
    )  # fmt: skip
    _set_integers(new, done, shared=bool(layer.tied))
    return new


def _set_integers(layer: EmulatedLinear, done: QuantizedLayer, shared: bool = False) -> None:
    """Put a layer on a grid, and its weight, if it is rounded to other integers there, on the points of the grid."""
    layer.set_range(done.scale, done.zero_point)
    if torch.equal(layer.integers(), done.integers):
        return
    real = weight_to_real(*done[:3], done.settings.group_size).to(layer.weight.dtype)
    if shared:  # what is not quantized keeps the weight as it was
        layer.weight = nn.Parameter(real, requires_grad=layer.weight.requires_grad)
    else:
        with torch.no_grad():
            layer.weight.copy_(real)
    layer.set_range(done.scale, done.zero_point)  # of this weight, too


def _of_the_weight(settings: LayerConfig) -> tuple[object, ...]:
    """The settings that decide a weight's integers."""
    return settings.bits, settings.method, settings.group_size, settings.symmetric, settings.rounding


def _may_fold(block: nn.Module, known: BlockPlan, plan: ModelPlan, name: str) -> bool:
    """Whether nothing but the block's own layers reads what equalization rescales, as far as running shows."""
    seen = plan.observed
    return not any(f"{name}.{norm}" in seen.repeated for norm in known.norms) and folds(
        block, known, seen.calls.get(name)
    )


def _gains(layers: Any) -> bool:
    return any(layer.settings.method == "tensor" or layer.settings.rounds_coarsely for layer in layers)
