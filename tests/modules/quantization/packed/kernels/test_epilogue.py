"""One order of operations: the epilogue against numbers by hand, and every path of PyTorch's against the reference."""

import hashlib
import os
import shutil
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from beside import Beside, python
from hypothesis import given, settings
from packed_layers import make, tokens

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.kernels import cpu, cuda, functional, reference
from fairseq.modules.quantization.packed.kernels.epilogue import finish

SIZES = 5, 37  # past a vector of 16 numbers, and not a multiple of one


def parts(groups, dtype, seed=0):
    """acc of each group, s_w, s_x and b, of sizes as in a layer: sums that need more than 24 bits, too."""
    g = torch.Generator().manual_seed(seed)
    m, n = SIZES
    accumulators = [
        torch.randint(-(2**31), 2**31, SIZES, generator=g).to(torch.int32) >> (3 * i) for i in range(groups)
    ]
    scale = torch.rand((n, groups) if groups > 1 else (n,), generator=g, dtype=torch.float64) * 0.01 + 1e-3
    token_scale, bias = torch.rand(m, 1, generator=g, dtype=torch.float64), torch.randn(n, generator=g).double() * 1e5
    return accumulators, scale.to(dtype), token_scale.to(dtype), bias.to(dtype)


def by_hand(accumulators, scale, token_scale, bias):
    """The definition, number by number: numpy's scalars round after each operation."""
    real = scale.numpy().dtype.type
    columns = scale.unsqueeze(-1).numpy() if scale.ndim == 1 else scale.numpy()
    y = np.zeros(accumulators[0].shape, real)
    for m, n in np.ndindex(*y.shape):
        s = columns[n % len(columns)]
        total = real(int(accumulators[0][m, n])) * s[0]
        for group in range(1, len(accumulators)):
            total = total + real(int(accumulators[group][m, n])) * s[group]
        total = total * token_scale.numpy()[m, 0]
        y[m, n] = total if bias is None else total + bias.numpy()[n]
    return torch.from_numpy(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_every_operation_rounds_once_in_the_order_of_the_definition(groups, dtype, in_place):
    accumulators, scale, token_scale, bias = parts(groups, dtype)
    memory = [torch.full(SIZES, float("nan"), dtype=dtype) for _ in range(2)] if in_place else []
    for b in (bias, None):
        expected = by_hand(accumulators, scale, token_scale, b)
        assert torch.equal(finish(accumulators, scale, token_scale, b, *memory), expected)
    for other in other_orders(accumulators, scale, token_scale, bias):  # else this test would not tell them apart
        assert not torch.equal(other, by_hand(accumulators, scale, token_scale, bias))


def other_orders(accumulators, scale, token_scale, bias):
    """The two scales first; the token's scale first; the product and the sum fused, by one rounding of float64."""
    dtype = scale.dtype
    if len(accumulators) > 1:
        yield finish(accumulators[::-1], scale.flip(1), token_scale, bias)
        return
    real = accumulators[0].to(dtype)
    yield real * (scale * token_scale) + bias
    yield real * token_scale * scale + bias
    if dtype == torch.float32:
        yield ((real * scale).double() * token_scale.double() + bias.double()).to(dtype)


def test_one_scale_takes_the_place_of_many():
    (accumulator,), scale, token_scale, bias = parts(1, torch.float32)
    expected = finish([accumulator], scale[3].expand(SIZES[1]), token_scale, bias)
    assert torch.equal(finish([accumulator], scale[3:4], token_scale, bias), expected)
    assert torch.equal(expected, by_hand([accumulator], scale[3:4], token_scale, bias))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_sums_past_24_bits_round_half_to_even(dtype, in_place):
    two = 2**24
    known = {
        two + 1: two, two + 3: two + 4, 2 * two + 2: 2 * two, 2 * two + 6: 2 * two + 8, 2 * two + 3: 2 * two + 4,
        2**31 - 1: 2**31, two - 1: two - 1,
    }  # fmt: skip
    pairs = [*known.items(), *((-a, -b) for a, b in known.items())] * 9  # vectors, and what is left of one
    accumulator = torch.tensor([[a for a, _ in pairs]], dtype=dtype)
    one, out = torch.ones(1), torch.empty(1, len(pairs)) if in_place else None
    assert finish([accumulator], one, one[:, None], None, out).tolist() == [[float(b) for _, b in pairs]]


# Whole layers.

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def every_path(layer, x):
    """The outputs of the layer for x, (M, in), by name."""
    arguments = x, layer.weight_matrix, layer.bias, layer.input_grid
    return {
        "reference": reference.integer(*arguments),
        "cpu": cpu.integer(*arguments),
        "functional": functional.integer(*arguments, cpu.product),
        "functional of the reference's product": functional.integer(*arguments, reference.product),
        "cuda": cuda.integer(*arguments),
    }


@given(
    bits=st.integers(2, 8),
    grid=st.sampled_from([("tensor", None), ("channel", None), ("channel", 32), ("histogram", 40), ("channel", 128)]),
    activations=st.sampled_from(["dynamic", "static"]),
    activation_bits=st.sampled_from([8, 8, 7, 5, 4, 2]),
    bias=st.booleans(),
    symmetric=st.booleans(),
    weight_storage=st.sampled_from(["packed", "unpacked"]),
    rows=st.sampled_from([0, 1, 17, 33]),
    inputs=st.integers(1, 150),
    outputs=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    layer_dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 300.0]),
    transposed=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=200)
