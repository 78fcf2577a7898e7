"""read_model: what a Vision Transformer computes around and in its blocks, checked on pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.architectures.blocks import class_of
from fairseq.quantization.architectures.families import component_of, embedding_kind, tower_of
from fairseq.quantization.architectures.forward import call
from fairseq.quantization.architectures.layers import block_of
from fairseq.quantization.architectures.recognition import family_of
from fairseq.quantization.engine.reading import NORM_CLASSES, read
from fairseq.quantization.engine.reference_block import run
from fairseq.quantization.engine.spec import BlockSpec, Call, Norm, reason_not_plain
from fairseq.quantization.integer_only.head_spec import OUTPUT_NAME, HeadSpec, Seen, close, distance, nearest, read_head

LIMITS = {"gelu": 6.0, "gelu_tanh": 6.0, "quick_gelu": 8.0, "silu": 16.0, "relu": 6.0}
"""Of the tables of activations: where below -limit the function is nearly 0, and above it nearly x."""


@dataclass(frozen=True)
class ModelParts:
    """A Vision Transformer, part by part, as they are now.

    Attributes:
        patches: the convolution that embeds patches, without padding.
        constants: float64 (tokens, width): what is added to each token; the first tokens are nothing else.
        before: name of the LayerNorm of the tokens before the first block, or None.
        names, specs: of each block.
        head: what is behind the last block.
        output_class: of what the model returns, if it is a mapping.
    """

    patches: nn.Conv2d
    constants: Tensor
    before: str | None
    names: tuple[str, ...]
    specs: tuple[BlockSpec, ...]
    head: HeadSpec
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
    family = family_of(model)
    names = block_names(model)
    if any(tower_of(name, family) == "text" for name in names):
        raise ValueError(
            f"{kind}: it has a text tower; its vision tower alone can, such as CLIPVisionModelWithProjection"
        )
    if not names:
        raise ValueError(f"{kind}: it has no encoder blocks of a known class")
    specs = tuple(_spec(model, name, kind) for name in names)
    patches = [m for n, m in model.named_modules() if embedding_kind(n, family) == "patches"]
    if len(patches) != 1 or not isinstance(patches[0], nn.Conv2d):
        raise ValueError(f"{kind}: it has {len(patches)} patch embeddings that are known, and one Conv2d is expected")
    convolution = patches[0]
    plain = convolution.padding in ((0, 0), "valid") and (convolution.dilation, convolution.groups) == ((1, 1), 1)
    if not plain or convolution.stride != convolution.kernel_size:
        raise ValueError(f"{kind}: its patches overlap, are padded or in groups")
    kernel: Any = convolution.kernel_size
    if any(size % patch for size, patch in zip(pixels.shape[-2:], kernel)):
        raise ValueError(
            f"{kind}: its patches of {' x '.join(map(str, kernel))} do not divide pictures of "
            f"{' x '.join(map(str, pixels.shape[-2:]))}"
        )
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | PackedLinear)]
    heads = [name for name in layers if component_of(name, family) == "classifier"]
    seen = _watch(model, names, heads, pixels)
    for name, spec in zip(names, specs):
        _check_block(name, spec, *seen.blocks[name], kind)
    before = nearest((name, distance(after, seen.before)) for name, (_, after) in seen.norms.items())
    constants = _constants(model, convolution, names, before, pixels, seen, kind)
    norms = (norm_of(model, name) for name, (x, _) in seen.norms.items() if x.shape[-1] == seen.after.shape[-1])
    count = math.prod(size // patch for size, patch in zip(pixels.shape[-2:], convolution.kernel_size))
    if reason := _reason_not_outputs(seen):
        raise ValueError(f"{kind}: it returns {reason}")
    head = Seen(seen.after, seen.outputs, seen.layers, tuple(norms), count)
    try:
        head_spec = read_head(model, head)
    except ValueError as reason:
        raise ValueError(f"{kind}: {reason}") from None
    return ModelParts(convolution, constants, before, tuple(names), specs, head_spec, seen.output_class)


@dataclass
class _Seen:
    before: Tensor
    after: Tensor
    blocks: dict[str, tuple[Tensor, Tensor]]
    norms: dict[str, tuple[Tensor, Tensor]]
    layers: dict[str, tuple[Tensor, Tensor]]
    outputs: Mapping[str, Any]
    returned: type

    @property
    def output_class(self) -> Callable[..., Any] | None:
        return None if issubclass(self.returned, Tensor) else self.returned


def _reason_not_outputs(seen: _Seen) -> str | None:
    """What an integer model could not return in the same way, in words; or None."""
    kind = seen.returned
    if not issubclass(kind, Tensor) and not (hasattr(kind, "to_tuple") and kind.__module__.startswith("transformers.")):
        return f"a {kind.__name__}, and a tensor or an output class of transformers is expected"
    for name, value in seen.outputs.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            given = f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            return f"{name}, a {given}, and floating tensors alone are expected"
        if not OUTPUT_NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
            return f"an output called {name!r}, which no module can be called"
    return None if seen.outputs else "no tensor"


def norm_of(model: nn.Module, name: str) -> Norm:
    """The LayerNorm of that name."""
    layer: Any = model.get_submodule(name)
    return Norm("layer", layer.weight, layer.bias, layer.eps)


def _norm_names(model: nn.Module) -> list[str]:
    """The LayerNorms outside of blocks."""
    blocks = block_names(model)
    return [
        name
        for name, module in model.named_modules()
        if NORM_CLASSES.get((type(module).__module__, type(module).__qualname__)) == "layer"
        and block_of(f"{name}.") not in blocks
        and len(cast(Any, module).normalized_shape) == 1
    ]


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


def _check_block(name: str, spec: BlockSpec, x: Tensor, y: Tensor, kind: str) -> None:
    """ValueError unless a block computes what its spec says, and so no positions, windows or masks.

    Packed layers, which may round other than for the block itself, are taken as they are.
    """
    if all(type(layer) is nn.Linear for layer in spec.layers.values()):
        images, tokens = x.shape[:2] if x.ndim == 3 else (0, 0)
        got = run(spec, Call(images, tokens, images * tokens), x.reshape(-1, x.shape[-1])) if tokens else x
        whole = got.reshape(y.shape) if got.numel() == y.numel() else got
        if whole.shape != y.shape or not close(whole - x, y - x, y):
            raise ValueError(
                f"{kind}: in {name} attention is of windows, or has relative or rotary positions, or a mask"
            )


def _watch(model: nn.Module, names: list[str], heads: list[str], pixels: Tensor) -> _Seen:
    """What goes into blocks, norms and Linear layers outside of them, and comes out; and the outputs."""
    blocks: dict[str, tuple[Tensor, Tensor]] = {}
    norms: dict[str, tuple[Tensor, Tensor]] = {}
    layers: dict[str, tuple[Tensor, Tensor]] = {}

    def block(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            blocks[name] = x.detach(), (output[0] if isinstance(output, tuple) else output).detach()

        return model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)

    def watch(name: str, into: dict[str, tuple[Tensor, Tensor]]) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            into[name] = args[0].detach(), output.detach()

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [block(name) for name in names] + [watch(name, layers) for name in heads]
    handles += [watch(name, norms) for name in _norm_names(model)]
    returned: list[type] = []
    handles.append(model.register_forward_hook(lambda module, args, output: returned.append(type(output))))
    with _hooked(handles):
        output = call(model, {"pixel_values": pixels})
    outputs = {n: v.detach() if isinstance(v, Tensor) else v for n, v in output.items() if v is not None}
    return _Seen(blocks[names[0]][0], blocks[names[-1]][1], blocks, norms, layers, outputs, returned[-1])


def _constants(
    model: nn.Module,
    convolution: nn.Conv2d,
    names: list[str],
    before: str | None,
    pixels: Tensor,
    seen: _Seen,
    kind: str,
) -> Tensor:
    """What the embedding adds to the patches' products, (tokens, width), seen on a black picture and checked."""

    def tokens(seen: _Seen) -> Tensor:
        return (seen.before if before is None else seen.norms[before][0]).double()

    black = tokens(_watch(model, names, [], torch.zeros_like(pixels[:1])))
    bias = 0 if convolution.bias is None else convolution.bias.detach().double()
    embedded = convolution(pixels.to(convolution.weight.dtype)).detach().double().flatten(2).transpose(1, 2) - bias
    constants = black[0].clone()  # (tokens, width)
    start = len(constants) - embedded.shape[1]
    expected = constants.expand(len(pixels), -1, -1).clone()
    if start >= 0:
        expected[:, start:] += embedded
    got = tokens(seen)
    if start < 0 or expected.shape != got.shape or not close(expected - constants, got - constants, got):
        raise ValueError(f"{kind}: its embedding does more than to add constants to the patches' products")
    return constants
