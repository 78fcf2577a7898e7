"""convert: a copy of a model whose selected Linear layers are quantized; nothing else swaps a module."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.scalar.modules import EmulatedLinear, QuantizedWeight
from fairseq.modules.quantization.scalar.modules.replace import carry_hooks, obstacle
from fairseq.modules.quantization.scalar.ops import check_tensor
from fairseq.quantization.config import COMPONENTS, LayerConfig, QuantizationConfig
from fairseq.quantization.report import LayerReport, QuantizationReport
from fairseq.quantization.vit_layers import component_of, linear_layers, reads_shared_input

SKIPPED = "skipped by an override"


def convert(model: nn.Module, config: QuantizationConfig) -> tuple[nn.Module, QuantizationReport]:
    """Quantize a deep copy of ``model``: (the copy, what was done). ``model`` stays as it is.

    The float weights that become packed integers are never copied: at its peak, memory holds the float model, the
    quantized one, and what quantizing one layer takes.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it holds no weights (meta device), is quantized already, has none of the known layers, an override
            matches none of them, or a weight is not finite. The message names the layer.
    """
    check_model(model)
    layers = linear_layers(model)
    plan = make_plan(layers, config)
    chosen = {name: layer for name, layer in plan.items() if isinstance(layer, LayerConfig)}
    packed = config.execution == "packed"
    result = copy.deepcopy(model, _without_weights(model, [layers[name] for name in chosen]) if packed else None)
    packed_before: dict[tuple[int, LayerConfig], PackedLinear] = {}
    for name, settings in tqdm(chosen.items(), desc="Quantizing", unit="layer", delay=1, leave=False):
        old = result.get_submodule(name)
        new = _pack(layers[name], settings, name, packed_before) if packed else _emulate(old, settings, name)
        carry_hooks(old, new)
        for alias in _names_of(result, old):
            result.set_submodule(alias, new)
    result.register_forward_hook(tuple_while_tracing)
    if packed and hasattr(result, "save_pretrained"):
        vars(result)["save_pretrained"] = refuse_save_pretrained
    return result, _make_report(model, result, layers, plan, config.execution)


def dequantize(model: nn.Module) -> nn.Module:
    """A copy of a quantized model with plain float Linear layers again, which hold the rounded weights.

    For tools that know only float models, such as ``save_pretrained``. Activations are no longer rounded.

    Raises:
        TypeError: not a module.
        ValueError: nothing in ``model`` is quantized.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not any(isinstance(module, PackedLinear | EmulatedLinear) for module in model.modules()):
        raise ValueError("nothing in the model is quantized; pass what quantize_model returned")
    result = copy.deepcopy(model)
    plain: dict[int, nn.Parameter] = {}  # by the integers or weight that layers share
    for old in list(result.modules()):
        if not isinstance(old, PackedLinear | EmulatedLinear):
            continue
        dtype = next((p.dtype for p in result.parameters() if p.is_floating_point()), torch.float32)
        weight = old.dequantize() if isinstance(old, PackedLinear) else old.quantized_weight()
        new = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
        shared = id(old.weight_codes if isinstance(old, PackedLinear) else old.weight)
        new.weight = plain.setdefault(shared, nn.Parameter(weight.detach().to(dtype)))
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach().clone())
        carry_hooks(old, new)
        new.train(old.training)
        for alias in _names_of(result, old):
            result.set_submodule(alias, new)
    vars(result).pop("save_pretrained", None)
    return result


def _pack(
    linear: nn.Module, settings: LayerConfig, name: str, before: dict[tuple[int, LayerConfig], PackedLinear]
) -> PackedLinear:
    """The packed layer for a Linear of the float model; a weight that layers share stays shared."""
    assert isinstance(linear, nn.Linear)
    layer = PackedLinear.from_float(linear, settings, name)
    layer.shares_input = reads_shared_input(name)
    first = before.setdefault((id(linear.weight), settings), layer)
    layer.weight_codes, layer.scale, layer.zero_point = first.weight_codes, first.scale, first.zero_point
    return layer


def _emulate(linear: nn.Module, settings: LayerConfig, name: str) -> EmulatedLinear:
    """The trainable layer with the parameters of a Linear of the copy."""
    assert isinstance(linear, nn.Linear)
    return EmulatedLinear.from_linear(
        linear, settings.bits, settings.method, settings.group_size, settings.symmetric, settings.activations, name
    )


