"""ModelPlan: what a model is and what becomes of each part, resolved once; everything downstream takes it from here."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.scalar.modules import QuantizedWeight
from fairseq.modules.quantization.scalar.modules.replace import reason_not_quantizable
from fairseq.modules.quantization.scalar.ops import check_tensor
from fairseq.quantization.architectures.copies import check_forwards
from fairseq.quantization.architectures.embeddings import find_embeddings
from fairseq.quantization.architectures.families import Family, component_of, kept_reason, tower_of
from fairseq.quantization.architectures.forward import Pixels
from fairseq.quantization.architectures.layers import block_of, linear_layers, tied_blocks, tied_layers
from fairseq.quantization.architectures.observe import NOTHING, Observation, observe
from fairseq.quantization.architectures.recognition import family_of
from fairseq.quantization.config import COMPONENTS, LayerConfig, QuantizationConfig

UNCALLED = "no forward pass on pictures calls it; the model may multiply by its weight itself"


@dataclass(frozen=True)
class LayerPlan:
    """What one Linear of a model is, and what becomes of it.

    Attributes:
        name: its full name in the model; the first, if it has several.
        component: "attention", "mlp", "classifier", or None.
        tower: "vision" or "text".
        block: the name of the encoder block that holds it, or None.
        decision: its settings, or in words why it stays in float.
        tied: the layers that share its weight, itself included; empty if nothing else uses it.
        source: names the tensor that it reads: layers of the same source were seen to be called with one tensor.
        corrected: whether its rounding may make up for what was done to the model before it.
    """

    name: str
    component: str | None
    tower: str
    block: str | None
    decision: LayerConfig | str
    tied: tuple[str, ...] = ()
    source: str = ""
    corrected: bool = True

    @property
    def chosen(self) -> bool:
        """Whether it is going to be quantized."""
        return isinstance(self.decision, LayerConfig)

    @property
    def settings(self) -> LayerConfig:
        """How it is going to be quantized; of a chosen layer."""
        return cast(LayerConfig, self.decision)


@dataclass(frozen=True)
class ModelPlan:
    """What a model is, part by part, and what becomes of it.

    Attributes:
        family: its family.
        layers: every Linear by name, in order.
        embeddings: by name, module or parameter, the settings or why it stays; {} unless they are to be quantized.
        observed: what a forward pass showed; nothing where neither calibration nor equalization asks.
        tied_blocks: blocks with a parameter that two modules use, which are not rescaled.
    """

    family: Family
    layers: Mapping[str, LayerPlan]
    embeddings: Mapping[str, LayerConfig | str]
    observed: Observation = NOTHING
    tied_blocks: frozenset[str] = frozenset()

    @property
    def chosen(self) -> list[LayerPlan]:
        """The layers that are going to be quantized."""
        return [layer for layer in self.layers.values() if layer.chosen]

    def reaches(self, name: str) -> bool:
        """Whether pictures reach a chosen layer, of the vision tower; all where no forward pass was seen."""
        if self.layers[name].tower != "vision":
            return False
        return self.observed.failure is not None or name in self.observed.reached

    def stages(self) -> list[list[LayerPlan]]:
        """The chosen layers in the order of a forward pass: a list for each block, and one for those outside."""
        chosen = self.chosen
        blocks = sorted(dict.fromkeys(layer.block for layer in chosen), key=lambda block: block is None)
        return [[layer for layer in chosen if layer.block == block] for block in blocks]

    def blocks(self, tower: str | None = "vision") -> list[str]:
        """The names of the blocks of a tower (None: of all) that hold attention or MLP layers, in order."""
        names = (
            layer.block
            for layer in self.layers.values()
            if tower in (None, layer.tower) and layer.component in ("attention", "mlp")
        )
        return [block for block in dict.fromkeys(names) if block is not None]


def resolve(model: nn.Module, config: QuantizationConfig, pixel_values: Pixels | None = None) -> ModelPlan:
    """What ``model`` is and what ``config`` makes of it; where something depends on it, seen by running the model once.

    Args:
        model: a float Vision Transformer; it stays as it is. On the meta device it is run without numbers.
        config: what to do.
        pixel_values: calibration pictures, (N, C, H, W), or None.

    Raises:
        ValueError: it has not the layers, the tower or the embeddings that are asked for, nothing is left to quantize,
            a glob matches nothing, a setting needs pictures and there are none, or it does not run on those there are.
    """
    layers, family = linear_layers(model), family_of(model)
    embeddings = find_embeddings(model, family, config)
    decisions = decide(layers, config, family, embeddings)
    chosen = {name: decision for name, decision in decisions.items() if isinstance(decision, LayerConfig)}
    towers = {name: tower_of(name, family) for name in layers}
    if pixel_values is None:
        check_data_free(chosen)
    else:
        unseen = {name: settings for name, settings in chosen.items() if towers[name] == "text"}
        check_data_free(unseen, "pictures do not reach the text tower, which is rounded without calibration")
    tied = tied_layers(model)
    plan = ModelPlan(
        family,
        {
            name: LayerPlan(
                name, component_of(name, family), towers[name], block_of(name), decision, tied.get(name, ()), name
            )
            for name, decision in decisions.items()
        },
        embeddings,
    )
    equalizes = config.equalize and any(map(shares_a_scale, chosen.values()))
    if pixel_values is None and not equalizes and not family.by_rule:
        return plan
    seen = observe(model, list(chosen), plan.blocks(None), pixel_values, text=config.towers != "vision")
    if seen.failure is not None and pixel_values is not None:
        raise ValueError(
            f"{type(model).__name__} does not run on pictures alone, as calibration does: {seen.failure}. Calibrate a "
            "part of it that does, such as its vision tower, or none"
        )
    if seen.failure is not None and family.by_rule:
        warnings.warn(
            f"{type(model).__name__} did not run on a picture of noise, so that nobody saw which of its layers are "
            f"called: {seen.failure}",
            UserWarning,
            stacklevel=3,
        )
    sources = {name: replace(layer, source=seen.source(name)) for name, layer in plan.layers.items()}
    if family.by_rule and seen.failure is None:
        sources = {name: _only_if_called(layer, seen) for name, layer in sources.items()}
    return replace(plan, tied_blocks=tied_blocks(model, plan.blocks(None)), layers=sources, observed=seen)


def _only_if_called(layer: LayerPlan, seen: Observation) -> LayerPlan:
    """A layer that the generic rule found, which stays in float where no forward pass calls it."""
    if layer.tower == "vision" and layer.chosen and layer.name not in seen.reached:
        return replace(layer, decision=UNCALLED)
    return layer


def selected(model: nn.Module, config: QuantizationConfig) -> list[str]:
    """The names of the layers and embeddings that ``config`` selects, before its share ``p`` is drawn."""
    layers, family = linear_layers(model), family_of(model)
    embeddings = find_embeddings(model, family, config)
    decisions = decide(layers, replace(config, p=1.0), family, embeddings) | embeddings
    return [name for name, decision in decisions.items() if isinstance(decision, LayerConfig)]


def shares_a_scale(settings: LayerConfig) -> bool:
    """Whether channels of a layer's weight or of its input share a scale, so that equalization can gain something."""
    return settings.method == "tensor" or settings.rounds_coarsely


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
    check_forwards(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel():
            check_tensor(parameter, name)


def decide(
    layers: Mapping[str, nn.Module], config: QuantizationConfig, family: Family, others: Iterable[str] = ()
) -> dict[str, LayerConfig | str]:
    """For each Linear by name, its settings, or in words why it stays in float.

    Args:
        layers: every Linear of the model, by name.
        config: what to do.
        family: which of them is what.
        others: names that a glob may match, too: of embeddings.
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
    candidates = [name for name, decision in plan.items() if name in selected or decision == config.left_out(name)]
    candidates += others
    if not candidates:
        reasons = "; ".join(sorted({str(decision) for decision in plan.values()}))
        raise ValueError(f"no layer is left to quantize: {reasons}")
    unmatched = [f"override {glob!r}" for glob in config.unmatched_overrides(candidates)]
    unmatched += [f"exclude {glob!r}" for glob in config.unmatched_exclude(candidates)]
    if unmatched:
        raise ValueError(f"{unmatched[0]} matches no selected layer; there are {', '.join(candidates[:8])}, ...")
    sampled = config.sample(selected)
    return {
        name: f"not among the share p={config.p}" if name in selected and name not in sampled else decision
        for name, decision in plan.items()
    }


def _check_towers(layers: Mapping[str, nn.Module], config: QuantizationConfig, family: Family) -> None:
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
    return config.left_out(name) or reason_not_quantizable(layer) or config.for_layer(name)


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
