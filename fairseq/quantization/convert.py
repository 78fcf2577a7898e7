"""convert: a copy of a model whose selected Linear layers are quantized; nothing else swaps a module."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fairseq.modules.quantization.scalar.modules import FakeQuantizedLinear, QuantizedWeight
from fairseq.quantization.config import LayerConfig, QuantizationConfig
from fairseq.quantization.report import LayerReport, QuantizationReport, packed_bytes
from fairseq.quantization.vit_layers import component_of, linear_layers


def convert(model: nn.Module, config: QuantizationConfig) -> tuple[nn.Module, QuantizationReport]:
    """Quantize a deep copy of ``model``: (the copy, what was done). ``model`` stays as it is.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it holds no weights (meta device), is quantized already, has none of the known layers, an override
            matches none of them, or a weight is not finite. The message names the layer.
    """
    check_model(model)
    layers = linear_layers(model)
    plan = make_plan(layers, config)
    result = copy.deepcopy(model)
    copies = dict(result.named_modules())
    chosen = [(name, layer) for name, layer in plan.items() if isinstance(layer, LayerConfig)]
    for name, layer in tqdm(chosen, desc="Quantizing", unit="layer", delay=1, leave=False):
        linear = copies[name]
        quantized = FakeQuantizedLinear.from_float(linear, layer.bits, layer.method, name)
        _carry_hooks(linear, quantized)
        for alias in _names_of(result, linear):
            result.set_submodule(alias, quantized)
    result.register_forward_hook(tuple_while_tracing)
    return result, _make_report(model, result, layers, plan)


def check_model(model: nn.Module) -> None:
    """Raise unless ``model`` is a module with weights that no house layer has quantized yet."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, such as a ViTForImageClassification; got {type(model).__name__}"
        )
    done = [name for name, module in model.named_modules() if isinstance(module, FakeQuantizedLinear | QuantizedWeight)]
    if done:
        raise ValueError(
            f"the model is quantized already: {len(done)} layers, {done[0]!r} the first; pass the float model"
        )
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise ValueError(f"the model is on the meta device and holds no weights ({meta[0]!r}); load them first")


def make_plan(layers: dict[str, nn.Module], config: QuantizationConfig) -> dict[str, LayerConfig | str]:
    """For each Linear by name, its settings, or in words why it stays in float."""
    components = {name: component_of(name) for name in layers}
    if not any(components.values()):
        seen = ", ".join(layers) if len(layers) <= 8 else f"{', '.join(list(layers)[:8])}, ... ({len(layers)} in all)"
        raise ValueError(
            "found no attention, MLP or classifier layer of a HuggingFace ViT in this model; "
            + (f"its Linear layers are {seen}" if layers else "it has no Linear layer")
        )
    plan: dict[str, LayerConfig | str] = {}
    for name, component in components.items():
        settings = config.for_layer(name)
        if component is None:
            plan[name] = "not an attention, MLP or classifier layer"
        elif type(layers[name]) is not nn.Linear:
            plan[name] = f"a {type(layers[name]).__name__}, not a plain nn.Linear"
        elif not config.selects(component):
            plan[name] = f"quantize_{component}=False"
        elif settings.skip:
            plan[name] = "skipped by an override"
        else:
            plan[name] = settings
    selected = [name for name, decision in plan.items() if isinstance(decision, LayerConfig)]
    unmatched = config.unmatched_overrides(n for n in plan if n in selected or plan[n] == "skipped by an override")
    if unmatched:
        raise ValueError(
            f"override {unmatched[0]!r} matches no selected layer; there are {', '.join(selected[:8])}, ..."
        )
    sampled = config.sample(selected)
    return {
        n: f"not among the share p={config.p}" if n in selected and n not in sampled else d for n, d in plan.items()
    }


def tuple_while_tracing(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: HuggingFace's outputs are dictionaries, which torch.jit.trace refuses; give it a tuple."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return output.to_tuple() if tracing and hasattr(output, "to_tuple") else output


def _names_of(model: nn.Module, module: nn.Module) -> list[str]:
    return [name for name, other in model.named_modules(remove_duplicate=False) if other is module]


def _carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """The replacement keeps the hooks that its user put on the layer."""
    new.__dict__.update({name: hooks for name, hooks in vars(old).items() if name.endswith("_hooks")})


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _make_report(
    model: nn.Module, result: nn.Module, layers: dict[str, nn.Module], plan: dict[str, LayerConfig | str]
) -> QuantizationReport:
    records = []
    for name, decision in plan.items():
        linear, done = layers[name], result.get_submodule(name)
        common: dict[str, Any] = {
            "name": name, "component": component_of(name), "shape": (linear.out_features, linear.in_features),
            "bytes_before": _bytes(linear),
        }  # fmt: skip
        if isinstance(done, FakeQuantizedLinear):
            after = packed_bytes(common["shape"], done.bits, done.scale.numel())
            after += 0 if done.bias is None else done.bias.numel() * done.bias.element_size()
            records.append(LayerReport(**common, bytes_after=after, bits=done.bits, method=done.method))
        else:
            records.append(LayerReport(**common, bytes_after=_bytes(linear), skipped=str(decision)))
    before, saved = _bytes(model), sum(r.bytes_before - r.bytes_after for r in records)
    return QuantizationReport(tuple(records), before, before - saved, _bytes(result))
