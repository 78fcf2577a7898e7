"""convert_to_integers: a float Vision Transformer to an IntegerViT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.integer.published import FUNCTIONS
from fairseq.modules.quantization.packed.config import check_one_of
from fairseq.modules.quantization.packed.kernels import native
from fairseq.quantization.architectures.copies import copied
from fairseq.quantization.architectures.forward import evaluating
from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.conversion.convert import convert
from fairseq.quantization.engine.fuse import check_engine
from fairseq.quantization.evaluation.report import QuantizationReport
from fairseq.quantization.integer_only.build import Builder
from fairseq.quantization.integer_only.build_head import build_head
from fairseq.quantization.integer_only.head import IntegerHead
from fairseq.quantization.integer_only.model import PIXELS, IntegerViT
from fairseq.quantization.integer_only.pretrained import as_pretrained
from fairseq.quantization.integer_only.ranges import entrance_ranges
from fairseq.quantization.integer_only.reading import norm_of, read_model
from fairseq.quantization.integer_only.stream import IntegerInputs

ARITHMETICS = ("float", "integer")
EXACT = (torch.float32, torch.float64)
"""Dtypes that hold the integers of the residual stream; of others a copy in float32 is converted."""
CHECKED = 2
"""Of the pictures, on which it is seen what the model computes, and as many of noise."""


def check_arithmetic(arithmetic: str, config: QuantizationConfig) -> str:
    """Return ``arithmetic`` if it is "float", or "integer" and ``config`` goes with it; ValueError otherwise."""
    check_one_of("arithmetic", arithmetic, ARITHMETICS)
    if arithmetic == "integer":
        check_config(config)
    return arithmetic


def check_functions(functions: str, arithmetic: str) -> str:
    """Return ``functions`` if it is one of ``published.FUNCTIONS`` that goes with ``arithmetic``; ValueError if not."""
    check_one_of("functions", functions, FUNCTIONS)
    if functions != "default" and arithmetic != "integer":
        raise ValueError(f"functions={functions!r} needs arithmetic='integer', got {arithmetic!r}")
    return functions


def check_config(config: QuantizationConfig) -> None:
    """ValueError for a setting that does not go with integer arithmetic, with what does."""
    wanted: dict[str, tuple[Any, ...]] = {
        "activations": ("dynamic", "static"), "activation_bits": (8,), "group_size": (None,), "execution": ("packed",),
        "p": (1.0,), "quantize_attention": (True,), "quantize_mlp": (True,), "quantize_classifier": (True,),
        "exclude": ((),), "weight_storage": ("packed",), "backend": ("auto",), "towers": ("vision",),
        "quantize_embeddings": (False,), "rotate": (False,),
    }  # fmt: skip
    for name, accepted in wanted.items():
        value = getattr(config, name)
        if value not in accepted:
            allowed = " or ".join(map(repr, accepted))
            raise ValueError(f"arithmetic='integer' needs {name}={allowed}, got {value!r}: every part becomes integers")
    for pattern, settings in config.overrides.items():
        if other := set(settings) - {"bits", "method", "symmetric", "rounding", "bias_correction"}:
            raise ValueError(f"arithmetic='integer' takes no override of {', '.join(sorted(other))}: {pattern!r}")


def convert_to_integers(
    model: nn.Module,
    config: QuantizationConfig,
    pixels: Tensor | None,
    processor: Any = None,
    engine: str = "auto",
    functions: str = "default",
) -> tuple[IntegerViT, QuantizationReport]:
    """(The integer model, what was done to its layers). ``model`` stays as it is.

    Weights are rounded by :func:`~fairseq.quantization.conversion.convert.convert`, of 8 bits symmetric, each block on
    what the integer blocks before it make of the pictures; see :class:`~.stream.IntegerInputs`.

    Args:
        model: a ViT, DeiT, ViT-MSN, DINOv2, or the vision tower of a CLIP or SigLIP, with or without a classifier.
        config: see :func:`check_config`.
        pixels: calibration pictures, float32 (N, C, H, W).
        processor: tells mean and standard deviation of pixels, if they are what the pictures were made with.
        engine: "auto" or "layers"; there is no fused one.
        functions: of activations and softmax, "default", "ibert" or "ivit".

    Raises:
        ValueError: no pictures, a setting that does not fit, or a part of the model; the message names it.
    """
    check_config(config)
    if engine == "fused":
        raise ValueError("arithmetic='integer' has no fused engine; leave engine at 'auto'")
    check_engine(engine, config.execution)
    native.check_environment()
    if pixels is None:
        raise ValueError(
            "arithmetic='integer' needs calibration=pictures, such as 128 that the model could see: "
            "they give the ranges of pixels, of the residual stream and of attention"
        )
    config, original = within_bytes(config), model
    with plain_context():
        if any(p.is_floating_point() and p.dtype not in EXACT for p in model.parameters()):
            model = copied(model).float()
        telling = telling_pictures(pixels)
        with evaluating(model):  # what cannot be is refused before anything takes time
            parts = read_model(model, telling)
            ranges = entrance_ranges(model, parts.names, parts.before, pixels)
        builder = Builder(config.activations == "dynamic", ranges, functions)
        start, step = pixel_grid(pixels, processor)
        embedding: dict[str, Any] = {
            "config": None, "size": tuple(pixels.shape[-2:]), "patch": parts.patches.kernel_size, "bits": builder.bits,
            "pixel_grid": (start, step), "patches": builder.patches(parts.patches, start, step),
            "constants": torch.round(parts.constants / builder.embedded_step), "output_class": parts.output_class,
            "before": None if parts.before is None else builder.before(norm_of(model, parts.before), builder.width),
        }  # fmt: skip
        entrance = IntegerViT(blocks=[], head=IntegerHead({}, {}), **embedding)
        inputs: list[IntegerInputs] = []

        def follow(model: nn.Module, result: nn.Module, pixels: Tensor, blocks: list[str]) -> IntegerInputs:
            exact = rounds_by_inputs(config)
            inputs.append(IntegerInputs(model, result, pixels, blocks, entrance, builder, exact))
            return inputs[0]

        packed, report = convert(model, config, pixels, "layers", follow)
        packed.eval()
        parts = read_model(packed, telling)
        inputs[0].finish(parts.head)
        integers = IntegerViT(blocks=inputs[0].made, head=build_head(builder, parts.head), **embedding)
        size = sum(tensor.nbytes for tensor in integers.state_dict().values())
        return as_pretrained(integers, original), replace(report, bytes_after=size)


def telling_pictures(pixels: Tensor) -> Tensor:
    """The pictures that vary most, and noise over the range of all: (2 * CHECKED, C, H, W) at most.

    What is computed of black pictures, say, tells little of what the model does with others.
    """
    variance = pixels.double().flatten(1).var(1, correction=0)
    chosen = pixels[variance.topk(min(CHECKED, len(pixels))).indices]
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(CHECKED, *pixels.shape[1:], generator=generator, dtype=torch.float64)
    low, high = pixels.min().double(), pixels.max().double()
    return torch.cat([chosen, (low + (high - low) * noise).to(pixels.dtype)])


def rounds_by_inputs(config: QuantizationConfig) -> bool:
    """Whether the integers of any weight depend on what its layer reads."""
    roundings = {config.rounding, *(settings.get("rounding", "nearest") for settings in config.overrides.values())}
    corrected = [config.bias_correction, *(settings.get("bias_correction") for settings in config.overrides.values())]
    return roundings != {"nearest"} or any(corrected)


def within_bytes(config: QuantizationConfig) -> QuantizationConfig:
    """The settings with symmetric weights wherever they have 8 bits: less any other zero point they would need 9."""

    def symmetric(settings: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**settings, "symmetric": True} if settings.get("bits", config.bits) == 8 else settings

    overrides = {pattern: symmetric(settings) for pattern, settings in config.overrides.items()}
    return replace(config, symmetric=config.symmetric or config.bits == 8, overrides=overrides)


def pixel_grid(pixels: Tensor, processor: Any = None) -> tuple[Tensor, Tensor]:
    """Start and step of each channel's 256 values, float64 (C,).

    Those of 8-bit pixels less mean, divided by standard deviation, where the processor says them and the pictures lie
    within; else the range of the pictures.
    """
    low, high = torch.aminmax(pixels.double().transpose(0, 1).flatten(1), dim=1)
    mean, deviation = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    if mean is not None and deviation is not None and len(mean) == len(deviation) == len(low):
        mean, deviation = (torch.tensor(t, dtype=torch.float64) for t in (mean, deviation))
        start, step = -mean / deviation, 1 / (PIXELS - 1) / deviation
        if bool(((low >= start - step) & (high <= start + PIXELS * step)).all()):
            return start, step
    return low, ((high - low) / (PIXELS - 1)).clamp(min=1e-12)
