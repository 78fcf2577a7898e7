"""Each function of integer inference in ONNX operators, run by onnxruntime: the integers of the reference."""

import numpy as np
import pytest
import torch

from fairseq.modules.quantization.integer import attention, dyadic, normalization, piecewise, rows
from fairseq.modules.quantization.integer.arithmetic import isqrt
from fairseq.quantization.export.integer_nodes import OPSET, IntegerNodes

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
DRAW = torch.Generator().manual_seed(0)
KINDS = {torch.int64: 7, torch.uint8: 2}


def run(make, *inputs):
    """What nodes give that ``make(nodes, *names)`` adds: one tensor or more."""
    nodes, names = IntegerNodes(), [f"in{i}" for i in range(len(inputs))]
    made = make(nodes, *names)
    outs = [made] if isinstance(made, str) else list(made)
    helper = onnx.helper
    graph = helper.make_graph(
        nodes.nodes, "g", [helper.make_tensor_value_info(n, KINDS[x.dtype], x.shape) for n, x in zip(names, inputs)],
        [onnx.ValueInfoProto(name=name) for name in outs], list(nodes.constants.values()),
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    session = onnxruntime.InferenceSession(onnx.shape_inference.infer_shapes(model).SerializeToString())
    found = [torch.from_numpy(y) for y in session.run(None, {n: x.numpy() for n, x in zip(names, inputs)})]
    return found[0] if isinstance(made, str) else found


def between(low, high, *shape):
    return torch.randint(low, high, shape, generator=DRAW)


def test_shifts_of_either_sign():
    n = torch.arange(62)
    powers = torch.ones(62, dtype=torch.int64) << n
    near = [(powers + d).clamp(max=2**61) * sign for d in (-1, 0, 1) for sign in (1, -1)]
    halves = [((powers >> 1) + d) * sign for d in (-1, 0, 1) for sign in (1, -1)]
    x = torch.cat((torch.stack([*near, *halves]), between(-(2**61), 2**61, 200, 62)))
    assert torch.equal(run(lambda g, x: g.round_shift(x, n.numpy()), x), dyadic.round_shift(x, n))
    assert torch.equal(run(lambda g, x: g.shift(x, n.numpy(), 5, -3), x), ((x + 5) >> n) - 3)
    for k in (0, 1, 8, 61):
        assert torch.equal(run(lambda g, x: g.round_shift(x, k), x), dyadic.round_shift(x, k))  # noqa: B023


def test_roots():
    ends = torch.tensor([2**60, 2**62 - 1])
    squares = between(2**30, 2**31, 4000) ** 2
    n = torch.cat((ends, squares, squares - 1, squares + 1, between(2**60, 2**62, 4000))).clamp(2**60, 2**62 - 1)
    assert torch.equal(run(lambda g, n: g.root(n), n), isqrt(n))


@pytest.mark.parametrize("count", [1, 3, 192])
def test_norms(count):
    h = between(-(2**21), 2**21, 60, count)
    h[:20] >>= torch.arange(20)[:, None]
    h[20], h[21], h[22] = 2**21 - 1, -(2**21), 0
    h[23, ::2] = -(2**21)
    for eps in (1, 12345, 2**60):
        expected = normalization.normalize(h, torch.tensor(eps))
        assert torch.equal(run(lambda g, h: g.normalize(h, eps, count), h), expected)  # noqa: B023


def test_rows():
    z = between(-(2**15), 2**15, 300, 24)
    z[:16] >>= torch.arange(16)[:, None]
    z[20], z[21], z[22] = 0, -(2**15), 1
    q, m = run(lambda g, z: g.rows(z, -1), z)
    expected = rows.quantize_rows(z)
    assert torch.equal((q.to(torch.int16) - 128).to(torch.int8), expected[0])
    assert torch.equal(m, expected[1])
    q, m = run(lambda g, z: g.unsigned_rows(z), z)
    expected = rows.quantize_unsigned_rows(z)
    assert torch.equal((q.to(torch.int16) - 128).to(torch.int8), expected[0])
    assert torch.equal(m, expected[1])


def test_exponentials():
    d = torch.cat((torch.arange(3 << 15), between(0, 2**31, 5000), torch.tensor([24 << 15, 2**31])))[None]
    count = d.shape[1]
    assert torch.equal(run(lambda g, d: g.exp2(d, count), d), attention.exp2(d))


@pytest.mark.parametrize("tokens", [1, 5, 65])
def test_attention(tokens):
    spread = torch.tensor([0, 4, 14, 30, 34])[:, None, None, None]
    u = between(-(2**30), 2**30, 5, 2, tokens, tokens) >> 15 << spread
    v = between(-128, 128, 5, 2, tokens, 8)
    v[0] = 127
    got = run(lambda g, u, v: g.attend(u, v, 2, tokens, tokens), u, (v + 128).to(torch.uint8))
    assert torch.equal(got, attention.attend(u, v))


def test_tables():
    entries = between(-(2**15), 2**15, 2, 256)
    t = torch.arange(-(2**17), 2**17)[None]
    t = torch.cat((t, between(-(2**23), 2**23, 1, 2**18)))
    got = run(lambda g, t: g.piecewise(t, entries.numpy(), 2**18), t)
    assert torch.equal(got, piecewise.piecewise(t, entries))


def test_products_are_of_unsigned_bytes_and_exact_at_their_ends():
    """Pairs of 255 x -128 are past 16 bits, where some instructions saturate."""
    a, b = torch.full((3, 64), 255, dtype=torch.uint8), torch.zeros(64, 5, dtype=torch.uint8)
    b[:, 1], b[:, 2] = 255, 128
    nodes = IntegerNodes()
    nodes.product("a", "b", "", nodes.middle())
    assert [node.op_type for node in nodes.nodes] == ["MatMulInteger", "Cast"]
    got = run(lambda g, a, b: g.product(a, b, b_zero=g.middle()), a, b)
    assert torch.equal(got, a.long() @ (b.long() - 128))
    got = run(lambda g, a, b: g.product(a, b, g.middle(), g.middle()), a, b)
    assert torch.equal(got, (a.long() - 128) @ (b.long() - 128))
    assert np.array_equal(onnx.numpy_helper.to_array(nodes.constants[next(iter(nodes.constants))]), np.uint8(128))