def test_every_path_gives_the_bits_of_the_reference(
    bits, grid, rows, inputs, dtype, size, transposed, seed, layer_dtype, **more
):
    layer = make(bits, grid[0], group_size=grid[1], inputs=inputs, dtype=layer_dtype, seed=seed, **more)
    x = (tokens(rows, inputs, seed=seed).double() * size).to(dtype)
    x = x.T.contiguous().T if transposed else x
    expected, *others = every_path(layer, x).values()
    assert expected.dtype == dtype
    for got in others:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize("activation_bits", [8, 4])
def test_slices_have_the_bits_of_the_whole(monkeypatch, rows, activation_bits):
    layer, x = make(4, activation_bits=activation_bits), tokens(40, 75)
    expected = reference.integer(x, layer.weight_matrix, layer.bias, layer.input_grid)
    monkeypatch.setattr(cpu, "_rows", lambda features: rows)
    assert torch.equal(layer(x), expected)


CHILD = """
import runpy, sys, torch
sys.path[:0] = sys.argv[2:]
digest = runpy.run_path(sys.argv[1])["digest"]
print(torch.backends.cpu.get_cpu_capability(), digest())
"""


def whole(*shape, low=-(2**20), seed=0):
    """Floats of 20 bits: what uniform_ and normal_ give follows the processor, too."""
    return torch.randint(low, 2**20, shape, generator=torch.Generator().manual_seed(seed)).float() / 2**18


def digest():
    """Of what the CPU kernels give for layers with one scale, many, and groups, dynamic and static, in two dtypes."""
    found = hashlib.sha256()
    for method, group_size, shape in (("tensor", None, (1,)), ("channel", None, (21,)), ("channel", 32, (21, 3))):
        for activations, activation_bits in (("dynamic", 8), ("dynamic", 4), ("static", 8)):
            config = LinearConfig(4, method, activations, group_size, activation_bits=activation_bits)
            generator = torch.Generator().manual_seed(0)
            q, zero_point = (torch.randint(16, size, generator=generator) for size in ((21, 75), shape))
            input_range = (-1.7, 3.2) if activations == "static" else None
            layer = PackedLinear.from_integers(
                q.to(torch.uint8), whole(*shape, low=1), zero_point, whole(21), config, input_range=input_range
            )
            for dtype in (torch.float32, torch.bfloat16):
                y = cpu.integer(whole(33, 75, seed=1).to(dtype), layer.weight_matrix, layer.bias, layer.input_grid)
                found.update(y.float().numpy().tobytes())
    return found.hexdigest()


@Beside
def without_vectors():
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    return lambda: python("-c", CHILD, __file__, *filter(None, sys.path), env=environment, check=True)


@without_vectors
def test_every_processor_gives_the_same_bits():
    """PyTorch's own operations without vectors, against those that this processor chooses."""
    assert without_vectors.result().stdout.split() == ["DEFAULT", digest()]


@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler")
def test_inductor_fuses_no_product_with_a_sum():
    """It makes one loop of the sum of groups, the scales and the bias."""
    if torch.__version__ < "2.10":
        pytest.importorskip("setuptools")  # its Inductor imports it
    layer, x = make(4, group_size=32).eval(), tokens(33, 75)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
