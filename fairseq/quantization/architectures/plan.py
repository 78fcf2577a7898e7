"""What is going to be quantized: which layers, with which settings, in which order; and what is refused beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.scalar.modules import QuantizedWeight
from fairseq.modules.quantization.scalar.modules.replace import reason_not_quantizable
from fairseq.modules.quantization.scalar.ops import check_tensor
from fairseq.quantization.architectures.layers import VIT, Family, block_of, component_of, kept_reason, tower_of
from fairseq.quantization.config import COMPONENTS, LayerConfig, QuantizationConfig

SKIPPED = "skipped by an override"


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


def make_plan(
    layers: dict[str, nn.Module], config: QuantizationConfig, family: Family = VIT, others: Iterable[str] = ()
) -> dict[str, LayerConfig | str]:
    """For each Linear by name, its settings, or in words why it stays in float.

    Args:
        layers: every Linear of the model, by name.
        config: what to do.
        family: which of them is what.
        others: names that an override may match, too: of embeddings.
    """
    _check_towers(layers, config, family)
    components = {name: component_of(name, family) for name in layers}
    found = {c for name, c in components.items() if config.selects_tower(tower_of(name, family))}
    missing = [c for c in ("attention", "mlp") if config.selects(c) and c not in found]
    if missing or not found & set(COMPONENTS):
        seen = ", ".join(layers) if len(layers) <= 8 else f"{', '.join(list(layers)[:8])}, ... ({len(layers)} in all)"
        raise ValueError(
            f"found no {' and no '.join(missing or COMPONENTS)} layer of a HuggingFace ViT in this model; "
            + (f"its Linear layers are {seen}" if layers else "it has no Linear layer")
        )
    plan = {name: _decide(name, layers[name], component, config, family) for name, component in components.items()}
    selected = [name for name, decision in plan.items() if isinstance(decision, LayerConfig)]
    candidates = [name for name, decision in plan.items() if name in selected or decision == SKIPPED]
    candidates += others
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


def _check_towers(layers: dict[str, nn.Module], config: QuantizationConfig, family: Family) -> None:
    """ValueError if the model has not the tower that is asked for."""
    there = {tower_of(name, family) for name in layers}
    if layers and config.towers != "all" and config.towers not in there:
        raise ValueError(
            f"towers={config.towers!r}, but this model ({family.name}) has only a {' and a '.join(sorted(there))} tower"
        )


def _decide(
    name: str, layer: nn.Module, component: str | None, config: QuantizationConfig, family: Family
) -> LayerConfig | str:
    """The settings of one layer, or why it stays in float, before the share ``p`` is drawn."""
    kept, tower = kept_reason(name, family), tower_of(name, family)
    if kept is not None:
        return kept
    if component is None:
        return "not an attention, MLP or classifier layer"
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}, not a plain nn.Linear"
    if not config.selects_tower(tower):
        return f"of the {tower} tower, and towers={config.towers!r}"
    if not config.selects(component):
        return f"quantize_{component}=False"
    settings = config.for_layer(name)
    return SKIPPED if settings.skip else reason_not_quantizable(layer) or settings


def check_data_free(chosen: Mapping[str, LayerConfig], why: str | None = None) -> None:
    """ValueError if a layer has a setting that needs calibration images; ``why`` they are of no use to it, if so."""
    for name, settings in chosen.items():
        needs = {
            f"activations={settings.activations!r}": settings.activations == "static",
            f"rounding={settings.rounding!r}": settings.rounding not in ("auto", "nearest"),
            f"bias_correction={settings.bias_correction!r}": settings.bias_correction is not False,
        }
        for setting, needed in needs.items():
            if needed:
                raise ValueError(
                    f"{name}: {setting} needs images; {why or 'call quantize_model(model, calibration=images)'}"
                )


def stages(names: list[str]) -> list[list[str]]:
    """The layers in the order of a forward pass, one list per encoder block and one for what is outside of them."""
    blocks = dict.fromkeys(block_of(name) for name in names)
    return [[n for n in names if block_of(n) == block] for block in sorted(blocks, key=lambda b: b is None)]
