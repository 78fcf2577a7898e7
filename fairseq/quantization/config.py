"""QuantizationConfig: which layers get how many bits by which method, validated once."""

from __future__ import annotations

import glob
import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from fairseq.modules.quantization.packed.config import LinearConfig, check_flag, check_one_of

COMPONENTS = ("attention", "mlp", "classifier")
EXECUTIONS = ("packed", "emulated")
TOWERS = ("vision", "text", "all")
ROUNDINGS = ("nearest", "gptq", "gptaq", "qronos", "coordinate")
MAKE_UP_FOR_DRIFT = ("gptaq", "qronos", "coordinate")
"""Those that look at what the float model's layers read, too."""
TRIED_OUT = ("gptaq", "coordinate")
"""Those that make up for as much of that as serves pictures which it was not taken from."""
MAKE_UP_FOR_BLOCK = ("coordinate",)
"""Those that look at what the float model's block gives, where they round the layer that ends it; docs/results.rst has
the figures, of gptaq too."""
TWO_SIDED, TWO_SIDED_BITS, TWO_SIDED_WEIGHTS = ("gptaq", "coordinate"), 7, 2**19
"""Those that look at which errors of a layer's outputs matter; up to which width they do; and if "auto" chose them, in
layers of how many weights at most: with more it takes longer than all else."""
COARSE_BITS = 4
"""Up to it "auto" is "coordinate"; above it, and where one scale serves a whole weight, "gptaq": docs/results.rst has
the figures."""
FORMER_NAMES = {"resident": "weight_storage"}
SKIPPED = "skipped by an override"


@dataclass(frozen=True)
class LayerConfig(LinearConfig):
    """How one Linear is quantized.

    Attributes:
        skip: leave it in float.
        rounding: "nearest", "gptq", "gptaq", "qronos", "coordinate", or "auto": where there are calibration images
            coordinate up to 4 bits, gptaq above and with "tensor", else nearest; gptq instead of gptaq where its block
            is reconstructed with activations of fewer than 8 bits.
        bias_correction: True adds the mean error of the layer's output on the calibration images to its bias, "add"
            also to layers that have none and get one for it.
    """

    skip: bool = False
    rounding: str = "auto"
    bias_correction: bool | str = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("skip", self.skip)
        resolve_rounding(self.rounding, True, self.bits, self.method)
        if not isinstance(self.bias_correction, bool) and self.bias_correction != "add":
            raise ValueError(f"bias_correction must be True, False or 'add'; got {self.bias_correction!r}")

    @property
    def rounds_coarsely(self) -> bool:
        """Whether one scale for all channels of the input is felt: a static one, or one per token below 8 bits."""
        return self.activations == "static" or (self.activations == "dynamic" and self.activation_bits < 8)


