"""convert: a copy of a model whose selected Linear layers are quantized; nothing else swaps a module."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.modules.quantization.scalar.modules.replace import carry_hooks, names_of
from fairseq.modules.quantization.scalar.tokens import fake_quantize_tokens
from fairseq.modules.quantization.scalar.weights import weight_to_real
from fairseq.quantization.architectures.forward import separate_biases
from fairseq.quantization.architectures.layers import (
    Family,
    block_of,
    component_of,
    encoder_blocks,
    family_of,
    linear_layers,
    reads_shared_input,
    role_of,
    tower_of,
    wiring,
)
from fairseq.quantization.architectures.plan import check_data_free, check_model, make_plan, stages
from fairseq.quantization.calibration.stream import Stream, collect, token_weights
from fairseq.quantization.config import LayerConfig, QuantizationConfig, resolve_rounding
from fairseq.quantization.conversion.embeddings import find_embeddings, pack_embeddings
from fairseq.quantization.engine import memory
from fairseq.quantization.engine.fused_block import check_engine, fuse
from fairseq.quantization.evaluation.report import LayerReport, QuantizationReport
from fairseq.quantization.rounding.equalization import equalize, input_factor, rounds_coarsely
from fairseq.quantization.rounding.gptq import Rounded, Statistics, round_weight
from fairseq.quantization.rounding.quality import decibels, weight_statistics

MIN_STATIC_SQNR = 28.0
"""Below it, in dB, one range for all tokens is too coarse (8 bits reach 38 on a Gaussian): the layer stays dynamic."""


def convert(
    model: nn.Module, config: QuantizationConfig, pixel_values: Tensor | None = None, engine: str = "auto"
) -> tuple[nn.Module, QuantizationReport]:
    """Quantize a deep copy of ``model``: (the copy, what was done). ``model`` stays as it is.

    Block by block: equalize it, see what its layers read, round them, swap them. Float weights that become packed
    integers are copied for one block at a time: at its peak, memory holds the float model, the quantized one, a block,
    what rounding one layer takes, and the hidden states of the calibration images.

    Args:
        model: a Vision Transformer.
        config: what to do.
        pixel_values: calibration images, (N, C, H, W), or None.
        engine: "auto", "fused" or "layers", see :mod:`fairseq.quantization.engine.fused_block`.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: ``engine="fused"``, and the native kernels were not built.
        ValueError: it holds no weights (meta device), is quantized already, has none of the known layers, an override
            matches none of them, a weight is not finite, a setting needs calibration images and there are none, or
            ``engine="fused"`` and no block can be. The message names the layer.
    """
    check_engine(engine, config.execution)
    check_model(model)
    model = separate_biases(model)
    layers = linear_layers(model)
    family = family_of(model)
    embeddings = find_embeddings(model, family, config)
    plan = make_plan(layers, config, family, embeddings)
    chosen = {name: layer for name, layer in plan.items() if isinstance(layer, LayerConfig)}
    unseen = {name: layer for name, layer in chosen.items() if tower_of(name, family) == "text"}
    if pixel_values is None:
        check_data_free(chosen)
    else:
        check_data_free(unseen, "pictures do not reach the text tower, which is rounded without calibration")
    packed = config.execution == "packed"
    result = copy.deepcopy(model, _without_weights(model, [layers[name] for name in chosen]) if packed else None)
    work = Conversion(model, result, config, chosen, pixel_values, family)
    with tqdm(total=len(chosen), desc="Quantizing", unit="layer", delay=1, leave=False) as bar:
        for names in stages(list(chosen)):
            for group in work.quantize_stage(names):
                bar.update(len(group))
    packed_embeddings = pack_embeddings(result, embeddings, pixel_values)
    fused_blocks = finish(result, engine if packed else "layers")
    report = make_report(result, plan, Sizes.of(model), work.done, family, config.execution)
    return result, replace(report, layers=(*packed_embeddings, *report.layers), fused_blocks=fused_blocks)


def finish(model: nn.Module, engine: str) -> int:
    """Make a model with quantized layers ready to run, in place; the number of encoder blocks that are fused."""
    model.register_forward_hook(tuple_while_tracing)
    reasons = fuse(model, engine) if engine != "layers" else {}
    memory.release()
    return sum(reason is None for reason in reasons.values())


class Conversion:
    """One model on its way to be quantized: ``result`` has the layers of the stages that are done already swapped.

    ``result`` is a copy of ``model``, or ``model`` itself, whose float weights are then given up one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        result: nn.Module,
        config: QuantizationConfig,
        chosen: dict[str, LayerConfig],
        pixel_values: Tensor | None,
        family: Family,
    ):
        self.result, self.config, self.chosen = result, config, chosen
        self.layers = {name: cast(nn.Linear, model.get_submodule(name)) for name in chosen}
        self.done: dict[str, dict[str, Any]] = {}
        uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
        self.shared = {name for name, layer in self.layers.items() if uses[id(layer.weight)] > 1}
        self.before: dict[tuple[int | str, LayerConfig], PackedLinear] = {}
        self.stream: Stream | None = None
        self.exact: Stream | None = None
        self.rescaled: dict[str, Tensor] = {}
        self.unseen = set(chosen)  # layers that no calibration picture reaches
        if pixel_values is not None:
            blocks = encoder_blocks(model, family)
            self.unseen = {name for name in chosen if tower_of(name, family) == "text"}
            self.weights = token_weights(model, pixel_values, [n for n in chosen if n not in self.unseen], config.seed)
            self.stream = Stream(model, result, pixel_values, blocks)
            if any(resolve_rounding(settings.rounding, calibrated=True) == "gptaq" for settings in chosen.values()):
                self.exact = Stream(model, model, pixel_values, blocks)

    def quantize_stage(self, names: list[str]) -> Iterator[list[str]]:
        """Quantize the layers of one block (or those outside), group by group of layers that read the same tensor."""
        block = block_of(names[0])
        for name in names:
            self._materialize(name)
        if self.stream is not None and block in self.stream.blocks:
            self.stream.advance_to(block)
            if self.exact is not None:
                self.exact.advance_to(block)
        factors = self._equalize(block, set(names) - self.shared) if self.config.equalize else {}
        for group in self._groups(names, factors):
            for name, statistics in zip(group, self._statistics(group, factors.get(group[0])), strict=True):
                self._swap(name, statistics, factors.get(name))
            yield group

    def _groups(self, names: list[str], factors: dict[str, Tensor]) -> list[list[str]]:
        """The layers of a stage, those together that read one tensor, as it is, and round it alike."""

        def key(name: str) -> tuple[object, ...]:
            settings = self.chosen[name]
            alone = name in factors or not reads_shared_input(name)
            return (name,) if alone else (settings.activations, settings.activation_bits)

        return [list(group) for _, group in itertools.groupby(names, key)]

    def _materialize(self, name: str) -> None:
        """Give a copy its float weight, which deepcopy left out."""
        linear = cast(nn.Linear, self.result.get_submodule(name))
        source = self.layers[name].weight
        if linear.weight.shape != source.shape:
            linear.weight = nn.Parameter(source.detach().clone(), requires_grad=source.requires_grad)

    def _equalize(self, block: str | None, names: set[str]) -> dict[str, Tensor]:
        """Rescale a block; the factors by which layers have to multiply their own input, by name."""
        wired = None
        if block is not None and not any(block_of(name) == block for name in self.shared):
            wired = wiring(self.result.get_submodule(block))
        tokens = self._tokens(names)
        fed: set[str] = set()
        if wired is not None:
            roles = {role: name for name in names if (role := role_of(name)) is not None}
            settings = {role: self.chosen[name] for role, name in roles.items()}
            known = {role: tokens[name] for role, name in roles.items() if name in tokens}
            rescaled = equalize(wired, settings, known)
            self.rescaled.update({name: rescaled[role] for role, name in roles.items() if role in rescaled})
            own = {"fc2"} if wired.value_feeds_output else {"fc2", "output"}
            fed = {name for role, name in roles.items() if role not in own}
        factors = {}
        for name in sorted(names - fed):
            linear = cast(nn.Linear, self.result.get_submodule(name))
            factor = input_factor(linear.weight, self.chosen[name], tokens.get(name))
            if factor is not None:
                with torch.no_grad():
                    linear.weight.div_(factor)
                factors[name] = self.rescaled[name] = factor.detach()
        return factors

    def _tokens(self, names: set[str]) -> dict[str, Tensor]:
        """A sample of the inputs of those layers that are going to round them coarsely."""
        if self.stream is None:
            return {}
        found: dict[str, Tensor] = {}
        shared: dict[str | None, Tensor] = {}  # by block: query, key and value read one tensor
        for name in names:
            if name not in self.unseen and rounds_coarsely(self.chosen[name]):
                if not reads_shared_input(name):
                    found[name] = self.stream.sample(name)
                    continue
                if block_of(name) not in shared:
                    shared[block_of(name)] = self.stream.sample(name)
                found[name] = shared[block_of(name)]
        return found

    def _statistics(self, group: list[str], factor: Tensor | None) -> list[Statistics | None]:
        settings = [self.chosen[name] for name in group]
        if self.stream is None or group[0] in self.unseen:
            return [None] * len(group)
        inputs = _scaled(self.stream.inputs(group[0]), factor)
        if rounds_coarsely(settings[0]) and settings[0].activations == "dynamic":
            inputs = (fake_quantize_tokens(x, settings[0].activation_bits) for x in inputs)
        exact = None
        if self.exact is not None and any(resolve_rounding(s.rounding, calibrated=True) == "gptaq" for s in settings):
            exact = _scaled(self.exact.inputs(group[0]), self.rescaled.get(group[0]))
        static = [s.activation_bits for s in settings if s.activations == "static"]
        weights = [self.weights[name] for name in group]
        return list(collect(inputs, weights, group, static[0] if static else None, exact))

    def _swap(self, name: str, statistics: Statistics | None, factor: Tensor | None) -> None:
        """Round one layer and put its quantized twin in its place, wherever the model has it."""
        settings, old = self.chosen[name], cast(nn.Linear, self.result.get_submodule(name))
        note = None if statistics is not None or self.stream is None else "not calibrated: pictures do not reach it"
        if statistics is not None and settings.activations == "static" and statistics.static_sqnr < MIN_STATIC_SQNR:
            settings = replace(settings, activations="dynamic")
            note = f"dynamic instead of static: below {MIN_STATIC_SQNR:.0f} dB with one range for all tokens"
        rounded = round_weight(old.weight, statistics, settings, settings.rounding, f"{name}.weight")
        real = weight_to_real(*rounded, settings.group_size, dtype=rounded.scale.dtype)
        self.done[name] = {
            "rounding": resolve_rounding(settings.rounding, statistics is not None),
            "activations": settings.activations, "note": note,
            **weight_statistics(old.weight.detach(), real, per_tensor=settings.method == "tensor"),
        }  # fmt: skip
        bias = old.bias
        if statistics is not None:
            error = (old.weight.detach() - real).to(statistics.mean.dtype)
            self.done[name]["output_sqnr"] = decibels(
                _energy(old.weight.detach().to(error.dtype), statistics), _energy(error, statistics)
            )
            if settings.bias_correction and (bias is not None or settings.bias_correction == "add"):
                correction = error @ statistics.mean
                if statistics.drift_mean is not None:
                    correction += old.weight.detach().to(error.dtype) @ statistics.drift_mean
                correction = correction.to(old.weight.dtype)
                bias = nn.Parameter(correction if bias is None else bias.detach() + correction)
        static = statistics is not None and settings.activations == "static"
        span = (statistics.low, statistics.high) if static and statistics is not None else None
        if self.config.execution == "packed":
            new: nn.Module = self._pack(name, rounded, bias, settings, span, factor)
        else:
            new = _emulate(old, rounded, bias, settings, name, span, factor)
        carry_hooks(old, new)
        for alias in names_of(self.result, old):
            self.result.set_submodule(alias, new)

    def _pack(
        self,
        name: str,
        rounded: Rounded,
        bias: Tensor | None,
        settings: LayerConfig,
        span: tuple[float, float] | None,
        factor: Tensor | None,
    ) -> PackedLinear:
        """The packed layer; a weight that layers share stays shared, with the integers of the first of them."""
        old = self.layers.pop(name)
        layer = PackedLinear.from_integers(*rounded, bias, settings, name, span, factor).train(old.training)
        layer.shares_input = reads_shared_input(name)
        key = id(old.weight) if name in self.shared else name  # the id of a weight that is given up comes again
        first = self.before.setdefault((key, settings), layer)
        layer.weight_codes, layer.scale, layer.zero_point = first.weight_codes, first.scale, first.zero_point
        return layer


