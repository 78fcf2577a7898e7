"""What an IntegerViT is beside its tensors, as JSON, and an empty one made from that and their shapes; for files."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.integer.dyadic import LARGEST_SHIFT, MULTIPLIER_BITS, Requantize
from fairseq.modules.quantization.integer.normalization import STREAM_BITS
from fairseq.modules.quantization.integer.piecewise import INPUT_BITS, PIECES
from fairseq.modules.quantization.integer.published import FUNCTIONS
from fairseq.modules.quantization.integer.rows import HALF
from fairseq.quantization.integer_only.block import IntegerBlock
from fairseq.quantization.integer_only.head import LOGIT_BITS, AttentionPooling, IntegerHead, Readout, Tokens
from fairseq.quantization.integer_only.head_spec import OUTPUT_NAME
from fairseq.quantization.integer_only.layers import (
    BYTE,
    WIDE,
    IntegerActivation,
    IntegerAttention,
    IntegerGELU,
    IntegerLinear,
    IntegerNorm,
    Spread,
)
from fairseq.quantization.integer_only.model import IntegerViT

ACTIVATIONS = {"dynamic": WIDE, "static": BYTE}
"""Kinds of activations, and the bits of what layers read."""
KEYS = {"activations", "size", "patch", "blocks", "spread", "output"}
MOST_BLOCKS = 1000
LARGEST_EXPONENT = 128

Shapes = Mapping[str, Sequence[int]]


def structure(model: IntegerViT) -> dict[str, Any]:
    """What :func:`empty` needs beside the shapes of tensors; JSON can hold it.

    ``activations``: "dynamic" or "static". ``size`` and ``patch``: height and width. ``blocks``: how many. ``spread``:
    the byte that stands for 0, of each :class:`~.layers.Spread` by name. ``output``: the class of what the model
    returns, or None. ``functions``: of :data:`~fairseq.modules.quantization.integer.published.FUNCTIONS`. ``head``:
    ``outputs``, the readouts of each, and ``readouts``, by name the ``tokens`` that are pooled, or None, and whether
    the norm is of all of them, ``norm_first``; of attention pooling, null.
    """
    kind = model.output_class
    return {
        "activations": next(name for name, bits in ACTIVATIONS.items() if bits == model.bits),
        "size": list(model.size),
        "patch": list(model.patch),
        "blocks": len(model.blocks),
        "spread": {name: module.zero for name, module in model.named_modules() if isinstance(module, Spread)},
        "output": None if kind is None else f"{kind.__module__}.{kind.__qualname__}",
        "head": {
            "outputs": {name: list(sources) for name, sources in model.head.outputs.items()},
            "readouts": {name: _readout_of(readout) for name, readout in model.head.readouts.items()},
        },
        "functions": next(iter(model.blocks)).attention.functions,  # type: ignore[union-attr]
    }


def _readout_of(readout: nn.Module) -> dict[str, Any] | None:
    if not isinstance(readout, Readout):
        return None
    tokens = None if readout.tokens is None else [list(part) for part in readout.tokens]
    return {"tokens": tokens, "norm_first": readout.norm_first}


FIRST_HEAD = {"outputs": {"logits": ["logits"]}, "readouts": {"logits": {"tokens": [[0, 1]], "norm_first": False}}}
"""Of files that say nothing of a head, all of which have this one, and other names for its parts."""
FIRST_NAMES = {
    "norm": "head.readouts.logits.norm", "classifier": "head.readouts.logits.linear",
    "logit_exponent": "head.readouts.logits.exponent",
}  # fmt: skip


def present_name(name: str) -> str:
    """The name of a tensor or part in a file that says nothing of a head -> what it is now."""
    first, dot, rest = name.partition(".")
    return FIRST_NAMES.get(first, first) + dot + rest


def empty(description: Mapping[str, Any], shapes: Shapes) -> IntegerViT:
    """An IntegerViT to load a state dict into.

    Args:
        description: of a :func:`structure`, from a file; nothing is taken for granted.
        shapes: of the tensors in the state dict, by name.

    Raises:
        ValueError: a description that is none, or a tensor that is missing; the message names it.
    """
    return _Empty(description, shapes).model()


class _Empty:
    """Makes the parts of an empty model, by their names."""

    def __init__(self, description: Mapping[str, Any], shapes: Shapes):
        if missing := KEYS - description.keys():
            raise ValueError(f"the structure has no {min(missing)!r}")
        kind = description["activations"]
        if not isinstance(kind, str) or kind not in ACTIVATIONS:
            raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {kind!r}")
        self.bits = ACTIVATIONS[kind]
        self.size, self.patch = (_pair(key, description[key]) for key in ("size", "patch"))
        if any(side % part for side, part in zip(self.size, self.patch)):
            raise ValueError(f"pictures of {self.size} cannot be cut into patches of {self.patch}")
        self.blocks = _whole("blocks", description["blocks"], 1, MOST_BLOCKS)
        if not isinstance(description["spread"], Mapping):
            raise ValueError(f"spread must map names to bytes, got {description['spread']!r:.80}")
        self.spread, self.output_class = description["spread"], _output_class(description["output"])
        self.described_head = description.get("head", FIRST_HEAD)
        self.functions = description.get("functions", "default")
        if not isinstance(self.functions, str) or self.functions not in FUNCTIONS:
            raise ValueError(f"functions must be one of {', '.join(FUNCTIONS)}, got {self.functions!r:.80}")
        self.shapes = shapes

    def model(self) -> IntegerViT:
        channels = self.shape("pixel_start", 1)[0]
        return IntegerViT(
            config=None,
            size=self.size,
            patch=self.patch,
            bits=self.bits,
            pixel_grid=(torch.zeros(channels), torch.ones(channels)),
            patches=self.linear("patches", STREAM_BITS),
            constants=torch.zeros(self.shape("constants", 2)),
            blocks=[self.block(f"blocks.{i}") for i in range(self.blocks)],
            head=self.head(),
            output_class=self.output_class,
            before=self.wide_norm("before", STREAM_BITS) if "before.eps" in self.shapes else None,
        )

    def head(self) -> IntegerHead:
        said = self.described_head
        if not isinstance(said, Mapping) or not all(
            isinstance(said.get(key), Mapping) for key in ("outputs", "readouts")
        ):
            raise ValueError(f"head must have outputs and readouts, got {said!r:.80}")
        readouts = {name: self.readout(name, entry) for name, entry in said["readouts"].items()}
        for name, sources in said["outputs"].items():
            known = isinstance(sources, list) and all(isinstance(s, str) and s in readouts for s in sources)
            if not known or len(sources) not in (1, 2) or not OUTPUT_NAME.fullmatch(name):
                raise ValueError(f"the output {name!r:.80} must be of one or two readouts, got {sources!r:.80}")
        if not said["outputs"]:
            raise ValueError("head has no outputs")
        return IntegerHead(readouts, said["outputs"])

    def readout(self, key: str, said: Any) -> Readout | AttentionPooling:
        if not OUTPUT_NAME.fullmatch(key) or hasattr(nn.ModuleDict(), key):
            raise ValueError(f"a readout is called {key!r:.80}")
        name = f"head.readouts.{key}"
        if said is None:
            return self.attention_pooling(name)
        if not isinstance(said, Mapping) or not isinstance(said.get("norm_first"), bool):
            raise ValueError(f"the readout {key} must say its tokens and norm_first, got {said!r:.80}")
        norm = linear = read = None
        if f"{name}.linear.weight" in self.shapes:
            linear = self.linear(f"{name}.linear", LOGIT_BITS)
            multiplier = (f"{name}.read.multiplier", f"{name}.read.0.multiplier")
            read = self.result(f"{name}.read") if any(m in self.shapes for m in multiplier) else None
        if f"{name}.norm.eps" in self.shapes:
            reads = linear is not None and read is None
            norm = self.norm(f"{name}.norm") if reads else self.wide_norm(f"{name}.norm", LOGIT_BITS)
        return Readout(self.bits, 0, self.tokens(key, said.get("tokens")), norm, said["norm_first"], read, linear)

    def tokens(self, key: str, said: Any) -> Tokens | None:
        if said is None:
            return None
        count = self.shape("constants", 2)[0]
        if not isinstance(said, Sequence) or not said or not all(isinstance(p, Sequence) and len(p) == 2 for p in said):
            raise ValueError(f"the tokens of {key} must be ranges, got {said!r:.80}")
        starts = [_whole(f"the first token of {key}", start, 0, count - 1) for start, _ in said]
        return tuple(
            (a, _whole(f"the token behind those of {key}", b, a + 1, count)) for a, (_, b) in zip(starts, said)
        )

    def attention_pooling(self, name: str) -> AttentionPooling:
        multiplier, shift = torch.zeros(2, *self.heads(f"{name}.attention.multiplier"), dtype=torch.int64)
        mixed = self.result(f"{name}.attention.output")
        parts: dict[str, Any] = {
            "norm": self.norm(f"{name}.norm"), "norm2": self.norm(f"{name}.norm2"),
            "attention": IntegerAttention(multiplier, shift.clone(), self.bits == WIDE, mixed, self.functions),
            "activation": self.activation(f"{name}.activation"),
        }  # fmt: skip
        widths = {"key": self.bits, "value": self.bits, "output": STREAM_BITS, "fc1": INPUT_BITS, "fc2": STREAM_BITS}
        for role, bits in widths.items():
            parts[role] = self.linear(f"{name}.{role}", bits, role == "fc2" and self.bits == WIDE)
        return AttentionPooling(self.bits, 0, torch.zeros(self.shape(f"{name}.query", 2)), **parts)

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        if name not in self.shapes:
            raise ValueError(f"{name} is missing")
        shape = tuple(self.shapes[name])
        if len(shape) != dimensions or 0 in shape:
            raise ValueError(f"{name} must have {dimensions} dimensions, none of them 0; its shape is {shape}")
        return shape

    def heads(self, name: str) -> tuple[int, ...]:
        if (shape := self.shape(name, 3))[1:] != (1, 1):
            raise ValueError(f"{name} must be of shape (heads, 1, 1), not {shape}")
        return shape

    def block(self, name: str) -> IntegerBlock:
        multiplier, shift = torch.zeros(2, *self.heads(f"{name}.attention.multiplier"), dtype=torch.int64)
        mixed = self.result(f"{name}.attention.output")
        parts: dict[str, Any] = {
            "attention": IntegerAttention(multiplier, shift.clone(), self.bits == WIDE, mixed, self.functions),
            "activation": self.activation(f"{name}.activation"),
        }
        parts |= {norm: self.norm(f"{name}.{norm}") for norm in ("norm1", "norm2")}
        widths = {"query": self.bits, "key": self.bits, "value": self.bits, "fc1": INPUT_BITS}
        for role in ("query", "key", "value", "output", "fc1", "fc2"):
            unsigned = role == "fc2" and self.bits == WIDE
            parts[role] = self.linear(f"{name}.{role}", widths.get(role, STREAM_BITS), unsigned)
        return IntegerBlock(self.bits, **parts)

    def activation(self, name: str) -> nn.Module:
        output = self.result(f"{name}.output")
        if self.functions == "default":
            return IntegerActivation(torch.zeros(2, PIECES), output)
        return IntegerGELU(torch.zeros(2, dtype=torch.int64), self.functions, output)

    def linear(self, name: str, bits: int, unsigned: bool = False) -> IntegerLinear:
        weight = torch.zeros(self.shape(f"{name}.weight", 2), dtype=torch.int8)
        return IntegerLinear(weight, self.requantize(f"{name}.output", bits), unsigned)

    def norm(self, name: str) -> IntegerNorm:
        return IntegerNorm(1, self.result(f"{name}.output"))

    def wide_norm(self, name: str, bits: int) -> IntegerNorm:
        """One whose integers no layer reads as they are."""
        return IntegerNorm(1, self.requantize(f"{name}.output", bits))

    def result(self, name: str) -> nn.Module:
        """Of a norm, an activation or attention: what layers read."""
        if f"{name}.1.columns" not in self.shapes:
            return self.requantize(name, self.bits)
        if self.bits == WIDE:
            raise ValueError(f"{name}.1 makes bytes of columns, which dynamic activations do not have")
        zero = _whole(f"the zero of {name}.1", self.spread.get(f"{name}.1"), -128, 127)
        copies = torch.ones(self.shape(f"{name}.1.columns", 1), dtype=torch.int64)
        return nn.Sequential(self.requantize(f"{name}.0", WIDE), Spread(copies, zero))

    def requantize(self, name: str, bits: int) -> Requantize:
        ones = torch.ones(self.shape(f"{name}.multiplier", 1), dtype=torch.float64)
        return Requantize(ones, 0 * ones, bits, name)


def check_loaded(model: IntegerViT) -> None:
    """ValueError unless all constants are within their ranges and of shapes that go together; it names the tensor."""
    for name, module in model.named_modules():
        for key, (low, high) in RANGES.get(type(module), {}).items():
            _within(f"{name}.{key}", module.get_buffer(key), low, high)
        if isinstance(module, IntegerLinear) and module.sums is not None:
            sums = HALF * module.weight.to(torch.int32).sum(-1, dtype=torch.int32)
            if not torch.equal(module.sums, sums):
                raise ValueError(f"{name}.sums are not {HALF} times the sums of {name}.weight")
        if isinstance(module, nn.Sequential):
            first, spread = cast(tuple[Requantize, Spread], tuple(module))
            _within(f"{name}.1.columns", spread.columns, 0, len(first.multiplier) - 1)
    patches = math.prod(side // part for side, part in zip(model.size, model.patch))
    if len(model.constants) < patches:
        raise ValueError(f"constants are of {len(model.constants)} tokens, and there are {patches} patches")
    limit = 2 ** (STREAM_BITS - 1)
    _within("constants", model.constants, -limit, limit - 1)
    for name, sources in model.head.outputs.items():
        exponents = {int(model.head.readouts[source].get_buffer("exponent")) for source in sources}
        if len(exponents) > 1:
            raise ValueError(f"the readouts that {name} is the mean of have different exponents")
    if not bool(torch.isfinite(model.pixel_start).all() & torch.isfinite(model.pixel_step).all()):
        raise ValueError("pixel_start and pixel_step must be finite")
    if not bool((model.pixel_step > 0).all()):
        raise ValueError("pixel_step must be above 0")
    try:
        _run_without_numbers(model)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"the shapes of its tensors do not go together: {str(error).splitlines()[0]}") from None


RANGES: dict[type, dict[str, tuple[int, int]]] = {
    Requantize: {
        "multiplier": (-(2**MULTIPLIER_BITS), 2**MULTIPLIER_BITS),
        "shift": (0, LARGEST_SHIFT),
        "offset": (-(2 ** (LARGEST_SHIFT - 1)), 2 ** (LARGEST_SHIFT - 1)),
    },
    Readout: {"exponent": (-LARGEST_EXPONENT, LARGEST_EXPONENT)},
    AttentionPooling: {"exponent": (-LARGEST_EXPONENT, LARGEST_EXPONENT), "query": (-(2**15), 2**15 - 1)},
    IntegerGELU: {"constants": (0, 2**16)},
    Spread: {"added": (0, 2**WIDE), "shift": (0, WIDE)},
    IntegerNorm: {"eps": (1, 2**60)},
    IntegerAttention: {"multiplier": (-(2**MULTIPLIER_BITS), 2**MULTIPLIER_BITS), "shift": (0, LARGEST_SHIFT)},
}
"""What the integers of each part are within."""


def _run_without_numbers(model: IntegerViT) -> None:
    """One picture through the model, shapes alone."""
    tensors = {f"model.{name}": tensor.to("meta") for name, tensor in model.state_dict().items()}
    pixels = torch.empty(1, len(model.pixel_start), *model.size, dtype=torch.uint8, device="meta")
    torch.func.functional_call(_OneOfEachBlock(model), tensors, (pixels,))


class _OneOfEachBlock(nn.Module):
    """The model; of blocks whose tensors have the same shapes, one runs for all, as half a second each takes."""

    def __init__(self, model: IntegerViT):
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> None:
        h, found = self.model.embed(pixels), {}
        for block in self.model.blocks:
            parts = tuple((name, type(module)) for name, module in block.named_modules())
            tensors = tuple((name, x.shape, x.dtype) for name, x in block.state_dict().items())
            kind = parts, tensors, h.shape
            if kind not in found:
                found[kind] = block(h)
            h = found[kind]
        self.model.head(h)


def _within(name: str, tensor: Tensor, low: int, high: int) -> None:
    if int(tensor.min()) < low or int(tensor.max()) > high:
        raise ValueError(f"{name} must be from {low} to {high}; it is from {int(tensor.min())} to {int(tensor.max())}")


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r:.80}")
    return value


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name} must be height and width, got {value!r:.80}")
    height, width = (_whole(name, side, 1, 2**16) for side in value)
    return height, width


def _output_class(name: Any) -> Callable[..., Any] | None:
    """transformers' class of that name, which must be of outputs."""
    if name is None:
        return None
    if isinstance(name, str) and re.fullmatch(r"transformers(\.[a-z][a-z0-9_]*)+\.[A-Za-z0-9]+", name):
        module, _, last = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), last, None)
        except ImportError:
            found = None
        if isinstance(found, type) and any(base.__name__ == "ModelOutput" for base in found.__mro__):
            return found
    raise ValueError(f"output must be a class of transformers' outputs or null, got {name!r:.80}")
