"""family_of: which family a model is of, by its config, its class, the models within it, or the generic rule."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from fairseq.quantization.architectures.families import FAMILIES, NEVER, VIT, Family, component_of, tower_of
from fairseq.quantization.architectures.layers import block_of, linear_layers

ENCODER_DECODER = "vision-encoder-decoder"
HEARS = r"\.[^.]*(audio|speech)[^.]*$"
"""Names of modules for sounds, in models that also see."""


def family_of(model: nn.Module) -> Family:
    """The family of a model, by its config or class; of a model that holds such a one, by what it holds.

    Warns:
        UserWarning: it is of no known family, and the generic rule found layers: in repeated numbered blocks, those
            below a module called "attn..." or "attention..." are attention, others mlp; behind the blocks, classifier.
    """
    known = _known(model)
    if known is not None:
        # with blocks in wrappers, its layers may have names that the family does not know
        of_parts = replace(known, parts=_inner(model))  # such as OpenCLIP with a trunk of timm
        for family, tower in ((known, "vision"), (of_parts, "vision"), (known, None)):
            if {"attention", "mlp"} <= _components_by_name(model, family, tower).keys():
                return family
        return _by_rule(model) or known
    if getattr(getattr(model, "config", None), "model_type", None) == ENCODER_DECODER:
        return _encoder_decoder(model)
    towers = _towers(model)
    if towers is not None:
        return towers
    found = _components_by_name(model, VIT)
    if parts := _inner(model):
        return Family(type(model).__name__, classifier=VIT.classifier, parts=parts)
    if {"attention", "mlp"} <= found.keys() and not _overlooked(model, found):
        return VIT
    return _by_rule(model) or VIT


def _inner(model: nn.Module) -> tuple[tuple[str, Family, str], ...]:
    """The models of known families within a model, as its parts."""
    parts: dict[str, Family] = {}
    for name, module in model.named_modules():
        inner = _known(module) if name and not any(name.startswith(f"{prefix}.") for prefix in parts) else None
        if inner is not None:
            parts[name] = inner
    return tuple((prefix, inner, "vision") for prefix, inner in parts.items())


def _by_rule(model: nn.Module) -> Family | None:
    """The family that the generic rule makes for a model, with a warning; None if it finds no attention or no MLP."""
    family = _generic(model)
    counts = _components_by_name(model, family)
    if not {"attention", "mlp"} <= counts.keys():
        return None
    text = ", ".join(f"{len(names)} {component} ({names[0]}, ...)" for component, names in counts.items())
    warnings.warn(
        f"{type(model).__name__} is of no known family; by their names, its Linear layers are taken for {text}. "
        "Print the quantizer's report to see what was quantized",
        UserWarning,
        stacklevel=3,
    )
    return family


def _known(model: nn.Module) -> Family | None:
    """The row of :data:`FAMILIES` for a model, or None."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    names = {f"{c.__module__}.{c.__qualname__}" for c in type(model).__mro__}
    return next((f for f in FAMILIES if kind in f.model_types or names & set(f.classes)), None)


def _encoder_decoder(model: nn.Module) -> Family:
    """A vision encoder of a known family, and a text decoder by the generic rule."""
    encoder, decoder = model.get_submodule("encoder"), model.get_submodule("decoder")
    parts = (("encoder", family_of(encoder), "vision"), ("decoder", _generic(decoder), "text"))
    return Family(ENCODER_DECODER, parts=parts, text=r"^\.enc_to_dec_proj$", classifier=r"^\.enc_to_dec_proj$")


def _towers(model: nn.Module) -> Family | None:
    """The family of a model with a vision and a text config, such as a language model that sees; None of others.

    A tower is what is built from such a config, by its own family, and the text tower ends with the output embeddings.
    What is in neither, such as a projector or a head, is of the vision tower; unless its name begins with "text". What
    hears is neither.
    """
    config = getattr(model, "config", None)
    vision, text, audio = (getattr(config, name, None) for name in ("vision_config", "text_config", "audio_config"))
    if vision is None or text is None:
        return None
    parts: dict[str, tuple[str, Family, str]] = {}
    for name, module in model.named_modules():
        if name and not any(name.startswith(f"{prefix}.") for prefix in parts):
            own = getattr(module, "config", None)
            if type(own) is type(vision) and linear_layers(module):
                parts[name] = (name, family_of(module), "vision")
            elif type(own) is type(text) and linear_layers(module):
                parts[name] = (name, _generic(module), "text")
            elif re.search(HEARS, f".{name}") or (audio is not None and type(own) is type(audio)):
                parts[name] = (name, Family("audio"), "text")
    if {tower for *_, tower in parts.values()} != {"vision", "text"}:
        return None
    rest = [name for name in linear_layers(model) if not any(name.startswith(f"{prefix}.") for prefix in parts)]
    rest = [name for name in rest if not re.search(HEARS, f".{name}")]
    outside = _generic(model, rest)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    words = [name for name in rest if model.get_submodule(name) is head or re.search(r"(^|\.)text[^.]*$", name)]
    blocks = rf"{outside.attention}|{outside.mlp}"
    return replace(
        outside,
        found=any(re.search(blocks, f".{name}") for name in rest),
        name=type(model).__name__,
        classifier=_one_of(name for name in rest if not re.search(blocks, f".{name}")),
        text=_one_of(words),
        parts=tuple(parts.values()),
    )


def _overlooked(model: nn.Module, found: Mapping[str, Sequence[str]]) -> bool:
    """Whether there are Linear layers in the blocks of a model beside those that were found by their names."""
    known = {name for names in found.values() for name in names}
    blocks = {block_of(name) for name in known} - {None}
    return any(block_of(name) in blocks and name not in known for name in linear_layers(model))


def _repeated(names: Sequence[str]) -> list[str]:
    """Those of the names that are in blocks, of which there are several side by side."""
    numbered = {block: re.sub(r"\.\d+$", "", f".{block}") for name in names if (block := block_of(name))}
    repeated = {block for block, stem in numbered.items() if list(numbered.values()).count(stem) > 1}
    return [name for name in names if block_of(name) in repeated]


def _generic(model: nn.Module, among: Sequence[str] | None = None) -> Family:
    """The generic rule, for one model or for layers ``among`` its own: a family whose patterns are lists of names."""
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    names = linear if among is None else [name for name in linear if name in among]
    inside = _repeated(names)
    attention = [name for name in inside if re.search(r"att(entio)?n", name.removeprefix(str(block_of(name))))]
    mlp = [name for name in inside if name not in attention]
    behind = names[names.index(inside[-1]) + 1 :] if inside else []
    return Family(
        "generic",
        attention=_one_of(attention),
        mlp=_one_of(mlp),
        classifier=_one_of(behind),
        patches=r"\.patch_embed",
        positions=r"\.embeddings\.position_embeddings?$",
        found=True,
    )


def _one_of(names: Iterable[str]) -> str:
    return "|".join(rf"^\.{re.escape(name)}$" for name in names) or NEVER


def _components_by_name(model: nn.Module, family: Family, tower: str | None = None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in linear_layers(model):
        component = component_of(name, family)
        if component is not None and tower in (None, tower_of(name, family)):
            found.setdefault(component, []).append(name)
    return found