def _emulate(
    linear: nn.Linear,
    rounded: Rounded,
    bias: Tensor | None,
    settings: LayerConfig,
    name: str,
    span: tuple[float, float] | None,
    factor: Tensor | None,
) -> EmulatedLinear:
    """The trainable layer with the parameters of a Linear of the copy, on the grid that rounding chose."""
    linear.bias = cast(nn.Parameter, bias)
    layer = EmulatedLinear.from_linear(
        linear, settings.bits, settings.method, settings.group_size, settings.symmetric, settings.activations, name,
        activation_bits=settings.activation_bits, input_range=span, input_factor=factor,
    )  # fmt: skip
    layer.set_range(rounded.scale, rounded.zero_point)
    if not torch.equal(layer.integers(), rounded.integers):
        with torch.no_grad():
            layer.weight.copy_(weight_to_real(*rounded, settings.group_size))
        layer.set_range(rounded.scale, rounded.zero_point)  # of this weight, too
    return layer


def _scaled(inputs: Iterator[Tensor], factor: Tensor | None) -> Iterator[Tensor]:
    return inputs if factor is None else (x * factor for x in inputs)


def _energy(weight: Tensor, statistics: Statistics) -> float:
    """tr(W H W^T): the mean squared norm of what the layer makes of its inputs."""
    return float(((weight @ statistics.second_moment) * weight).sum())


