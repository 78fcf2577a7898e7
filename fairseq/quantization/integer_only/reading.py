"""read_model: what a Vision Transformer computes around and in its blocks, checked on pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq.quantization.architectures.blocks import class_of
from fairseq.quantization.architectures.families import component_of, embedding_kind, family_of
from fairseq.quantization.architectures.forward import call
from fairseq.quantization.architectures.layers import block_of
from fairseq.quantization.engine.reading import NORM_CLASSES, read
from fairseq.quantization.engine.reference_block import normalize
from fairseq.quantization.engine.spec import BlockSpec, Norm, reason_not_plain

TOLERANCE = 1e-3
"""Of what is checked on pictures, as a share of the largest value."""
LIMITS = {"gelu": 6.0, "gelu_tanh": 6.0, "quick_gelu": 8.0, "silu": 16.0, "relu": 6.0}
"""Of the tables of activations: where below -limit the function is nearly 0, and above it nearly x."""


@dataclass(frozen=True)
class ModelParts:
    """A Vision Transformer, part by part, as they are now.

    Attributes:
        patches: the convolution that embeds patches, without padding.
        constants: float64 (tokens, width): what is added to each token; the first tokens are nothing else.
        specs: of each block.
        norm: of the first token, after the last block.
        classifier: the Linear layer that reads it.
        output_class: of what the model returns, if it is a mapping.
    """

    patches: nn.Conv2d
    constants: Tensor
    specs: tuple[BlockSpec, ...]
    norm: Norm
    classifier: nn.Module
    output_class: Callable[..., Any] | None


def reason_not_integer(spec: BlockSpec) -> str | None:
    """What a block has that no integer block computes, in words; or None."""
    if spec.activation in LIMITS and spec.gating == "none" and spec.head_scale is None and spec.query_bias is None:
        if spec.head_size > 256:
            return f"its heads have {spec.head_size} channels, more than 256"
        if set(spec.norms) == {"norm1", "norm2"} and all(norm.kind == "layer" for norm in spec.norms.values()):
            return None
    return reason_not_plain(spec) or f"its activation is {spec.activation}"


def block_names(model: nn.Module) -> list[str]:
    """The encoder blocks of a model of one tower, in order."""
    names = dict.fromkeys(block for name, _ in model.named_modules() if (block := block_of(f"{name}.")))
    return [name for name in names if class_of(type(model.get_submodule(name))) is not None]


def read_model(model: nn.Module, pixels: Tensor) -> ModelParts:
    """The parts of ``model``, in eval mode, whose Linear layers may be packed.

    Args:
        pixels: a few pictures, (N, C, H, W), on which it is seen that the parts are all that the model computes.

    Raises:
        ValueError: a part that integer arithmetic does not express; the message names it.
    """
    kind = f"{type(model).__name__} cannot become integers alone"
    names = block_names(model)
    if not names:
        raise ValueError(f"{kind}: it has no encoder blocks of a known class")
    specs = tuple(_spec(model, name, kind) for name in names)
    family = family_of(model)
    patches = [m for n, m in model.named_modules() if embedding_kind(n, family) == "patches"]
    if len(patches) != 1 or not isinstance(patches[0], nn.Conv2d):
        raise ValueError(f"{kind}: it has {len(patches)} patch embeddings that are known, and one Conv2d is expected")
    convolution = patches[0]
    plain = convolution.padding in ((0, 0), "valid") and (convolution.dilation, convolution.groups) == ((1, 1), 1)
    if not plain or convolution.stride != convolution.kernel_size:
        raise ValueError(f"{kind}: its patches overlap, are padded or in groups")
    heads = [m for n, m in model.named_modules() if component_of(n, family) == "classifier" and "pooler" not in n]
    if len(heads) != 1:
        raise ValueError(f"{kind}: it has {len(heads)} classifiers, and one is expected")
    first, last = (model.get_submodule(names[i]) for i in (0, -1))
    seen = _watch(model, first, last, pixels)
    constants = _constants(model, convolution, first, pixels, seen.before, kind)
    norm = _final_norm(model, names, heads[0], seen, kind)
    return ModelParts(convolution, constants, specs, norm, heads[0], seen.output_class)


@dataclass
class _Seen:
    before: Tensor
    after: Tensor
    logits: Tensor
    output_class: Callable[..., Any] | None


def _spec(model: nn.Module, name: str, kind: str) -> BlockSpec:
    block = model.get_submodule(name)
    spec = read(block, cast(Any, class_of(type(block))))
    reason = spec if isinstance(spec, str) else reason_not_integer(spec)
    if reason is not None:
        raise ValueError(f"{kind}: in {name} {reason}")
    return cast(BlockSpec, spec)


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(model: nn.Module, first: nn.Module, last: nn.Module, pixels: Tensor) -> _Seen:
    """What goes into the first block and comes out of the last, and the logits."""
    found: dict[str, Tensor] = {}

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        found["before"] = args[0] if args else kwargs["hidden_states"]

    def after(_: nn.Module, args: Any, output: Any) -> None:
        found["after"] = output[0] if isinstance(output, tuple) else output

    with _hooked([first.register_forward_pre_hook(before, with_kwargs=True), last.register_forward_hook(after)]):
        output = call(model, {"pixel_values": pixels})
    if "logits" not in output or output["logits"].ndim != 2:
        raise ValueError(
            f"{type(model).__name__} cannot become integers alone: it returns {', '.join(output)}, and logits of "
            "classes are expected"
        )
    output_class = type(output) if hasattr(output, "to_tuple") else None
    return _Seen(found["before"].detach(), found["after"].detach(), output["logits"].detach(), output_class)


def _constants(
    model: nn.Module, convolution: nn.Conv2d, first: nn.Module, pixels: Tensor, before: Tensor, kind: str
) -> Tensor:
    """What the embedding adds to the patches' products, (tokens, width), seen on a black picture and checked."""
    last = first
    seen = _watch(model, first, last, torch.zeros_like(pixels[:1])).before.double()
    bias = 0 if convolution.bias is None else convolution.bias.detach().double()
    embedded = convolution(pixels.to(convolution.weight.dtype)).detach().double().flatten(2).transpose(1, 2) - bias
    constants = seen[0].clone()  # (tokens, width)
    start = len(constants) - embedded.shape[1]
    expected = constants.expand(len(pixels), -1, -1).clone()
    if start >= 0:
        expected[:, start:] += embedded
    if start < 0 or not _close(expected, before.double()):
        raise ValueError(f"{kind}: its embedding does more than to add constants to the patches' products")
    return constants


def _final_norm(model: nn.Module, names: list[str], classifier: nn.Module, seen: _Seen, kind: str) -> Norm:
    """The norm after the last block, checked to be all there is before the classifier."""
    for name, module in model.named_modules():
        own, width = type(module), seen.after.shape[-1]
        if NORM_CLASSES.get((own.__module__, own.__qualname__)) != "layer" or block_of(f"{name}.") in names:
            continue
        layer: Any = module
        norm = Norm("layer", layer.weight, layer.bias, layer.eps)
        if tuple(layer.normalized_shape) == (width,) and getattr(classifier, "in_features", None) == width:
            logits = classifier(normalize(norm, seen.after)[:, 0])
            if logits.shape == seen.logits.shape and _close(logits, seen.logits):
                return norm
    raise ValueError(f"{kind}: its head is not a LayerNorm of the first token and one Linear layer")


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
