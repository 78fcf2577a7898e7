"""An IntegerViT as an ONNX model: uint8 pixels in, int32 outputs out, and operators on integers between."""

from __future__ import annotations

import json
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fairseq.modules.quantization.integer.attention import ROW_SHIFT
from fairseq.modules.quantization.integer.dyadic import Requantize
from fairseq.modules.quantization.integer.normalization import STREAM_BITS
from fairseq.quantization.export.integer_nodes import MIDDLE, OPSET, IntegerNodes
from fairseq.quantization.integer_only.block import IntegerBlock
from fairseq.quantization.integer_only.head import AttentionPooling, Readout
from fairseq.quantization.integer_only.layers import (
    WIDE,
    IntegerActivation,
    IntegerAttention,
    IntegerLinear,
    IntegerNorm,
    Spread,
)
from fairseq.quantization.integer_only.model import PIXELS, IntegerViT

INPUTS = {"uint8": "pixels", "float32": "pixel_values"}
"""What a file takes: the pixels themselves, or what the float model takes, which its first nodes round."""
IR_VERSION = 10

Bytes = tuple[str, str, str | None]
"""uint8 integers, their zero point, and the scale of each row, if it has one."""


def output_names(model: IntegerViT) -> tuple[str, ...]:
    """What a file calls the outputs of ``model``."""
    return tuple(f"integer_{name}" for name in model.head.outputs)


def integer_model(model: IntegerViT, pixels: str = "uint8") -> Any:
    """The ONNX model, of opset 21, whose batch size is free.

    Args:
        model: on the CPU.
        pixels: "uint8", or "float32" for nodes that round pixel values before; they are the only ones with floats, and
            what they give is called "pixels".
    """
    return _Graph(model).build(pixels)