@dataclass(frozen=True)
class QuantizationConfig(LayerConfig):
    """The settings of one quantization: those of every layer (see :class:`LinearConfig`), and of the model.

    Attributes:
        p: share of the selected layers that is quantized, 0 to 1.
        quantize_attention, quantize_mlp, quantize_classifier: the components that are selected.
        seed: chooses the layers when ``p`` is below 1; the same seed, the same layers.
        execution: "packed" (integers in memory, for inference) or "emulated" (float weights seen through the same
            integers, for training).
        equalize: even out the ranges of input channels first, exactly (see ``equalization``), where one scale serves
            the weight (method "tensor") or the input (static activations).
        rotate: turn the hidden states by a random orthogonal matrix of ``seed`` first, exactly (see ``rotation``), so
            that no channel has a larger range than others; for plain ViTs with a classifier.
        overrides: glob of layer names -> ``skip`` or any of a layer's settings; the first glob that matches a layer
            replaces those settings for it.
        exclude: globs of names of layers that stay in float, whatever the overrides say.
        towers: "vision", "text" or "all": of a model that has both, such as CLIP, which one is selected.
        quantize_embeddings: also pack the patch embedding, with a layer's settings, and position embeddings, at 8 bits;
            neither counts for ``p``. For packed execution.

    Raises:
        TypeError, ValueError: what came and what is accepted.
    """

    p: float = 1.0
    quantize_attention: bool = True
    quantize_mlp: bool = True
    quantize_classifier: bool = True
    seed: int = 0
    execution: str = "packed"
    equalize: bool = True
    rotate: bool = False
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exclude: Sequence[str] = ()
    towers: str = "vision"
    quantize_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("execution", self.execution, EXECUTIONS)
        self._check_emulated(self)
        check_flag("equalize", self.equalize)
        check_flag("rotate", self.rotate)
        if isinstance(self.p, bool) or not isinstance(self.p, int | float):
            raise TypeError(f"p must be a number from 0 to 1, got {self.p!r}")
        if not 0 <= self.p <= 1:
            raise ValueError(f"p is the share of layers to quantize, from 0 to 1; got {self.p}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}")
        check_one_of("towers", self.towers, TOWERS)
        flags = {f"quantize_{c}": getattr(self, f"quantize_{c}") for c in (*COMPONENTS, "embeddings")}
        for name, value in flags.items():
            check_flag(name, value)
        if not any(flags.values()):
            raise ValueError(f"nothing is selected: at least one of {', '.join(flags)} must be True")
        if self.quantize_embeddings and self.execution == "emulated":
            raise ValueError(
                "quantize_embeddings=True is a setting of execution='packed'; an emulated model trains float embeddings"
            )
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"overrides must map globs to settings, got {self.overrides!r}")
        current = {pattern: with_current_names(settings) for pattern, settings in self.overrides.items()}
        object.__setattr__(self, "overrides", current)
        for pattern, settings in self.overrides.items():
            self._override(pattern, settings)
        if not isinstance(self.exclude, list | tuple) or not all(isinstance(glob, str) for glob in self.exclude):
            raise TypeError(f'exclude must be a list of globs, such as ["*classifier"]; got {self.exclude!r}')
        object.__setattr__(self, "exclude", tuple(self.exclude))

    def selects(self, component: str) -> bool:
        """Whether layers of this component ("attention", "mlp", "classifier" or "embeddings") are to be quantized."""
        return bool(getattr(self, f"quantize_{component}"))

    def selects_tower(self, tower: str) -> bool:
        """Whether layers of this tower ("vision" or "text") are to be quantized."""
        return self.towers in (tower, "all")

    def for_layer(self, name: str) -> LayerConfig:
        """The settings of the layer called ``name``, overrides included; it is skipped if it is excluded."""
        settings = self._overridden(name)
        return replace(settings, skip=True) if self._excluded_by(name) is not None else settings

    def left_out(self, name: str) -> str | None:
        """Why the layer called ``name`` is to stay in float, in words; None if nobody wants that."""
        pattern = self._excluded_by(name)
        if pattern is not None:
            return f"excluded by {pattern!r}"
        return SKIPPED if self._overridden(name).skip else None

    def _excluded_by(self, name: str) -> str | None:
        return next((pattern for pattern in self.exclude if fnmatchcase(name, pattern)), None)

    def _overridden(self, name: str) -> LayerConfig:
        for pattern, settings in self.overrides.items():
            if fnmatchcase(name, pattern):
                return self._override(pattern, settings)
        return LayerConfig(**self._of_a_layer())

    def unmatched_overrides(self, names: Iterable[str]) -> list[str]:
        """The globs of overrides that match none of ``names``."""
        return _unmatched(self.overrides, names)

    def unmatched_exclude(self, names: Iterable[str]) -> list[str]:
        """The globs of ``exclude`` that match none of ``names``."""
        return _unmatched(self.exclude, names)

    def sample(self, names: Iterable[str]) -> set[str]:
        """The share ``p`` of ``names``: those with the smallest hash of seed and place in the order of ``names``.

        The place and not the name, which differs between versions of transformers; their order does not.
        """
        names = list(names)
        rank = {name: hashlib.sha256(f"{self.seed}:{place}".encode()).hexdigest() for place, name in enumerate(names)}
        count = round(self.p * len(names)) if self.p == 0 else max(1, round(self.p * len(names)))
        return set(sorted(names, key=rank.__getitem__)[:count])

    def _check_emulated(self, layer: LinearConfig) -> None:
        if self.execution == "emulated" and (layer.weight_storage, layer.backend) != ("packed", "auto"):
            raise ValueError(
                f"weight_storage={layer.weight_storage!r} and backend={layer.backend!r} are settings of "
                "execution='packed'; an emulated model holds float weights and runs float products"
            )

    def _of_a_layer(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(LayerConfig)}

    def _override(self, pattern: str, settings: Mapping[str, Any]) -> LayerConfig:
        accepted = {f.name for f in fields(LayerConfig)}
        if not isinstance(pattern, str) or not isinstance(settings, Mapping) or not set(settings) <= accepted:
            raise ValueError(
                f"an override maps a glob to any of {', '.join(sorted(accepted))}, "
                f'such as {{"*classifier": {{"bits": 8}}}}; got {pattern!r}: {settings!r}'
            )
        try:
            layer = LayerConfig(**{**self._of_a_layer(), **settings})
            self._check_emulated(layer)
            return layer
        except (TypeError, ValueError) as error:
            raise type(error)(f"override {pattern!r}: {error}") from None


def resolve_rounding(rounding: str, calibrated: bool, bits: int, method: str = "channel") -> str:
    """The rounding that "auto" stands for; any other name as it is.

    Raises:
        ValueError: an unknown name.
    """
    if rounding == "auto":
        fits_scales = method != "tensor" and bits <= COARSE_BITS
        return "nearest" if not calibrated else "coordinate" if fits_scales else "gptaq"
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of 'auto', {', '.join(map(repr, ROUNDINGS))}; got {rounding!r}")
    return rounding


def with_current_names(settings: Mapping[str, Any], stacklevel: int = 2) -> Any:
    """Settings in which one that has another name now is called by that, with a DeprecationWarning.

    Raises:
        ValueError: both names are there.
    """
    if not isinstance(settings, Mapping):
        return settings  # whoever reads it says what is wrong
    found = dict(settings)
    for former, name in FORMER_NAMES.items():
        if former in found:
            if name in found:
                raise ValueError(f"{name} and {former} are two names of one setting; give {name} alone")
            warnings.warn(f"{former} is called {name} now", DeprecationWarning, stacklevel + 1)
            found[name] = found.pop(former)
    return found


def _unmatched(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    names = list(names)
    return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]


def merge_bits(overrides: Mapping[str, Mapping[str, Any]], bits: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Overrides that give layers their widths and keep what the user set beside.

    Args:
        overrides: the user's, as for :class:`QuantizationConfig`.
        bits: layer name -> 2 to 8.

    Returns:
        For each of these layers, under its escaped name, the settings of the user's first override that matches it and
        the width; none for a layer that this override skips or gives a width itself. Then the user's own.
    """
    merged: dict[str, dict[str, Any]] = {}
    for name, width in bits.items():
        own = next((settings for pattern, settings in overrides.items() if fnmatchcase(name, pattern)), {})
        if not own.get("skip") and "bits" not in own:
            merged[glob.escape(name)] = {**own, "bits": width}
    return merged | {pattern: dict(own) for pattern, own in overrides.items() if pattern not in merged}
