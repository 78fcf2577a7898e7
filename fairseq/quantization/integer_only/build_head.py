"""build_head: from what a float model does behind its blocks, and what calibration saw of it, to an IntegerHead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairseq.modules.quantization.integer.dyadic import power_of_two
from fairseq.quantization.engine.spec import Norm
from fairseq.quantization.integer_only.build import (
    LEAST_REACH,
    STREAM_HEADROOM,
    Builder,
    bytes_of,
    factor_of,
    gain_of,
    linear,
    output_of,
    weight_of,
)
from fairseq.quantization.integer_only.head import LOGIT_BITS, AttentionPooling, IntegerHead, Readout
from fairseq.quantization.integer_only.head_spec import AttentionSpec, HeadSpec, ReadoutSpec
from fairseq.quantization.integer_only.layers import IntegerNorm
from fairseq.quantization.integer_only.ranges import Range


def build_head(builder: Builder, spec: HeadSpec) -> IntegerHead:
    """The integers of a head; readouts that one output is the mean of get the same exponent."""
    readouts: dict[str, Any] = {}
    for name, readout in spec.readouts.items():
        together = {source for sources in spec.outputs.values() if name in sources for source in sources}
        if isinstance(readout, AttentionSpec):
            readouts[name] = _pooling(builder, name, readout)
        elif readout.linear is None:
            readouts[name] = _tokens(builder, name, readout)
        else:
            reach = max(float(builder.ranges[("head", source, "out")].reach.max()) for source in together)
            readouts[name] = _readout(
                builder, name, readout, power_of_two(STREAM_HEADROOM * max(reach, LEAST_REACH), LOGIT_BITS)
            )
    return IntegerHead(readouts, spec.outputs)


def _tokens(builder: Builder, name: str, spec: ReadoutSpec) -> Readout:
    """Tokens as they are, or normed."""
    norm, exponent = _wide_norm(builder, name, spec.norm)
    return Readout(builder.bits, exponent, spec.tokens, norm, spec.norm_first)


def _wide_norm(builder: Builder, name: str, norm: Norm | None) -> tuple[IntegerNorm | None, int]:
    """A norm that gives the finest 24 bits that nothing can exceed; without one, the exponent of the stream."""
    if norm is None:
        return None, builder.exponent
    gain, bias = gain_of(norm, builder.width)
    exponent = power_of_two(max(float((gain.abs() + bias.abs()).max()), LEAST_REACH), LOGIT_BITS)
    return builder.wide_norm(norm, builder.width, exponent, LOGIT_BITS, f"{name}, norm"), exponent


def _readout(builder: Builder, name: str, spec: ReadoutSpec, exponent: int) -> Readout:
    layer, key = spec.linear, ("head", name)
    weight = weight_of(layer, f"the layer of {name}")
    read = None
    if spec.norm is not None and not spec.norm_first:
        norm: IntegerNorm | None
        norm, source = builder.norm(spec.norm, builder.width, key, [layer], f"{name}, norm")
    else:
        norm, pooled = _wide_norm(builder, name, spec.norm)
        factor = factor_of([layer], layer.in_features, name)
        source = builder.grid(key, [layer], factor)
        read = output_of(source, factor * 2.0**-pooled / source.step, 0 * factor, f"{name}, what is read")
    made = linear(weight, source, 2.0**-exponent, LOGIT_BITS, f"{name}, linear")
    return Readout(builder.bits, exponent, spec.tokens, norm, spec.norm_first, read, made)


def _pooling(builder: Builder, name: str, spec: AttentionSpec) -> AttentionPooling:
    """Its weights of attention become the nearest bytes: they are no layers, which calibration would have rounded."""
    i, ranges = ("head", name), builder.ranges
    y, added = ranges[(i, "stream")], ranges[(i, "fc2", "out")]
    both = Range(y.low + added.low, y.high + added.high)
    inner = Builder(builder.dynamic, {**ranges, "stream": both.joined(y)}, builder.functions)
    norm, source = builder.norm(spec.norm, builder.width, (i, "key"), [], f"{name}, norm")
    query, heads, out = spec.query().double(), spec.heads, spec.attention.out_proj
    reaches = (query.abs(), *(ranges[(i, role, "out")].reach for role in ("key", "value")))
    steps = [builder.projection_step(reach, heads) for reach in reaches]
    if not builder.dynamic:
        steps[2] = reaches[2].clamp(min=LEAST_REACH) / 127
    half = 2 ** (builder.bits - 1)
    key, value = (
        linear(_bytes(*spec.projection(part), name), source, steps[part], builder.bits, f"{name}, {role}")
        for part, role in ((1, "key"), (2, "value"))
    )
    scaling = (len(query) // heads) ** -0.5
    attention, attended = builder.mixing(i, steps, heads, len(query), scaling, [], name)
    bias = torch.zeros(len(query)) if out.bias is None else out.bias.detach()
    output = inner.branch(_bytes(out.weight.detach(), bias, name), attended, None, f"{name}, output")
    return AttentionPooling(
        builder.bits, inner.exponent, torch.round(query / steps[0]).clamp(-half, half - 1)[None], norm, key, value,
        attention, output, *inner.mlp(i, spec.norm2, builder.width, spec.fc1, spec.fc2, spec.activation, None, name),
    )  # fmt: skip


def _bytes(weight: Tensor, bias: Tensor, name: str) -> Any:
    return bytes_of(weight.double(), bias.double(), name)