class _Graph(IntegerNodes):
    def __init__(self, model: IntegerViT):
        super().__init__()
        self.model, self.dynamic = model, model.bits == WIDE

    def build(self, pixels: str) -> Any:
        helper, kinds, model = self.onnx.helper, self.onnx.TensorProto, self.model
        if pixels == "float32":
            self.round_pixels()
        h = self.embed(INPUTS["uint8"])
        for i, block in enumerate(model.blocks):
            h = self.block(h, block, f"blocks.{i}")  # type: ignore[arg-type]
        outputs = self.head(h)
        shape = ["batch", len(model.pixel_start), *model.size]
        kind = kinds.UINT8 if pixels == "uint8" else kinds.FLOAT
        graph = helper.make_graph(
            self.nodes, "integers", [helper.make_tensor_value_info(INPUTS[pixels], kind, shape)],
            [helper.make_tensor_value_info(name, kinds.INT32, dimensions) for name, dimensions in outputs],
            list(self.constants.values()),
        )  # fmt: skip
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        helper.set_model_props(made, {name: json.dumps(value) for name, value in self.properties().items()})
        return made

    def properties(self) -> dict[str, Any]:
        """What the integers stand for: a logit is its integer / 2**logit_exponent, a pixel is start + step * p.

        The exponents of other outputs are called by their names, too, such as "pooler_output_exponent".
        """
        start, step = self.model.pixel_start.tolist(), self.model.pixel_step.tolist()
        exponents = {f"{name}_exponent": int(e) for name, e in self.model.head.exponents().items()}
        if "logits_exponent" in exponents:
            exponents = {"logit_exponent": exponents.pop("logits_exponent"), **exponents}
        return {**exponents, "pixel_start": start, "pixel_step": step}

    def round_pixels(self) -> None:
        """The one part with floats: pixel values to "pixels", in float64, rounded half to even."""
        self.scope = "round_pixels"
        start, step = (_numpy(t[:, None, None]) for t in (self.model.pixel_start, self.model.pixel_step))
        x = self.op("Cast", INPUTS["float32"], to=self.onnx.TensorProto.DOUBLE)
        x = self.op("Div", self.op("Sub", x, self.constant(start, "pixel_start")), self.constant(step, "pixel_step"))
        ends = (self.constant(np.array(end, np.float64), f"pixel_{end}") for end in (0, PIXELS - 1))
        x = self.op("Clip", self.op("Round", x), *ends)
        kind, name = self.onnx.TensorProto.UINT8, INPUTS["uint8"]
        self.nodes.append(self.onnx.helper.make_node("Cast", [x], [name], name=name, to=kind))

    def embed(self, pixels: str) -> str:
        self.scope = "embed"
        model, channels = self.model, len(self.model.pixel_start)
        (height, width), patch = model.patch, model.patches.weight.shape[1]
        rows, columns = model.size[0] // height, model.size[1] // width
        cut = self.reshape(pixels, 0, channels, rows, height, columns, width)
        cut = self.op("Transpose", cut, perm=[0, 2, 4, 1, 3, 5])
        read = self.reshape(cut, 0, rows * columns, patch), self.middle(), None
        embedded = self.linear(read, model.patches, "patches")
        first = len(model.constants) - rows * columns
        if first:
            embedded = self.op("Pad", embedded, self.constant(np.array([0, first, 0, 0, 0, 0])))
        h = self.saturate(self.op("Add", embedded, self.constant(_numpy(model.constants), "constants")))
        return h if model.before is None else self.norm(h, model.before, "before")

    def head(self, h: str) -> list[tuple[str, list[Any]]]:
        """The outputs, each with its dimensions."""
        found: dict[str, str] = {}
        sizes: dict[str, list[int]] = {}
        for name, readout in self.model.head.readouts.items():
            if isinstance(readout, AttentionPooling):
                found[name], sizes[name] = self.attention_pooling(h, readout, f"head.readouts.{name}")
            else:
                found[name], sizes[name] = self.readout(h, readout, f"head.readouts.{name}")  # type: ignore[arg-type]
        outputs: list[tuple[str, list[Any]]] = []
        for output, (name, sources) in zip(output_names(self.model), self.model.head.outputs.items()):
            self.scope = name
            total = found[sources[0]]
            for source in sources[1:]:
                total = self.op("Add", total, found[source])
            node = self.onnx.helper.make_node("Cast", [total], [output], name=output, to=self.onnx.TensorProto.INT32)
            self.nodes.append(node)
            outputs.append((output, ["batch", *sizes[sources[0]]]))
        return outputs

    def readout(self, h: str, readout: Readout, name: str) -> tuple[str, list[int]]:
        tokens, width = self.model.constants.shape
        norm, ranges = readout.norm, readout.tokens
        x = h if norm is None or not readout.norm_first else self.norm(h, norm, f"{name}.norm")
        self.scope, size = name, [tokens, width]
        if ranges is not None:
            means = [self.mean(x, start, stop) for start, stop in ranges]
            x, size = means[0] if len(means) == 1 else self.op("Concat", *means, axis=-1), [width * len(means)]
        x = x if norm is None or readout.norm_first else self.norm(x, norm, f"{name}.norm")
        x = x if readout.read is None else self.result(x, readout.read, f"{name}.read")
        if readout.linear is None:
            return x, size
        return self.linear(self.to_bytes(x), readout.linear, f"{name}.linear"), [*size[:-1], len(readout.linear.weight)]

    def attention_pooling(self, h: str, pooling: AttentionPooling, name: str) -> tuple[str, list[int]]:
        read = self.to_bytes(self.norm(h, pooling.norm, f"{name}.norm"))
        key, value = (self.linear(read, getattr(pooling, role), f"{name}.{role}") for role in ("key", "value"))
        self.scope = name
        zeros = self.mul(
            self.op("Slice", key, *(self.constant(np.array([i])) for i in (0, 1, 1))), 0
        )  # (batch, 1, columns)
        query = self.add(zeros, _numpy(pooling.query))
        attended = self.to_bytes(self.attention(query, key, value, pooling.attention, f"{name}.attention", queries=1))
        y = self.linear(attended, pooling.output, f"{name}.output")
        read = self.to_bytes(self.norm(y, pooling.norm2, f"{name}.norm2"))
        t, width = self.linear(read, pooling.fc1, f"{name}.fc1"), len(pooling.fc1.weight)
        hidden = self.activation(t, cast(IntegerActivation, pooling.activation), width, f"{name}.activation", tokens=1)
        branch = self.linear(self.to_bytes(hidden, unsigned=True), pooling.fc2, f"{name}.fc2")
        size = len(pooling.fc2.weight)
        return self.reshape(self.saturate(self.op("Add", y, branch)), -1, size), [size]

    def saturate(self, h: str) -> str:
        """To the width of the residual stream."""
        return self.clip(h, -(2 ** (STREAM_BITS - 1)), 2 ** (STREAM_BITS - 1) - 1)

    def block(self, h: str, block: IntegerBlock, name: str) -> str:
        read = self.to_bytes(self.norm(h, block.norm1, f"{name}.norm1"))
        roles = {"query": block.query, "key": block.key, "value": block.value}
        query, key, value = (self.linear(read, layer, f"{name}.{role}") for role, layer in roles.items())
        attended = self.to_bytes(self.attention(query, key, value, block.attention, f"{name}.attention"))
        h = self.saturate(self.op("Add", h, self.linear(attended, block.output, f"{name}.output")))
        read = self.to_bytes(self.norm(h, block.norm2, f"{name}.norm2"))
        t, width = self.linear(read, block.fc1, f"{name}.fc1"), len(block.fc1.weight)
        hidden = self.activation(t, block.activation, width, f"{name}.activation")
        branch = self.linear(self.to_bytes(hidden, unsigned=True), block.fc2, f"{name}.fc2")
        return self.saturate(self.op("Add", h, branch))

    def to_bytes(self, z: str, unsigned: bool = False) -> Bytes:
        if not self.dynamic:
            return self.bytes_of(z), self.middle(), None
        if unsigned:
            q, m = self.unsigned_rows(z)
            return q, "", m
        q, m = self.rows(z, -1)
        return q, self.middle(), m

    def linear(self, read: Bytes, layer: IntegerLinear, name: str) -> str:
        self.scope = name
        q, zero, m = read
        accumulator = self.product(q, *self.weight(layer.weight, zero, name))
        return self.result(accumulator if m is None else self.op("Mul", accumulator, m), layer.output, f"{name}.output")

    def weight(self, weight: Tensor, a_zero: str, name: str) -> tuple[str, str, str]:
        """uint8 (in, out), and both zero points; 4 bits in the file where a row spans no more."""
        w = weight.to(torch.int16)
        low = w.amin(-1).clamp(max=0)
        if int((w.amax(-1) - low).max()) < 16 and int(low.min()) > -16:
            codes = (w - low[:, None]).T.to(torch.uint8).numpy()
            stored = self.constant4(codes, f"{name}.weight_codes")
            zero = self.constant((-low).to(torch.uint8).numpy(), f"{name}.zero_point")
            return self.cast(stored, "UINT8"), a_zero, zero
        codes = (w + MIDDLE).T.to(torch.uint8).numpy()
        return self.constant(codes, f"{name}.weight_codes"), a_zero, self.middle()

    def constant4(self, codes: NDArray[np.uint8], name: str) -> str:
        """Integers from 0 to 15, two in a byte."""
        flat = np.append(codes.ravel(), np.zeros(codes.size % 2, np.uint8))
        packed = (flat[0::2] | flat[1::2] << 4).tobytes()
        kind = self.onnx.TensorProto.UINT4
        self.constants[name] = self.onnx.helper.make_tensor(name, kind, codes.shape, packed, raw=True)
        return name

    def result(self, x: str, output: nn.Module, name: str) -> str:
        """A Requantize, or one and a Spread."""
        if isinstance(output, nn.Sequential):
            requantize, spread = output
            return self.spread(self.result(x, requantize, f"{name}.0"), spread)  # type: ignore[arg-type]
        assert isinstance(output, Requantize)
        multiplier, shift = _numpy(output.multiplier), _numpy(output.shift)
        offset = 0 if output.offset is None else _numpy(output.offset)
        limit = 2 ** (output.bits - 1)
        return self.clip(self.round_shift(self.mul(x, multiplier), shift, offset), -limit, limit - 1)

    def spread(self, z: str, spread: Spread) -> str:
        columns = self.op("Gather", z, self.constant(_numpy(spread.columns)), axis=-1)
        return self.clip(self.shift(columns, _numpy(spread.shift), _numpy(spread.added), spread.zero), -128, 127)

    def norm(self, h: str, norm: IntegerNorm, name: str) -> str:
        self.scope = name
        normalized = self.normalize(h, int(norm.eps), self.model.constants.shape[1])
        return self.result(normalized, norm.output, f"{name}.output")

    def activation(self, t: str, activation: IntegerActivation, width: int, name: str, tokens: int = 0) -> str:
        self.scope = name
        y = self.piecewise(t, _numpy(activation.entries), tokens or len(self.model.constants), width)
        return self.result(y, activation.output, f"{name}.output")

    def attention(
        self, query: str, key: str, value: str, attention: IntegerAttention, name: str, queries: int = 0
    ) -> str:
        self.scope = name
        heads, tokens = len(attention.multiplier), len(self.model.constants)
        queries = queries or tokens
        query = self.heads(query, heads, queries)
        key, value = (self.heads(x, heads, tokens) for x in (key, value))
        multiplier, shift = _numpy(attention.multiplier), _numpy(attention.shift)  # (heads, 1, 1)
        if self.dynamic:
            (q, query_m), (k, key_m), (v, value_m) = self.rows(query, -1), self.rows(key, -1), self.rows(value, -2, -1)
            row = self.round_shift(self.mul(query_m, multiplier), ROW_SHIFT)
            s = self.op("Mul", self.scores(q, k), self.op("Transpose", key_m, perm=[0, 1, 3, 2]))
            u = self.round_shift(self.op("Mul", s, row), shift - ROW_SHIFT)
            mixed = self.op("Mul", self.attend(u, v, heads, queries, tokens), value_m)
        else:
            q, k, v = (self.bytes_of(x) for x in (query, key, value))
            u = self.round_shift(self.mul(self.scores(q, k), multiplier), shift)
            mixed = self.attend(u, v, heads, queries, tokens)
        mixed = self.reshape(self.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, queries, -1)
        return self.result(mixed, attention.output, f"{name}.output")

    def heads(self, x: str, heads: int, tokens: int) -> str:
        return self.op("Transpose", self.reshape(x, 0, tokens, heads, -1), perm=[0, 2, 1, 3])

    def scores(self, q: str, k: str) -> str:
        return self.product(q, self.op("Transpose", k, perm=[0, 1, 3, 2]), self.middle(), self.middle())


def _numpy(tensor: Tensor) -> NDArray[Any]:
    """Integers as int64."""
    values = tensor.detach().cpu()
    found: NDArray[Any] = (values if values.is_floating_point() else values.to(torch.int64)).numpy()
    return found