def _without_weights(model: nn.Module, chosen: list[nn.Module]) -> dict[int, Any]:
    """A memo for deepcopy that leaves out the weights of the ``chosen`` layers, unless another module uses them."""
    kept = {id(p) for module in model.modules() if module not in chosen for p in module._parameters.values()}
    weights = [w for layer in chosen if isinstance(w := layer.weight, nn.Parameter) and id(w) not in kept]
    return {id(w): nn.Parameter(w.new_empty(0), requires_grad=w.requires_grad) for w in weights}


def check_model(model: nn.Module) -> None:
    """Raise unless ``model`` is a module with weights that no house layer has quantized yet."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, such as a ViTForImageClassification; got {type(model).__name__}"
        )
    done = [name for name, module in model.named_modules() if isinstance(module, PackedLinear | QuantizedWeight)]
    if done:
        raise ValueError(
            f"the model is quantized already: {len(done)} layers, {done[0]!r} the first; pass the float model"
        )
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise ValueError(f"the model is on the meta device and holds no weights ({meta[0]!r}); load them first")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel():
            check_tensor(parameter, name)


def make_plan(layers: dict[str, nn.Module], config: QuantizationConfig) -> dict[str, LayerConfig | str]:
    """For each Linear by name, its settings, or in words why it stays in float."""
    components = {name: component_of(name) for name in layers}
    found = set(components.values())
    missing = [c for c in ("attention", "mlp") if config.selects(c) and c not in found]
    if missing or not found & set(COMPONENTS):
        seen = ", ".join(layers) if len(layers) <= 8 else f"{', '.join(list(layers)[:8])}, ... ({len(layers)} in all)"
        raise ValueError(
            f"found no {' and no '.join(missing or COMPONENTS)} layer of a HuggingFace ViT in this model; "
            + (f"its Linear layers are {seen}" if layers else "it has no Linear layer")
        )
    plan = {name: _decide(name, layers[name], component, config) for name, component in components.items()}
    selected = [name for name, decision in plan.items() if isinstance(decision, LayerConfig)]
    candidates = [name for name, decision in plan.items() if name in selected or decision == SKIPPED]
    if not candidates:
        reasons = "; ".join(sorted({str(decision) for decision in plan.values()}))
        raise ValueError(f"no layer is left to quantize: {reasons}")
    unmatched = config.unmatched_overrides(candidates)
    if unmatched:
        raise ValueError(
            f"override {unmatched[0]!r} matches no selected layer; there are {', '.join(candidates[:8])}, ..."
        )
    sampled = config.sample(selected)
    return {
        name: f"not among the share p={config.p}" if name in selected and name not in sampled else decision
        for name, decision in plan.items()
    }


def _decide(name: str, layer: nn.Module, component: str | None, config: QuantizationConfig) -> LayerConfig | str:
    """The settings of one layer, or why it stays in float, before the share ``p`` is drawn."""
    if component is None:
        return "not an attention, MLP or classifier layer"
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}, not a plain nn.Linear"
    if not config.selects(component):
        return f"quantize_{component}=False"
    settings = config.for_layer(name)
    return SKIPPED if settings.skip else obstacle(layer) or settings


def tuple_while_tracing(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: HuggingFace's outputs are dictionaries, which torch.jit.trace refuses; give it a tuple."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return output.to_tuple() if tracing and hasattr(output, "to_tuple") else output


def refuse_save_pretrained(*args: Any, **keywords: Any) -> None:
    """``save_pretrained`` of a packed model: an error, since ``from_pretrained`` would fill it with random weights."""
    raise RuntimeError(
        "from_pretrained cannot load packed integers; save them with torch.save(model.state_dict(), file), or a float "
        "model with the rounded weights with ViTQuantizer.dequantize_model(model).save_pretrained(folder)"
    )


def _names_of(model: nn.Module, module: nn.Module) -> list[str]:
    return [name for name, other in model.named_modules(remove_duplicate=False) if other is module]


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _make_report(
    model: nn.Module,
    result: nn.Module,
    layers: dict[str, nn.Module],
    plan: dict[str, LayerConfig | str],
    execution: str,
) -> QuantizationReport:
    records = []
    for name, decision in plan.items():
        linear, done = layers[name], result.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        record = LayerReport(name, component_of(name), (linear.out_features, linear.in_features), _bytes(linear), 0)
        record = replace(record, bytes_after=_bytes(done))
        if isinstance(decision, LayerConfig):
            records.append(replace(record, bits=decision.bits, method=decision.method))
        else:
            records.append(replace(record, skipped=decision))
    return QuantizationReport(tuple(records), _bytes(model), _bytes(result), execution)
