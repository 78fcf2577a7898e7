"""ONNX nodes for the arithmetic of integer-only inference: each function of the reference in operators on integers.

All values between products are int64, as in the reference. ONNX has no arithmetic shift (BitShift is for unsigned
integers) and its Div rounds towards 0, so that

    floor(x / 2**n) = Div(x + 2**62, 2**n) - 2**(62 - n)    for abs(x) < 2**62,

where what rounding and a bias add to x is in the one constant, too. What cannot be negative needs no 2**62.

A product of bytes is MatMulInteger of uint8 and uint8, less 128 by its zero points. Where an x86 processor has AVX2 and
no VNNI, onnxruntime multiplies uint8 by int8 with an instruction that saturates at 16 bits, and these with one that
does not.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.modules.quantization.integer import attention, normalization, piecewise, rows
from fairseq.modules.quantization.integer.arithmetic import ISQRT_STEPS

OPSET = 21
BIAS = 62
MIDDLE = 128
"""What is added to signed bytes to make unsigned ones."""
Integers = int | NDArray[Any]


class IntegerNodes:
    """The nodes and constants of a graph, in order; every method adds some and returns the name of their result.

    Attributes:
        scope: what the names of new nodes begin with.
    """

    def __init__(self) -> None:
        self.onnx: Any = importlib.import_module("onnx")
        self.scope = ""
        self.nodes: list[Any] = []
        self.constants: dict[Any, Any] = {}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output."""
        out = f"{self.scope}/{kind}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [out], name=out, **attributes))
        return out

    def constant(self, value: Integers, name: str | None = None) -> str:
        """An initializer, int64 unless ``value`` is an array of another dtype; equal ones without a name are one."""
        array = np.asarray(value, dtype=None if isinstance(value, np.ndarray) else np.int64)
        key = name or (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            label = name or (f"{array.dtype}_{array}" if array.ndim == 0 else f"constant_{len(self.constants)}")
            self.constants[key] = self.onnx.numpy_helper.from_array(array.copy(order="C"), label)
        return str(self.constants[key].name)

    def with_constant(self, kind: str, x: str, value: Integers) -> str:
        """x + value, x * value and so on."""
        return self.op(kind, x, self.constant(value))

    def add(self, x: str, value: Integers) -> str:
        return x if not np.any(value) else self.with_constant("Add", x, value)

    def mul(self, x: str, value: Integers) -> str:
        return self.with_constant("Mul", x, value)

    def clip(self, x: str, low: int, high: int) -> str:
        return self.op("Clip", x, self.constant(low), self.constant(high))

    def cast(self, x: str, dtype: str) -> str:
        """To "UINT8", "INT64" or another kind of integers."""
        return self.op("Cast", x, to=getattr(self.onnx.TensorProto, dtype))

    def reshape(self, x: str, *shape: int) -> str:
        """0 stands for what the dimension is."""
        return self.op("Reshape", x, self.constant(np.array(shape)))

    def reduce(self, kind: str, x: str, *axes: int) -> str:
        return self.op(kind, x, self.constant(np.array(axes)), keepdims=1)

    def shift(self, x: str, n: Integers, added: Integers = 0, plus: Integers = 0) -> str:
        """floor((x + added) / 2**n) + plus, of either sign, below 2**62."""
        bias, power = np.int64(1) << BIAS, np.int64(1) << np.asarray(n, np.int64)
        quotient = self.with_constant("Div", self.add(x, bias + np.asarray(added, np.int64)), power)
        return self.add(quotient, np.asarray(plus, np.int64) - bias // power)

    def shift_positive(self, x: str, n: int, added: int = 0) -> str:
        """floor((x + added) / 2**n) where that is not negative."""
        return self.with_constant("Div", self.add(x, added), 1 << n)

    def round_shift(self, x: str, n: Integers, added: Integers = 0, plus: Integers = 0) -> str:
        """round_shift(x + added, n) + plus."""
        return self.shift(x, n, added + half(n), plus)

    def gather(self, table: NDArray[np.int64], index: str) -> str:
        """table[index], for few of them."""
        return self.op("Gather", self.constant(table), index)

    def lookup(self, table: NDArray[np.int64], index: str, *shape: int) -> str:
        """table[index] of (batch, *shape); onnxruntime's Gather copies one by one, and takes eight times as long."""
        flat = self.op("GatherElements", self.constant(table), self.reshape(index, -1))
        return self.reshape(flat, -1, *shape)

    def product(self, a: str, b: str, a_zero: str = "", b_zero: str = "") -> str:
        """uint8 (..., M, K), uint8 (..., K, N), each less its zero point -> int64 (..., M, N)."""
        inputs = [a, b, a_zero, b_zero]
        while not inputs[-1]:
            inputs.pop()
        return self.cast(self.op("MatMulInteger", *inputs), "INT64")

    def middle(self) -> str:
        """The zero point of signed bytes."""
        return self.constant(np.array(MIDDLE, np.uint8))

    def rows(self, z: str, *axes: int) -> tuple[str, str]:
        """:func:`~fairseq.modules.quantization.integer.rows.quantize_rows`: (bytes and 128, uint8; m)."""
        m = self.with_constant("Max", self.reduce("ReduceMax", self.op("Abs", z), *axes), 1)
        r = self.op("Div", self.constant(rows.LARGEST << rows.RECIPROCAL_SHIFT), m)
        added = half(rows.RECIPROCAL_SHIFT) + (MIDDLE << rows.RECIPROCAL_SHIFT)
        return self.cast(self.shift_positive(self.op("Mul", z, r), rows.RECIPROCAL_SHIFT, int(added)), "UINT8"), m

    def unsigned_rows(self, z: str) -> tuple[str, str]:
        """:func:`~fairseq.modules.quantization.integer.rows.quantize_unsigned_rows`, its bytes not less 128."""
        z = self.with_constant("Max", z, 0)
        m = self.with_constant("Max", self.reduce("ReduceMax", z, -1), 1)
        r = self.op("Div", self.constant((2 * rows.HALF - 1) << rows.UNSIGNED_SHIFT), m)
        q = self.shift_positive(self.op("Mul", z, r), rows.UNSIGNED_SHIFT, int(half(rows.UNSIGNED_SHIFT)))
        return self.cast(q, "UINT8"), m

    def bytes_of(self, z: str) -> str:
        """8-bit integers, int64 -> uint8, 128 added."""
        return self.cast(self.add(z, MIDDLE), "UINT8")

    def root(self, n: str) -> str:
        """floor(sqrt(n)) for 2**60 <= n < 2**62, by as many steps as the reference takes."""
        x = self.constant(1 << 31)
        for _ in range(ISQRT_STEPS):
            quotient = self.op("Div", n, x)
            x = self.op("Min", x, self.shift_positive(self.op("Add", quotient, x), 1))
        return x

    def normalize(self, h: str, eps: int, count: int) -> str:
        """:func:`~fairseq.modules.quantization.integer.normalization.normalize` of rows of ``count``."""
        bias = 1 << normalization.STREAM_BITS
        total = self.add(self.mul(self.reduce("ReduceSum", h, -1), 2), count + 2 * count * bias)
        mean = self.add(self.with_constant("Div", total, 2 * count), -bias)
        d = self.op("Sub", h, mean)
        v = self.add(self.reduce("ReduceSum", self.op("Mul", d, d), -1), eps)
        powers = np.int64(1) << np.arange(62)
        bits = self.reduce("ReduceSum", self.cast(self.with_constant("GreaterOrEqual", v, powers), "INT64"), -1)
        j = self.with_constant("Div", self.op("Sub", self.constant(62), bits), 2)  # 0 to 30
        root = self.root(self.op("Mul", v, self.gather(powers[::2].copy(), j)))
        r = self.op("Div", self.constant(2**61 - 1), root)
        n = 37 - np.arange(31)
        above = powers[56]  # d * r is below 2**54
        shifted = self.op("Add", self.op("Mul", d, r), self.gather(half(n) + above, j))
        return self.op("Sub", self.op("Div", shifted, self.gather(powers[n], j)), self.gather(above >> n, j))

    def exp2(self, d: str, *shape: int) -> str:
        """:func:`~fairseq.modules.quantization.integer.attention.exp2`; d: (batch, *shape)."""
        one, fraction, rounding = attention.ONE, attention.FRACTION, int(half(attention.FRACTION))
        d = self.with_constant("Min", d, attention.SMALLEST << fraction)
        z = self.shift_positive(d, fraction)
        f = self.with_constant("BitwiseAnd", d, one - 1)
        square = self.shift_positive(self.mul(f, attention.SQUARE), fraction, rounding)
        slope = self.op("Sub", self.constant(attention.SLOPE), square)
        line = self.shift_positive(self.op("Mul", slope, f), fraction, rounding)
        power = self.mul(self.op("Sub", self.constant(one), line), attention.LARGEST)
        return self.op("Div", power, self.lookup(np.int64(1) << np.arange(attention.SMALLEST + 1), z, *shape))

    def attend(self, u: str, v: str, *shape: int) -> str:
        """:func:`~fairseq.modules.quantization.integer.attention.attend`; u: (batch, *shape), with shape (heads, T, T).

        v: uint8 (batch, heads, T, d), 128 added.
        """
        tokens = shape[-1]
        fraction, limit = attention.FRACTION, attention.SCORE_LIMIT
        u = self.clip(u, -limit, limit)
        x = self.exp2(self.op("Sub", self.reduce("ReduceMax", u, -1), u), *shape)
        e = self.shift_positive(x, fraction, int(half(fraction)))
        total = self.reduce("ReduceSum", x, -1)
        rest = self.op("Sub", total, self.mul(self.reduce("ReduceSum", e, -1), 1 << fraction))
        sums = self.reduce("ReduceSum", self.cast(v, "INT64"), -2)  # of v + 128
        bias = 1 << 16  # abs(mean) is at most 2**15
        added = tokens * (1 - (MIDDLE << 9)) + 2 * tokens * bias
        mean = self.add(self.with_constant("Div", self.add(self.mul(sums, 1 << 9), added), 2 * tokens), -bias)
        mixed = self.mul(self.product(self.cast(e, "UINT8"), v, b_zero=self.middle()), 1 << fraction)
        product = self.op("Add", mixed, self.round_shift(self.op("Mul", rest, mean), 8))
        r = self.op("Div", self.constant(1 << attention.RECIPROCAL_SHIFT), total)
        n = attention.RECIPROCAL_SHIFT - attention.MEAN_FRACTION
        limit = 127 << attention.MEAN_FRACTION
        return self.clip(self.round_shift(self.op("Mul", product, r), n), -limit, limit)

    def mean(self, x: str, start: int, stop: int) -> str:
        """:func:`~fairseq.quantization.integer_only.head.mean` of x: (batch, T, C) -> (batch, C)."""
        if stop == start + 1:
            return self.op("Gather", x, self.constant(start), axis=1)
        count, bias = stop - start, 1 << 24
        part = self.op("Slice", x, *(self.constant(np.array([i])) for i in (start, stop, 1)))
        total = self.op("ReduceSum", part, self.constant(np.array([1])), keepdims=0)
        rounded = self.with_constant("Div", self.add(self.mul(total, 2), count + 2 * count * bias), 2 * count)
        return self.add(rounded, -bias)

    def piecewise(self, t: str, entries: NDArray[np.int64], *shape: int) -> str:
        """:func:`~fairseq.modules.quantization.integer.piecewise.piecewise`; t: (batch, *shape)."""
        reach = 1 << piecewise.UNIT_BITS
        shifted = self.add(self.clip(t, -reach, reach - 1), reach)  # 0 to 2**16 - 1
        place = self.shift_positive(shifted, 8)
        product = self.op("Mul", self.lookup(entries[1], place, *shape), self.with_constant("BitwiseAnd", shifted, 255))
        line = self.op("Add", self.lookup(entries[0], place, *shape), self.round_shift(product, 8))
        beyond = self.op("Where", self.with_constant("GreaterOrEqual", t, reach), t, line)
        return self.op("Where", self.with_constant("Less", t, -reach), self.constant(0), beyond)


def half(n: Integers) -> NDArray[np.int64]:
    """What rounding adds before a shift by n."""
    result: NDArray[np.int64] = (np.int64(1) << np.asarray(n, np.int64)) >> 1
    return result