def _without_weights(model: nn.Module, chosen: list[nn.Module]) -> dict[int, Any]:
    """A memo for deepcopy that leaves out the weights of the ``chosen`` layers, unless another module uses them."""
    kept = {id(p) for module in model.modules() if module not in chosen for p in module._parameters.values()}
    weights = [w for layer in chosen if isinstance(w := layer.weight, nn.Parameter) and id(w) not in kept]
    return {id(w): nn.Parameter(w.new_empty(0), requires_grad=w.requires_grad) for w in weights}


def tuple_while_tracing(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: HuggingFace's outputs are dictionaries, which torch.jit.trace refuses; give it a tuple."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return output.to_tuple() if tracing and hasattr(output, "to_tuple") else output


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


class Sizes(NamedTuple):
    """What a float model takes: shape and bytes of each Linear by name, and the bytes of all parameters and buffers."""

    layers: dict[str, tuple[tuple[int, int], int]]
    total: int

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        layers = cast(dict[str, nn.Linear], linear_layers(model))
        return cls({n: ((x.out_features, x.in_features), _bytes(x)) for n, x in layers.items()}, _bytes(model))


def make_report(
    result: nn.Module,
    plan: dict[str, LayerConfig | str],
    before: Sizes,
    done: Mapping[str, Mapping[str, Any]],
    family: Family,
    execution: str = "packed",
) -> QuantizationReport:
    """What became of each Linear."""
    records = []
    for name, decision in plan.items():
        shape, size = before.layers[name]
        record = LayerReport(name, component_of(name, family), shape, size, _bytes(result.get_submodule(name)))
        if isinstance(decision, LayerConfig):
            records.append(replace(record, bits=decision.bits, method=decision.method, **done[name]))
        else:
            records.append(replace(record, skipped=decision))
    return QuantizationReport(tuple(records), before.total, _bytes(result), execution)
