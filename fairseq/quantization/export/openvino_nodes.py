"""ONNX nodes of packed layers from which OpenVINO reads packed integers, and on a CPU multiplies bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.export.onnx_nodes import GraphBuilder, centred_codes


class OpenVINOBuilder(GraphBuilder):
    """Puts the nodes of packed layers where their placeholders are, in the forms that OpenVINO knows.

    ``MatMulInteger`` runs in float32 there, and its weights may become constants of four bytes. Integers that are cast
    and scaled stay as they are, and with rounded inputs a CPU multiplies bytes, if the weight has no zero point. That
    is subtracted before where the difference is small enough, up to 6 bits, and else after the product, x rounded to
    q::

        sum q (w - z) s  =  s sum q w  -  s z sum q
    """

    def __init__(self, model: Any, layers: list[PackedLinear], names: list[str]):
        super().__init__(model, layers, names, "standard")
        self.rounded_floats: dict[tuple[str, str], str] = {}
        self.sums: dict[str, str] = {}

    def product(self, layer: PackedLinear, name: str, q: str, zero: str, scale: str | None) -> str:
        x, bits = self.as_floats(q, zero), layer.config.bits
        weight_scale = _rows(layer.scale, layer.out_features).astype(np.float32)
        if scale is not None:
            assert layer.input_scale is not None
            weight_scale = weight_scale * np.float32(layer.input_scale.item())
        codes, zero_point = centred_codes(layer)
        zero_point = _rows(zero_point, layer.out_features)
        if bits <= 4:  # 4 bits in the file, bytes in memory
            int8 = {"to": self.onnx.TensorProto.INT8}
            zeros = self.op("Cast", [self.constant4(f"{name}.zero_point", zero_point)], **int8)
            integers = self.op("Sub", [self.op("Cast", [self.weight_codes(layer, name, codes)], **int8), zeros])
        else:
            integers = self.weight_codes(layer, name, codes if bits > 6 else (codes - zero_point).astype(np.int8))
        y = self.times(x, integers, self.constant(f"{name}.scale", weight_scale))
        if bits < 7 or not zero_point.any():
            return y
        shift = self.constant(f"{name}.shift", weight_scale[:, 0] * zero_point[:, 0].astype(np.float32))
        return self.op("Sub", [y, self.op("Mul", [self.token_sum(x, layer.in_features), shift])])

    def dequantized(self, layer: PackedLinear, name: str) -> str:
        """The weight as real numbers, (out, in), of integers with their zero points and scales."""
        weight, group = layer.weight_matrix, layer.config.group_size
        outputs, inputs = layer.out_features, layer.in_features
        codes, scale, zero_point = weight.unpacked().numpy(), layer.scale.numpy(), weight.code_zero_point().numpy()
        if group is None:
            scale, zero_point = _rows(layer.scale, outputs), _rows(weight.code_zero_point(), outputs)
        else:
            codes = np.pad(codes, ((0, 0), (0, -inputs % group))).reshape(outputs, -1, group)
            scale, zero_point = scale[..., None], zero_point[..., None]
        make = self.constant if layer.config.bits > 4 else self.constant4
        zero = make(f"{name}.zero_point", zero_point.astype(np.int8))
        integers = self.op("Sub", [self.to_float(self.weight_codes(layer, name, codes)), self.to_float(zero)])
        real = self.op("Mul", [integers, self.constant(f"{name}.scale", scale.astype(np.float32))])
        if group is None:
            return real
        real = self.op("Reshape", [real, self.constant(f"{name}.shape", np.array([outputs, -1]))])
        if inputs % group == 0:
            return real
        start, end, axis = (self.constant(f"{name}.{what}", np.array([n])) for what, n in
                            (("start", 0), ("end", inputs), ("axis", 1)))  # fmt: skip
        return self.op("Slice", [real, start, end, axis])

    def integers(self, x: list[str]) -> tuple[str, str]:
        one = self.constant("fairseq.one", np.float32(1))
        return self.op("QuantizeLinear", [x[0], one, self.zero()]), x[1]

    def as_floats(self, q: str, zero: str) -> str:
        """q - zero; OpenVINO makes one FakeQuantize of it and the QuantizeLinear before, which several layers read."""
        if (q, zero) not in self.rounded_floats:
            inputs = [q, self.constant("fairseq.one", np.float32(1)), zero]
            self.rounded_floats[q, zero] = self.op("DequantizeLinear", inputs)
        return self.rounded_floats[q, zero]

    def token_sum(self, x: str, width: int) -> str:
        """Of each token, (..., 1): a product with ones, as OpenVINO 2026.4 adds up rounded inputs wrongly."""
        if x not in self.sums:
            ones = self.constant(f"fairseq.ones_{width}", np.ones((1, width), np.int8))
            self.sums[x] = self.times(x, ones, self.constant("fairseq.one_row", np.ones((1, 1), np.float32)))
        return self.sums[x]

    def times(self, x: str, integers: str, scale: str) -> str:
        """x times the transpose of the integers (out, in) with their scale (out, 1)."""
        real = self.op("Mul", [self.to_float(integers), scale])
        return self.op("MatMul", [x, self.op("Transpose", [real], perm=[1, 0])])

    def weight_codes(self, layer: PackedLinear, name: str, codes: Any) -> str:
        make = self.constant if layer.config.bits > 4 else self.constant4
        return make(f"{name}.weight_codes", codes)

    def to_float(self, x: str) -> str:
        return self.op("Cast", [x], to=self.onnx.TensorProto.FLOAT)


def _rows(values: Any, outputs: int) -> Any:
    """A number, or one per output -> (out, 1)."""
    return np.broadcast_to(np.asarray(values).reshape(-1, 1), (outputs, 1))
