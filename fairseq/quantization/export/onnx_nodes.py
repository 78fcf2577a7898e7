"""ONNX nodes of packed layers: integers and what multiplies them, in the place of each layer's placeholder."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from torch import Tensor

from fairseq.modules.quantization.packed import PackedLinear

CONTRIB = "com.microsoft"
DOMAIN = "fairseq"
NBITS_BLOCKS = (32, 64, 128)
PROBE, PROBE_CODES = 64, "fairseq.probe_codes"
TINY = float(np.finfo(np.float32).tiny)


class GraphBuilder:
    """Puts the nodes and integers of packed layers where their placeholders are in an ONNX model, in place."""

    def __init__(self, model: Any, layers: list[PackedLinear], names: list[str], ops: str):
        self.helper = importlib.import_module("onnx.helper")
        self.onnx = importlib.import_module("onnx")
        self.model, self.layers, self.names, self.contrib = model, layers, names, ops == "onnxruntime"
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.exact_here: str | None = None
        self.rounded: dict[str, tuple[str, str]] = {}  # the query, key and value layers read one tensor

    def build(self) -> Any:
        graph = self.model.graph
        for node in list(graph.node):
            if node.domain == DOMAIN:
                self.layer(node)
            else:
                del node.metadata_props[:]  # where in the Python code it comes from
                self.nodes.append(node)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.constants.values())
        versions = {entry.domain: entry.version for entry in self.model.opset_import}
        versions.pop(DOMAIN, None)
        if self.contrib:
            versions[CONTRIB] = 1
        del self.model.opset_import[:]
        self.model.opset_import.extend(self.helper.make_opsetid(*pair) for pair in versions.items())
        return self.model

    def layer(self, node: Any) -> None:
        """All nodes of one packed layer."""
        number = self.helper.get_attribute_value(node.attribute[0])
        layer, name, x, out = self.layers[number], self.names[number], list(node.input), node.output[0]
        config = layer.config
        if config.activations is None:
            self.float_product(layer, name, x[0], None, out)
        elif config.group_size is not None:
            q, scale = self.float_rounded(layer, name, x)
            self.float_product(layer, name, q, scale, out)
        elif config.activations == "static" and len(x) == 1:
            scale, zero_point = self.static_grid(layer, name)
            q = self.op("QuantizeLinear", [x[0], scale, zero_point])
            y = self.product(layer, name, q, zero_point, scale)
            self.finish(layer, name, y, None, out)
        else:
            q, scale = self.integers(x) if len(x) == 2 else self.tokens(x[0], layer.in_features)
            y = self.product(layer, name, q, self.zero(), None)
            self.finish(layer, name, y, scale, out)

    def product(self, layer: PackedLinear, name: str, q: str, zero: str, scale: str | None) -> str:
        """Integer product times the weight's scale, and times ``scale``, a number."""
        weight_scale = _flat(layer.scale).astype(np.float32)
        if self.contrib:
            one = scale or self.constant("fairseq.one", np.float32(1))
            factors = one, self.constant(f"{name}.scale", weight_scale), zero
            if may_saturate(layer):
                return self.either_product(layer, name, q, *factors)
            codes, zero_point = self.codes(layer, name)
            return self.op("MatMulIntegerToFloat", [q, codes, *factors, zero_point], domain=CONTRIB)
        codes, zero_point = self.codes(layer, name, unsigned=may_saturate(layer))
        if scale is not None:
            assert layer.input_scale is not None
            weight_scale = weight_scale * np.float32(layer.input_scale.item())
        y = self.op("Cast", [self.op("MatMulInteger", [q, codes, zero, zero_point])], to=self.onnx.TensorProto.FLOAT)
        return self.op("Mul", [y, self.constant(f"{name}.scale", weight_scale)])

    def either_product(self, layer: PackedLinear, name: str, q: str, one: str, scale: str, zero: str) -> str:
        """The product with signed bytes where that is exact, else with unsigned ones; decided when a file is loaded.

        Where signed ones are exact they are faster, too; see :meth:`exact`. A cast to uint8 keeps the bits, and the
        other sign bit adds 128: no wider copy of a weight is made.
        """
        codes, zero_point = self.codes(layer, name)
        shifted = self.constant(f"{name}.shifted_zero_point", _unsigned(_flat(centred_codes(layer)[1])))
        middle = self.constant("fairseq.sign_bit", np.uint8(128))
        make, kinds = self.helper.make_node, self.onnx.TensorProto
        result = self.helper.make_tensor_value_info(f"{name}.product", kinds.FLOAT, None)

        def product(weight: str, weight_zero: str) -> Any:
            inputs = [q, weight, one, scale, zero, weight_zero]
            return make("MatMulIntegerToFloat", inputs, [result.name], domain=CONTRIB, name=f"{name}.product")

        shift = [
            make("Cast", [codes], [f"{name}.same_bits"], to=kinds.UINT8),
            make("BitwiseXor", [f"{name}.same_bits", middle], [f"{name}.unsigned"]),
        ]
        signed = self.helper.make_graph([product(codes, zero_point)], "signed", [], [result])
        unsigned = self.helper.make_graph([*shift, product(f"{name}.unsigned", shifted)], "unsigned", [], [result])
        return self.op("If", [self.exact()], then_branch=signed, else_branch=unsigned)

    def exact(self) -> str:
        """Whether products of uint8 and int8 are exact on the processor that loads the file: a bool.

        On x86 without VNNI onnxruntime adds two of them in 16 bits, which saturate. This is such a product of
        constants, which onnxruntime computes before the first run; so of each If only one branch is left.
        """
        if self.exact_here is None:
            x = self.constant("fairseq.probe", np.full((2, PROBE), 255, np.uint8))
            w = self.constant(PROBE_CODES, np.full((PROBE, 16), 127, np.int8))
            least = self.op("ReduceMin", [self.op("MatMulInteger", [x, w])], keepdims=0)
            self.exact_here = self.op("Equal", [least, self.constant("fairseq.probe_sum", np.int32(255 * 127 * PROBE))])
        return self.exact_here

    def codes(self, layer: PackedLinear, name: str, unsigned: bool = False) -> tuple[str, str]:
        """The weight as int8 or uint8 (in, out), stored as 4-bit integers where they fit, and its zero point."""
        codes, zero_point = centred_codes(layer)
        codes, zero_point, stored = codes.T, _flat(zero_point), f"{name}.weight_codes"
        if unsigned:
            codes, zero_point = _unsigned(codes), _unsigned(zero_point)
        if layer.config.bits > 4:
            self.constant(stored, codes)
        else:  # onnxruntime makes bytes of them when it loads the model
            self.constant4(stored, codes)
            stored = self.op("Cast", [stored], to=self.onnx.TensorProto.INT8)
        return stored, self.constant(f"{name}.zero_point", zero_point)

    def tokens(self, x: str, width: int) -> tuple[str, str]:
        """Each token rounded by its own scale, uint8 around 128, and the scales (..., 1)."""
        if x in self.rounded:
            return self.rounded[x]
        axis, inverse = self.constant("fairseq.axis", np.array([-1])), self.constant("fairseq.inverse", _inverse())
        high = self.op("ReduceMax", [x, axis], keepdims=1)
        low = self.op("Neg", [self.op("ReduceMin", [x, axis], keepdims=1)])
        floor = self.constant("fairseq.floor", np.float32(127 * TINY))
        scale = self.op("Mul", [self.op("Max", [high, low, floor]), inverse])
        if self.contrib:  # blocks of a whole token: division and rounding in one pass
            zero = self.op("Expand", [self.zero(), self.op("Shape", [scale])])
            q = self.op("QuantizeLinear", [x, scale, zero], axis=-1, block_size=width)
        else:
            one = self.constant("fairseq.one", np.float32(1))
            q = self.op("QuantizeLinear", [self.op("Div", [x, scale]), one, self.zero()])
        self.rounded[x] = q, scale
        return q, scale

    def integers(self, x: list[str]) -> tuple[str, str]:
        """Integers in a float tensor as uint8 around 128, and the scales as they came."""
        q = self.op("Add", [x[0], self.constant("fairseq.middle", np.float32(128))])
        return self.op("Cast", [q], to=self.onnx.TensorProto.UINT8), x[1]

    def float_rounded(self, layer: PackedLinear, name: str, x: list[str]) -> tuple[str, str]:
        """Integers as a float tensor, and the scale of each token or of all."""
        if len(x) == 2:
            return x[0], x[1]
        if layer.config.activations == "static":
            scale, zero = self.static_grid(layer, name)
            q = self.op("QuantizeLinear", [x[0], scale, zero])
        else:
            (q, scale), zero = self.tokens(x[0], layer.in_features), self.zero()
        return self.op("DequantizeLinear", [q, self.constant("fairseq.one", np.float32(1)), zero]), scale

    def float_product(self, layer: PackedLinear, name: str, x: str, scale: str | None, out: str) -> None:
        """Product with the dequantized weight."""
        if self.contrib and layer.config.group_size in (None, *NBITS_BLOCKS):
            y = self.nbits(layer, name, x)
        else:
            y = self.op("MatMul", [x, self.op("Transpose", [self.dequantized(layer, name)], perm=[1, 0])])
        self.finish(layer, name, y, scale, out)

    def dequantized(self, layer: PackedLinear, name: str) -> str:
        """The weight as real numbers, (out, in).

        Scaled once more behind DequantizeLinear: of that and a product alone, onnxruntime makes one operator that
        rounds the activations of blocks to 8 bits.
        """
        weight, group = layer.weight_matrix, layer.config.group_size
        codes, zero_point = weight.unpacked().numpy(), weight.code_zero_point().numpy().astype(np.int8)
        make = self.constant if layer.config.bits > 4 else self.constant4
        scale = layer.scale.numpy().astype(np.float32)
        if group is None:
            scale, zero_point = np.broadcast_to(scale, len(codes)), np.broadcast_to(zero_point, len(codes))
        rows = scale.reshape(len(codes), -1).max(1, keepdims=True)  # (out, 1)
        relative = scale / (rows[:, 0] if group is None else rows)
        stored = [make(f"{name}.weight_codes", codes), self.constant(f"{name}.relative_scale", relative)]
        stored.append(make(f"{name}.zero_point", zero_point))
        blocks: dict[str, Any] = {"axis": 0} if group is None else {"axis": 1, "block_size": group}
        real = self.op("DequantizeLinear", stored, **blocks)
        return self.op("Mul", [real, self.constant(f"{name}.scale", rows)])

    def nbits(self, layer: PackedLinear, name: str, x: str) -> str:
        """onnxruntime's product with a weight of 4 or 8 bits in blocks along the inputs; activations stay in float."""
        bits, block = (8 if layer.config.bits > 4 else 4), layer.config.group_size or NBITS_BLOCKS[0]
        q, inputs = layer.integers().numpy(), layer.in_features
        blocks = -(-inputs // block)
        q = np.pad(q, ((0, 0), (0, blocks * block - inputs)))
        scale, zero = (_blockwise(t, layer.out_features, blocks) for t in (layer.scale, layer.zero_point))
        if bits == 4:
            q, zero = _nibbles(q), _nibbles(zero)
        codes = self.constant(f"{name}.weight_codes", q.reshape(layer.out_features, blocks, -1))
        scales = self.constant(f"{name}.scale", scale.astype(np.float32))
        zeros = self.constant(f"{name}.zero_point", zero.astype(np.uint8))
        return self.op(
            "MatMulNBits", [x, codes, scales, zeros], domain=CONTRIB,
            K=inputs, N=layer.out_features, bits=bits, block_size=block, accuracy_level=1,
        )  # fmt: skip

    def finish(self, layer: PackedLinear, name: str, y: str, scale: str | None, out: str) -> None:
        """Times ``scale``, plus the bias, as the tensor ``out``."""
        if scale is not None:
            y = self.op("Mul", [y, scale], None if layer.bias is not None else out)
        if layer.bias is not None:
            bias = self.constant(f"{name}.bias", layer.bias.float().numpy())
            self.op("Add", [y, bias], out)
        elif scale is None:
            self.op("Identity", [y], out)

    def static_grid(self, layer: PackedLinear, name: str) -> tuple[str, str]:
        """The fixed scale of the input and its zero point as uint8."""
        assert layer.input_scale is not None
        assert layer.input_zero_point is not None
        scale = np.float32(layer.input_scale.item())
        zero = np.uint8(layer.input_zero_point.item() + 128)
        return self.constant(f"{name}.input_scale", scale), self.constant(f"{name}.input_zero_point", zero)

    def zero(self) -> str:
        return self.constant("fairseq.zero", np.uint8(128))

    def constant(self, name: str, value: Any) -> str:
        if name not in self.constants:
            array = np.ascontiguousarray(value).reshape(np.shape(value))
            self.constants[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def constant4(self, name: str, value: Any) -> str:
        """Integers from 0 to 15 as UINT4, two in a byte."""
        if name not in self.constants:
            kind = self.onnx.TensorProto.UINT4
            raw = _nibbles(np.ascontiguousarray(value).astype(np.uint8).reshape(1, -1)).tobytes()
            self.constants[name] = self.onnx.TensorProto(name=name, data_type=kind, dims=value.shape, raw_data=raw)
        return name

    def op(self, kind: str, inputs: list[str], out: str | None = None, domain: str = "", **attributes: Any) -> str:
        out = out or f"fairseq_{len(self.nodes)}"
        name = f"fairseq_{kind}_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(kind, inputs, [out], name=name, domain=domain, **attributes))
        return out


def centred_codes(layer: PackedLinear) -> tuple[Any, Any]:
    """The weight's codes, int8 (out, in), and their zero point as it came; those of 7 bits from -64 to 63."""
    weight, middle = layer.weight_matrix, 64 if layer.config.bits == 7 else 0
    return weight.unpacked().numpy() - np.int8(middle), (weight.code_zero_point() - middle).numpy().astype(np.int8)


def rounds_both(layer: PackedLinear) -> bool:
    """Whether a layer multiplies integers by integers."""
    return layer.config.activations is not None and layer.config.group_size is None


def may_saturate(layer: PackedLinear) -> bool:
    """Whether two products of a code and an unsigned byte may be past 16 bits: only at 8 bits."""
    return int(np.abs(centred_codes(layer)[0].astype(np.int16)).max()) * 2 * 255 > 2**15 - 1


def _unsigned(integers: Any) -> Any:
    """int8 -> uint8, 128 more."""
    return (integers.astype(np.int16) + 128).astype(np.uint8)


def _flat(values: Any) -> Any:
    """A number if there is one value, else (out,)."""
    array = np.asarray(values)
    return array.reshape(()) if array.size == 1 else array


def _inverse() -> Any:
    return np.float32(1 / 127)


def _blockwise(tensor: Tensor, outputs: int, blocks: int) -> Any:
    """(1,), (out,) or (out, blocks) -> (out, blocks)."""
    return (tensor if tensor.ndim == 2 else tensor[:, None]).expand(outputs, blocks).numpy()


def _nibbles(q: Any) -> Any:
    """(rows, n) integers below 16 -> (rows, ceil(n / 2)) bytes, the first in the low half."""
    q = np.pad(q, ((0, 0), (0, q.shape[1] % 2))).astype(np.uint8)
    return q[:, 0::2] | q[:, 1::2] << 4
