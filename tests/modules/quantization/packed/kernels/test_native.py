"""The native kernels: every instruction set that runs here, against PyTorch, exactly where integers are involved."""

import ctypes
import itertools
import os
import platform
import shutil
import sys
import threading
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from beside import Beside, python
from bounds import agrees, eps, is_within
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from pairwise import pairwise
from torch.nn import functional as F

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.kernels import (
    arguments,
    library,
    native,
    native_calls,
    operators,
    reference,
    structures,
)
from fairseq.modules.quantization.packed.panels import sums_of, to_panels
from fairseq.modules.quantization.scalar.tokens import quantize_static, quantize_tokens

LEVELS = [native.level_number(name) for name in native.levels()]
PORTABLE = native.level_number("portable") if native.levels() else 0
each_level = pytest.mark.parametrize("level", LEVELS, ids=lambda level: native.level_names()[level])
INF, NAN = float("inf"), float("nan")
EPS = eps(torch.float32)


@pytest.fixture(autouse=True)
def needs_levels(request, two_threads):
    if not LEVELS and "built" not in request.node.name:
        pytest.skip("no native kernels: there was no C++ compiler when the library was installed")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def layer_of(inputs, outputs, bits=8, seed=0, zero=None, one_scale=False, factor=False, static=None, codes=None):
    """A layer's tensors for the kernels, its codes, and its weight in float64."""
    random = generator(seed)
    low, high = (-128, 128) if bits == 8 else (0, 2**bits)
    if codes is None:
        codes = torch.randint(low, high, (outputs, inputs), generator=random).to(torch.int8)
    count = 1 if one_scale else outputs
    scale = torch.rand(count, generator=random) * 0.01 + 1e-4
    zero_point = torch.randint(0, 2**bits, (count,), generator=random).to(torch.uint8)
    if zero is not None:
        zero_point.fill_(zero)
    bias = torch.randn(outputs, generator=random)
    r = torch.rand(inputs, generator=random) + 0.5 if factor else None
    fixed = (
        (None, None) if static is None else (torch.tensor([static[0]]), torch.tensor([static[1]], dtype=torch.int32))
    )
    parts = to_panels(codes, bits), sums_of(codes, bits), scale, zero_point, bias, r, *fixed, None
    centred = codes.double() - (zero_point.double() - (128 if bits == 8 else 0))[:, None]
    return arguments.Prepared(parts, (inputs, outputs, bits)), codes, centred * scale.double()[:, None]


def integers(rows, columns, seed=0):
    return torch.randint(-128, 128, (rows, columns), generator=generator(seed)).to(torch.int8)


def test_it_is_built_where_there_is_a_compiler():
    if shutil.which("g++") or shutil.which("clang++"):
        assert library.load() is not None
        assert native.levels()[:2] == ("amx_emulated", "portable")


def test_levels_are_what_the_processor_has():
    file = Path("/proc/cpuinfo")
    flags = file.read_text() if file.exists() else ""
    assert ("avx512vnni" in native.levels()) == ("avx512_vnni" in flags and "avx512dq" in flags)
    assert ("avx512bf16" in native.levels()) == ("avx512_bf16" in flags and "avx512_vnni" in flags)
    assert ("avx2" in native.levels()) == (" avx2" in flags and " fma" in flags)
    if "amx" in native.levels():  # the operating system may refuse what the processor has
        assert all(flag in flags for flag in ("amx_tile", "amx_int8", "amx_bf16"))


def test_a_level_that_does_not_run_here_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"'sse9' does not run here; amx_emulated, portable.* do"):
        native.level_number("sse9")
    monkeypatch.setenv(native.ENVIRONMENT, "portable")
    assert native.level_number() == PORTABLE
    monkeypatch.delenv(native.ENVIRONMENT)
    assert native.level_number() == LEVELS[-1]


REFUSED = """
import ctypes, struct, torch
from fairseq.modules.quantization.packed.kernels import arguments, library, native, native_calls
load, equal, leave = 0x20, 0x15, 0x06  # instructions of a filter: a word of the call, a comparison, a verdict
allowed, refused, arch_prctl, request = 0x7FFF0000, 0x00050000 | 1, 158, 0x1023
program = [(load, 0, 0, 0), (equal, 0, 3, arch_prctl), (load, 0, 0, 16), (equal, 0, 1, request), (leave, 0, 0, refused),
           (leave, 0, 0, allowed)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
no_new_privileges, seccomp, by_filter = 38, 22, 2
assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
assert libc.prctl(seccomp, by_filter, filter, 0, 0) == 0, ctypes.get_errno()
assert libc.syscall(arch_prctl, request, 18) == -1
print(*native.levels())
"""
refused = Beside(lambda: lambda: python("-W", "error", "-c", REFUSED))


@refused
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="AMX under Linux alone")
def test_without_permission_for_tiles_the_next_level_runs():
    """The system call by which a process asks for them is refused, as some containers and sandboxes do."""
    result = refused.result()
    assert result.stdout.split() == [name for name in native.levels() if name != "amx"], result.stderr


@each_level
def test_tiles_of_another_library_in_between_do_no_harm(level):
    """PyTorch's own products load tile configurations of theirs, on the threads that ours run on."""
    layer, _, _ = layer_of(200, 90)
    x, other = torch.randn(70, 200, generator=generator(0)), torch.randn(256, 256).bfloat16()
    integer = integers(64, 64)
    expected, product = native_calls.run_linear(layer.linear, x, level), other @ other
    for _ in range(3):
        assert torch.equal(other @ other, product)
        torch._int_mm(integer, integer.T)
        assert torch.equal(native_calls.run_linear(layer.linear, x, level), expected)


def test_a_level_that_disagrees_is_not_used(monkeypatch):
    exact = native_calls.product
    monkeypatch.setattr(native_calls, "product", lambda q, layer, level: exact(q, layer, level) + (level == PORTABLE))
    native.levels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="the native kernels for portable are not used: their integer product"):
            names = native.levels()
        assert names == tuple(native.level_names()[level] for level in LEVELS if level != PORTABLE)
    finally:
        native.levels.cache_clear()


def test_a_wrong_environment_variable_is_no_fault_of_the_levels(monkeypatch):
    monkeypatch.setenv(native_calls.ATTENTION, "flaot")
    with pytest.raises(ValueError, match=r"ATTENTION must be one of bfloat16, float32; got 'flaot'"):
        native.levels.__wrapped__()


# Integer products.


@pairwise(
    level=LEVELS,
    bits=[8, 5, 4, 2],
    shape=[(1, 1, 1), (3, 5, 7), (14, 16, 32), (15, 17, 33), (29, 75, 21), (197, 192, 100)],
)
def test_products_are_exact(level, bits, shape):
    rows, inputs, outputs = shape
    layer, codes, _ = layer_of(inputs, outputs, bits)
    q = integers(rows, inputs)
    assert torch.equal(native_calls.product(q, layer, level), reference.product(q, codes))


@each_level
def test_every_height_of_a_tile(level):
    layer, codes, _ = layer_of(37, 40)
    for rows in (*range(1, 19), 31, 32, 33, 47, 49):
        q = integers(rows, 37, seed=rows)
        assert torch.equal(native_calls.product(q, layer, level), reference.product(q, codes))


@each_level
def test_the_largest_sums_do_not_saturate(level):
    for q, code, inputs in itertools.product((-128, -127, 127), (-128, 127), (1, 2, 63, 3072, 65535)):
        layer, _, _ = layer_of(inputs, 3, codes=torch.full((3, inputs), code, dtype=torch.int8))
        got = native_calls.product(torch.full((2, inputs), q, dtype=torch.int8), layer, level)
        assert bool((got == inputs * q * code).all())
    for q, bits, inputs in itertools.product((-128, 127), (2, 4), (1, 15, 16, 63, 3072, 65535)):
        code = 2**bits - 1
        layer, _, _ = layer_of(inputs, 3, bits, codes=torch.full((3, inputs), code, dtype=torch.int8))
        got = native_calls.product(torch.full((2, inputs), q, dtype=torch.int8), layer, level)
        assert bool((got == inputs * q * code).all())


def magnitudes(x, layer, weight):
    """The sum of the magnitudes of the terms that each output is made of, and the exact output: float64."""
    factor, bias = layer.tensors[5], layer.tensors[4].double()
    q, scale = quantize_tokens(x if factor is None else x * factor)
    real = q.double() * scale
    return real.abs() @ weight.abs().T + bias.abs(), real @ weight.T + bias


SCALED = 2.5 * EPS
"""Of T: four roundings, of the sum as a float, its products with both scales, the sum with the bias; one for u**2."""


@hypothesis_settings(max_examples=40)
@given(
    rows=st.integers(1, 40), inputs=st.integers(1, 90), outputs=st.integers(1, 80), bits=st.integers(2, 8),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_all_levels_give_the_bits_of_the_portable_one(rows, inputs, outputs, bits, seed):
    layer, _, _ = layer_of(inputs, outputs, bits, seed)
    q = integers(rows, inputs, seed)
    x = torch.randn(rows, inputs, generator=generator(seed)) * 10 ** float(seed % 7 - 3)
    norms = [(kind, layer.tensors[5], None, 1e-6) for kind in structures.NORMS]
    activation = structures.ACTIVATIONS[seed % len(structures.ACTIVATIONS)]

    def everything(level):
        yield native_calls.product(q, layer, level)
        yield from native_calls.quantize(x, layer, level)
        yield native_calls.run_linear(layer.linear, x, level, activation=activation)
        yield from (native_calls.norm(x, norm, level) for norm in norms)

    expected = list(everything(PORTABLE))
    for level in LEVELS:
        assert all(map(torch.equal, everything(level), expected))


# Rows.


@each_level
@hypothesis_settings(max_examples=60)
@given(rows=st.integers(1, 5), width=st.integers(1, 100), seed=st.integers(0, 10**6), size=st.integers(-40, 36))
def test_rows_round_as_the_reference_rounds(level, rows, width, seed, size):
    layer, _, _ = layer_of(width, 1)
    x = torch.randn(rows, width, generator=generator(seed)) * 10.0**size
    q, scale, sums = native_calls.quantize(x, layer, level)
    expected, expected_scale = quantize_tokens(x)
    assert torch.equal(q, expected.to(torch.int8))
    assert torch.equal(scale, expected_scale[:, 0])
    assert torch.equal(sums, q.sum(1, dtype=torch.int32))


@each_level
def test_halves_round_to_even(level):
    """x / scale is a half exactly, or a hair from it, where a product with 1 / scale rounds to the other side."""
    layer, _, _ = layer_of(2000, 1)
    scale = torch.rand(50, 1, generator=generator(3)) * 3
    halves = torch.randint(-126, 126, (50, 2000), generator=generator(4)) + 0.5
    x = halves * scale
    x[:, 0] = 127 * scale[:, 0]
    x[::2, 1:] = x[::2, 1:].nextafter(torch.tensor(INF))
    expected, expected_scale = quantize_tokens(x)
    q, got_scale, _ = native_calls.quantize(x, layer, level)
    assert torch.equal(got_scale, expected_scale[:, 0])
    assert torch.equal(q, expected.to(torch.int8))


@each_level
@pytest.mark.parametrize(("scale", "zero"), [(0.02, -64), (1.5, 0), (1e-3, 127)])
def test_static_rows_saturate_as_the_reference_does(level, scale, zero):
    layer, _, _ = layer_of(75, 3, static=(scale, zero))
    x = torch.randn(9, 75, generator=generator(0)) * 3
    x[0, :4] = torch.tensor([INF, -INF, 1e30, -1e30])
    q, token_scale, sums = native_calls.quantize(x, layer, level)
    expected, _ = quantize_static(x, torch.tensor([scale]), torch.tensor([zero]))
    assert torch.equal(q, expected.to(torch.int8))
    assert bool((token_scale == torch.tensor(scale)).all())
    assert torch.equal(sums, q.sum(1, dtype=torch.int32))
    x[3, 5] = NAN
    assert native_calls.quantize(x, layer, level)[1].isnan().tolist() == [row == 3 for row in range(9)]


@each_level
def test_zeros_denormals_and_the_largest_numbers(level):
    layer, _, _ = layer_of(20, 2)
    info = torch.finfo(torch.float32)
    x = torch.zeros(5, 20)
    x[1], x[2], x[3, 7], x[4] = 1e-42, info.tiny, info.max, -info.max
    expected, scale = quantize_tokens(x)
    q, got, _ = native_calls.quantize(x, layer, level)
    assert torch.equal(q, expected.to(torch.int8))
    assert torch.equal(got, scale[:, 0])


@each_level
def test_factors_are_applied_first(level):
    layer, _, _ = layer_of(45, 2, factor=True)
    x = torch.randn(3, 45, generator=generator(0))
    factor = layer.tensors[5]
    assert torch.equal(native_calls.quantize(x, layer, level)[0], quantize_tokens(x * factor)[0].to(torch.int8))


def gelu_bound(x):
    """What csrc/rows.h promises, and a rounding of the larger of the two numbers whose difference is the result."""
    return 4e-6 + EPS * x.double().abs()


@each_level
def test_gelu_is_as_accurate_as_promised(level):
    x = torch.linspace(-20, 20, 100_003)
    assert is_within(native_calls.activate(x, "gelu", level), F.gelu(x.double()), gelu_bound(x))
    ends = torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-40, INF, -INF])
    got, expected = native_calls.activate(ends, "gelu", level), torch.tensor([0.0, 0.0, 1e30, 0.0, 0.0, INF, 0.0])
    assert got[5] == INF
    assert is_within(got[[0, 1, 2, 3, 4, 6]], expected[[0, 1, 2, 3, 4, 6]], 4e-6)
    assert bool(native_calls.activate(torch.full((37,), NAN), "gelu", level).isnan().all())


def layer_norm_bound(x, weight, bias, epsilon):
    """Sums over a row are of 64 lanes, so that a number goes through width / 64 + 7 roundings at most."""
    width = x.shape[-1]
    chain = (width / 64 + 7) * EPS / 2
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    off_centre, factor = chain * x.abs().mean(-1, keepdim=True), (variance + epsilon).rsqrt()
    distance = (x - mean).abs()
    # of (x - mean) ** 2 and so of the factor: the mean is off, and sums round
    off_factor = factor**2 * off_centre * distance.mean(-1, keepdim=True) + chain / 2 + 2 * EPS
    normal = distance * factor
    return weight.abs() * (factor * off_centre + normal * (off_factor + 2 * EPS)) + EPS * (
        (weight * normal).abs() + bias.abs()
    )


@each_level
@pytest.mark.parametrize("width", [1, 3, 16, 24, 192, 769])
def test_layer_norm(level, width):
    x = torch.randn(7, width, generator=generator(0)) * 3 + 5
    weight, bias = torch.randn(2, width, generator=generator(1))
    got = native_calls.norm(x, ("layer", weight, bias, 1e-6), level)
    doubles = x.double(), weight.double(), bias.double()
    expected = F.layer_norm(doubles[0], (width,), *doubles[1:], 1e-6)
    assert is_within(got, expected, layer_norm_bound(*doubles, 1e-6))


# Layers.


@pairwise(
    level=LEVELS,
    settings=[
        {}, {"bits": 4}, {"bits": 3, "one_scale": True}, {"bits": 7, "zero": 64}, {"zero": 128}, {"factor": True},
        {"one_scale": True, "zero": 0}, {"zero": 255},
    ],
    shape=[(1, 75, 21), (29, 33, 70), (130, 48, 1000)],
)  # fmt: skip
def test_a_layer_is_its_integers_scaled(level, settings, shape):
    rows, inputs, outputs = shape
    layer, _, weight = layer_of(inputs, outputs, **settings)
    x = torch.randn(rows, inputs, generator=generator(1))
    total, expected = magnitudes(x, layer, weight)
    got = native_calls.run_linear(layer.linear, x, level)
    assert is_within(got, expected, SCALED * total)
    activated = native_calls.run_linear(layer.linear, x, level, activation="gelu")
    steepest = 1.13  # of GELU
    assert is_within(activated, F.gelu(expected), steepest * SCALED * total + gelu_bound(expected))
    residual = torch.randn(rows, outputs, generator=generator(2))
    assert torch.equal(native_calls.run_linear(layer.linear, x, level, residual=residual), got + residual)


@each_level
def test_bad_numbers_stay_in_their_row(level):
    layer, _, _ = layer_of(40, 50)
    x = torch.randn(6, 40, generator=generator(0))
    broken = x.clone()
    broken[1, 3], broken[4, 39] = NAN, INF
    got, expected = (native_calls.run_linear(layer.linear, rows, level) for rows in (broken, x))
    assert bool(got[1].isnan().all())
    assert not bool(got[4].isfinite().any())
    assert torch.equal(got[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])


def test_memory_that_is_not_aligned():
    layer, _, _ = layer_of(40, 50)
    x = torch.randn(1 + 6 * 40, generator=generator(0))[1:].view(6, 40)
    assert x.data_ptr() % 16 != 0
    for level in LEVELS:
        assert torch.equal(
            native_calls.run_linear(layer.linear, x, level), native_calls.run_linear(layer.linear, x.clone(), level)
        )


def test_the_same_bits_for_any_number_of_threads_and_rows():
    layer, _, _ = layer_of(64, 300, 4)
    x = torch.randn(150, 64, generator=generator(0))
    for level in LEVELS:
        expected = native_calls.run_linear(layer.linear, x, level)
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(native_calls.run_linear(layer.linear, x, level), expected)
        assert torch.equal(torch.cat([native_calls.run_linear(layer.linear, row[None], level) for row in x]), expected)
        torch.set_num_threads(2)


def test_no_rows_give_no_rows():
    layer, _, _ = layer_of(8, 5)
    for level in LEVELS:
        assert native_calls.run_linear(layer.linear, torch.empty(0, 8), level).shape == (0, 5)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t[:, :-1], "panels must be a contiguous torch.uint8 tensor of shape"),
        (0, lambda t: t.to(torch.int32), "panels must be .* got torch.int32"),
        (1, lambda t: t[:-1], "sums must be a contiguous torch.int32 tensor of shape"),
        (2, lambda t: t.double(), "scale must be a contiguous torch.float32"),
        (2, lambda t: torch.cat([t, t])[::2], "scale must be .* strides"),
        (3, lambda t: t[:2], "zero_point must be"),
        (4, lambda t: t[1:], "bias must be"),
        (2, lambda t: None, "needs panels, sums above 4 bits, a scale"),
    ],
)
def test_tensors_are_checked_before_they_are_pointed_to(place, change, message):
    layer, _, _ = layer_of(20, 12)
    parts = list(layer.parts)
    parts[place] = change(parts[place])
    with pytest.raises(ValueError, match=message):
        arguments.Prepared(tuple(parts), (20, 12, 8))


def test_inputs_are_checked_before_they_are_pointed_to():
    layer, _, _ = layer_of(20, 12)
    for x in (torch.ones(3, 19), torch.ones(3, 20).double(), torch.ones(20, 3).T, torch.ones(3, 20, device="meta")):
        with pytest.raises(ValueError, match=r"x must be a contiguous torch.float32 tensor of shape \(3, 20\)"):
            native_calls.run_linear(layer.linear, x, PORTABLE)
    with pytest.raises(ValueError, match="residual must be"):
        native_calls.run_linear(layer.linear, torch.ones(3, 20), PORTABLE, residual=torch.ones(3, 11))
    with pytest.raises(ValueError, match=r"q must be a contiguous torch\.int8"):
        native_calls.product(torch.ones(3, 20), layer, PORTABLE)


# Attention.


def attention_of(query, key, value, heads, scaling):
    parts = [t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value)]
    return F.scaled_dot_product_attention(*parts, scale=scaling).transpose(1, 2).flatten(2)


def attention_bound(query, key, value, heads, scaling):
    """Of numbers in bfloat16: each weight of the softmax rounds to bfloat16, by 2**-8 of itself, and is off by what its
    score is, in float32, and by 3e-7 of its exponential; so is their sum; and sums of products over tokens round.
    """
    size, tokens = query.shape[-1] // heads, query.shape[1]
    by_head = [t.abs().double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key)]
    score = scaling * (by_head[0] @ by_head[1].transpose(-1, -2)).amax(-1, keepdim=True)  # (images, heads, tokens, 1)
    off = (size + 4) * EPS * score + 3e-7
    largest = attention_of(query, key, value.abs(), heads, scaling).unflatten(-1, (heads, -1)).transpose(1, 2)
    allowed = (2**-8 + 2 * off + (tokens + 4) * EPS) * 1.01 * largest
    return allowed.transpose(1, 2).flatten(2)


@each_level
@pytest.mark.parametrize(
    ("images", "tokens", "heads", "size"),
    [(1, 1, 1, 8), (1, 2, 1, 1), (2, 7, 2, 5), (3, 50, 2, 16), (1, 33, 1, 80), (2, 197, 3, 64), (1, 785, 1, 32),
     (5, 16, 4, 24), (1, 31, 1, 33)],
)  # fmt: skip
def test_attention_is_that_of_numbers_in_bfloat16(level, images, tokens, heads, size):
    query, key, value = torch.randn(3, images, tokens, heads * size, generator=generator(0))
    got = native_calls.attention(query, key, value, heads, size**-0.5, level)
    rounded = [t.bfloat16().float() for t in (query, key, value)]
    expected = attention_of(*rounded, heads, size**-0.5)
    assert is_within(got, expected, attention_bound(*rounded, heads, size**-0.5))


@each_level
def test_attention_is_the_same_for_any_batch_and_threads(level):
    query, key, value = torch.randn(3, 5, 21, 48, generator=generator(0))
    expected = native_calls.attention(query, key, value, 2, 0.2, level)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(native_calls.attention(query, key, value, 2, 0.2, level), expected)
    alone = [native_calls.attention(*(t[i : i + 1] for t in (query, key, value)), 2, 0.2, level) for i in range(5)]
    assert torch.equal(torch.cat(alone), expected)


@each_level
def test_attention_keeps_nan_in_its_image_and_head(level):
    query, key, value = torch.randn(3, 2, 9, 32, generator=generator(0))
    expected = native_calls.attention(query, key, value, 2, 0.25, level)
    value = value.clone()
    value[1, 4, 3] = NAN
    got = native_calls.attention(query, key, value, 2, 0.25, level)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1, :, 16:], expected[1, :, 16:])
    assert bool(got[1, :, 3].isnan().all())
    large = native_calls.attention(query * 1e4, key * 1e4, expected * 0 + 1, 2, 0.25, level)
    assert is_within(large, torch.ones_like(large), 2**-8 + 30 * EPS)  # weights round to bfloat16, their sum does not


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 7, 2, 5), (3, 50, 2, 16), (1, 33, 1, 80), (2, 197, 3, 64)])
def test_exact_attention_has_the_same_bits_everywhere(shape, monkeypatch):
    """Of float32, within the roundings of chains of products, and not what bfloat16 gives."""
    images, tokens, heads, size = shape
    query, key, value = torch.randn(3, images, tokens, heads * size, generator=generator(0))
    rounded = native_calls.attention(query, key, value, heads, size**-0.5, PORTABLE)
    monkeypatch.setenv(native_calls.ATTENTION, "float32")
    expected = native_calls.attention(query, key, value, heads, size**-0.5, PORTABLE)
    by_head = [t.abs().double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key)]
    score = size**-0.5 * (by_head[0] @ by_head[1].transpose(-1, -2)).amax(-1, keepdim=True)
    off = (2 * ((size + 4) * EPS * score + 3e-7) + (tokens + 4) * EPS) * 1.01
    largest = attention_of(query, key, value.abs(), heads, size**-0.5).unflatten(-1, (heads, -1)).transpose(1, 2)
    allowed = (off * largest).transpose(1, 2).flatten(2)
    assert is_within(expected, attention_of(query, key, value, heads, size**-0.5), allowed)
    assert tokens == 1 or not torch.equal(expected, rounded)
    for level, threads in itertools.product(LEVELS, (1, 3)):
        torch.set_num_threads(threads)
        assert torch.equal(native_calls.attention(query, key, value, heads, size**-0.5, level), expected)
    monkeypatch.setenv(native_calls.ATTENTION, "float64")
    with pytest.raises(ValueError, match="ATTENTION must be one of bfloat16, float32; got 'float64'"):
        native_calls.attention(query, key, value, heads, size**-0.5, PORTABLE)


def test_attention_checks_its_sizes():
    x = torch.ones(1, 3, 10)
    with pytest.raises(ValueError, match="the scaling of attention must be positive, got 0"):
        native_calls.attention(x, x, x, 2, 0, PORTABLE)
    with pytest.raises(ValueError, match="a width of 10 does not divide into 3 heads"):
        native_calls.attention(x, x, x, 3, 1.0, PORTABLE)
    with pytest.raises(ValueError, match="key must be"):
        native_calls.attention(x, x[:, :2], x, 2, 1.0, PORTABLE)


def block_of(width=24, heads=3, mlp=40):
    sizes = {"query": (width, width), "key": (width, width), "value": (width, width), "output": (width, width)}
    sizes |= {"fc1": (width, mlp), "fc2": (mlp, width)}
    layers = {name: layer_of(*size)[0] for name, size in sizes.items()}
    return arguments.make_block(layers, {"norm1": ("layer", None, None, 1e-6)}, heads, 0.35)


def test_calls_are_checked_before_they_are_pointed_to():
    block, x = block_of(), torch.zeros(12, 24)
    with pytest.raises(ValueError, match="2 images of 5 tokens are 10 rows, not 12"):
        arguments.make_call(2, 5, 12)
    for wrong in ([0, 1, 2, 3, 4, 5, 6, 9, -1, -1], [-2, 1, 2, 3, 4, 5, 6, 7, 0, -1], [0, 1, 2, 3, 4, 5, 6, 6, 7, -1]):
        rows = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0, -1, -1], dtype=torch.int32)
        arguments.make_call(2, 5, 8, rows)
        rows.copy_(torch.tensor(wrong))
        with pytest.raises(ValueError, match="rows must be -1 or the numbers below 8, each of them once"):
            arguments.make_call(2, 5, 8, rows)
    with pytest.raises(ValueError, match="a call is of images of a token at least, got 2 of 0"):
        arguments.make_call(2, 0)
    with pytest.raises(ValueError, match=r"must be of one width, got \[24, 12\]"):
        native_calls.run_blocks([block, block_of(12)], x, [arguments.make_call(3, 4)] * 2, PORTABLE)
    with pytest.raises(ValueError, match=r"rows must be a contiguous torch\.int32"):
        arguments.make_call(2, 5, 12, torch.arange(10))
    with pytest.raises(ValueError, match="the call is for 10 rows of 24"):
        native_calls.run_blocks([block], x, [arguments.make_call(2, 5)], PORTABLE)
    bias = arguments.make_call(3, 4, bias=torch.zeros(2, 4, 4), heads=2, head_size=8)
    with pytest.raises(ValueError, match=r"tables are for \(heads, head_size\) \(2, 8\)"):
        native_calls.run_blocks([block], x, [bias], PORTABLE)
    with pytest.raises(ValueError, match=r"with 3 heads has layers of \(in, out\)"):
        arguments.make_block({name: layer_of(24, 24)[0] for name in ("query", "key", "value", "output", "fc1")} | {
            "fc2": layer_of(40, 24)[0]}, {}, 3, 0.35)  # fmt: skip
    narrow = {"query": (6, 18), "output": (6, 6), "fc1": (6, 9), "fc2": (9, 6)}
    with pytest.raises(ValueError, match="has 8 columns of each at least, got 6"):
        arguments.make_block({name: layer_of(*sizes)[0] for name, sizes in narrow.items()}, {}, 2, 0.5)


@each_level
def test_scores_as_large_as_floats_are(level):
    """Rows of which all scores are the lowest number, as a float mask makes them, and numbers beyond all others."""
    block, x = block_of(24, 3), torch.randn(2, 5, 24, generator=generator(0))
    mask = torch.full((1, 5, 5), torch.finfo(torch.float32).min)
    assert native_calls.run_blocks([block], x, [arguments.make_call(2, 5, mask=mask)], level)[0].isfinite().all()
    heads = torch.randn(3, 1, 5, 24, generator=generator(1)) * torch.tensor([3e6, 3e6, 1]).view(3, 1, 1, 1)
    assert native_calls.attention(*heads, 3, 0.35, level).isfinite().all()


@each_level
def test_an_image_has_the_same_bits_beside_one_with_a_mask(level):
    block, x = block_of(24, 3), torch.randn(2, 5, 24, generator=generator(0))
    alone = native_calls.run_blocks([block], x[:1], [arguments.make_call(1, 5)], level)[0]
    mask = torch.zeros(2, 5, 5)
    mask[1, :, 3:] = -INF
    both = native_calls.run_blocks([block], x, [arguments.make_call(2, 5, mask=mask)], level)[0]
    assert torch.equal(both[:1], alone)


def test_a_bias_beside_a_layer_is_added_to_what_a_static_range_corrects():
    layer, _, _ = layer_of(20, 12)
    parts = list(layer.parts)
    more, correction = torch.randn(2, 12, generator=generator(1))
    fixed = torch.tensor([0.02]), torch.tensor([3], dtype=torch.int32), correction
    with pytest.raises(ValueError, match="the layer has a bias already"):
        arguments.Prepared((*parts[:6], *fixed), (20, 12, 8)).with_bias(more)
    beside = arguments.Prepared((*parts[:4], None, None, *fixed), (20, 12, 8)).with_bias(more)
    within = arguments.Prepared((*parts[:4], more, None, *fixed), (20, 12, 8))
    x = torch.randn(3, 20, generator=generator(2))
    assert torch.equal(
        native_calls.run_linear(beside.linear, x, PORTABLE), native_calls.run_linear(within.linear, x, PORTABLE)
    )


def test_blocks_one_after_the_other_are_blocks_one_by_one():
    """For any number of threads and images: alone, several in a chunk, and those that are left over shared."""
    blocks = [block_of(), block_of(24, 3), block_of()]
    for images, tokens in ((1, 5), (5, 33), (70, 4)):
        x = torch.randn(images, tokens, 24, generator=generator(images))
        biases = torch.randn(3, 3, tokens, tokens, generator=generator(tokens))
        plain = arguments.make_call(images, tokens)
        calls = [plain, arguments.make_call(images, tokens, bias=biases[1], heads=3, head_size=8), plain]
        for level in LEVELS:
            torch.set_num_threads(1)
            expected, y = [], x
            for block, call in zip(blocks, calls, strict=True):
                y = native_calls.run_blocks([block], y, [call], level)[0]
                expected.append(y)
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                assert all(map(torch.equal, native_calls.run_blocks(blocks, x, calls, level), expected))


def test_blocks_one_after_the_other_are_called_for_the_same_images():
    block, x = block_of(), torch.zeros(10, 24)
    rows = torch.arange(10, dtype=torch.int32)
    for second in (arguments.make_call(5, 2), arguments.make_call(2, 5, rows=rows)):
        with pytest.raises(ValueError, match="must be called for the same images, and not for windows"):
            native_calls.run_blocks([block, block], x, [arguments.make_call(2, 5), second], PORTABLE)


# Processes and threads.


def test_threads_that_call_at_once():
    layer, _, _ = layer_of(70, 90)
    inputs = [torch.randn(rows, 70, generator=generator(rows)) for rows in (1, 20, 60, 200)]
    expected = [native_calls.run_linear(layer.linear, x, LEVELS[-1]) for x in inputs]
    wrong = []

    def run(x, y):
        torch.set_num_threads(2)
        wrong.extend(1 for _ in range(20) if not torch.equal(native_calls.run_linear(layer.linear, x, LEVELS[-1]), y))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


FORKED = """
import os, sys, torch
from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
torch.set_num_threads(2)
layer = PackedLinear.from_float(torch.nn.Linear(64, 96), LinearConfig(8, backend="native"))
x = torch.randn(100, 64)
with torch.inference_mode():
    expected = layer(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(layer(x), expected) else 1)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
forked = Beside(lambda: lambda: python("-c", FORKED))


@forked
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_runs_on_one_thread_and_does_not_hang():
    done = forked.result()
    assert done.returncode == 0, done.stderr


def test_no_second_pool_of_threads():
    """The library's OpenMP is torch's, by the loader: the process has one of them."""
    file = Path("/proc/self/maps")
    maps = file.read_text().split() if file.exists() else []
    pools = {entry for entry in maps if "libgomp" in os.path.basename(entry)}
    torch_has = any(os.sep + "torch" + os.sep in pool for pool in pools)
    assert not torch_has or sum(os.path.basename(pool).startswith("libgomp.so") for pool in pools) == 1


def test_profile_adds_up_to_the_time_of_the_threads():
    layer, _, _ = layer_of(256, 512)
    x = torch.randn(400, 256)
    with library.profile() as seconds:
        native_calls.run_linear(layer.linear, x, LEVELS[-1])
    assert list(seconds) == list(structures.STAGES)
    assert seconds["integer products"] > 0
    assert seconds["unpack 4 bits"] == seconds["attention"] == 0
    assert 0 < sum(seconds.values()) < 60
    with library.profile() as outer, library.profile():
        native_calls.run_linear(layer.linear, x, LEVELS[-1])
    assert not any(outer.values())


# PackedLinear on them.


def packed(**settings):
    torch.manual_seed(0)
    linear = torch.nn.Linear(settings.pop("inputs", 75), settings.pop("outputs", 21))
    input_range = (-1.5, 3.0) if settings.get("activations") == "static" else None
    return PackedLinear.from_float(linear, LinearConfig(**settings), "fc", input_range)


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"bits": 4}, {"bits": 4, "weight_storage": "unpacked"}, {"bits": 3, "method": "channel"},
        {"bits": 2, "symmetric": True}, {"bits": 8, "method": "channel", "symmetric": True},
        {"activations": "static"}, {"bits": 4, "method": "channel", "activations": "static"},
    ],
    ids=str,
)  # fmt: skip
def test_a_packed_layer_gives_what_the_reference_gives(settings):
    layer, plain = packed(**settings, backend="native"), packed(**settings, backend="reference")
    assert layer.backend == "native"
    assert layer.layout.in_panels()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = 2 * torch.randn(3, 5, 75, generator=generator(1)).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert agrees(y.flatten(0, 1), plain, x.flatten(0, 1))
    assert torch.equal(layer.integers(), plain.integers())
    assert torch.equal(layer.dequantize(), plain.dequantize())


@pytest.mark.parametrize(
    "settings", [{"bits": 8}, {"bits": 4}, {"bits": 3}, {"bits": 4, "weight_storage": "unpacked"}], ids=str
)
def test_the_state_dict_is_that_of_rows(settings):
    native_layer, rows = packed(**settings), packed(**settings)
    native_layer.use_native()
    saved, expected = native_layer.state_dict(), rows.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)
    torch.manual_seed(1)
    other = PackedLinear.from_float(torch.nn.Linear(75, 21), LinearConfig(**settings), "fc")
    other.use_native()
    x = torch.randn(4, 75)
    with torch.no_grad():
        before = other(x)
        other.load_state_dict(saved)
        assert other.backend == "native"
        assert torch.equal(other(x), native_layer(x))
        assert not torch.equal(other(x), before)


def test_a_load_that_fails_leaves_the_layer_as_it_was():
    layer, x = packed(bits=4), torch.randn(4, 75)
    layer.use_native()
    with torch.no_grad():
        expected = layer(x)
        wrong = {**layer.state_dict(), "scale": torch.ones(5)}
        with pytest.raises(RuntimeError, match="size mismatch for scale"):
            layer.load_state_dict(wrong)
        assert layer.backend == "native"
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_changes_are_seen(activations, dtype):
    """In place, by another tensor, of another place in memory: as a layer that has the new bias from the start."""
    layer, x = packed(bits=8, activations=activations).to(dtype), torch.randn(4, 75)
    layer.use_native()

    def fresh():
        other = packed(bits=8, activations=activations).to(dtype)
        other.bias = layer.bias.clone()
        other.use_native()
        return other(x)

    before = layer(x)
    layer.bias.add_(1)
    assert torch.equal(layer(x), fresh())
    assert not torch.equal(layer(x), before)
    layer.bias = layer.bias + 1
    assert torch.equal(layer(x), fresh())
    layer.share_memory()
    assert torch.equal(layer(x), fresh())
    layer.bias.data = layer.bias.data + 1
    assert torch.equal(layer(x), fresh())


def test_static_ranges_that_change_are_seen():
    layer, x = packed(activations="static", backend="native"), torch.randn(4, 75)
    before = layer(x)
    layer.input_scale.mul_(2)
    assert not torch.equal(layer(x), before)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [({}, torch.float32), ({"bits": 4}, torch.bfloat16), ({"activations": "static"}, torch.float32),
     ({"bits": 3, "method": "channel", "activations": "static"}, torch.bfloat16),
     ({"method": "channel", "group_size": 32, "activation_bits": 4}, torch.float32)],
    ids=str,
)  # fmt: skip
def test_the_operator_and_a_compiled_layer_give_the_same(settings, dtype):
    """Of a bias in half precision, and of a static range, there are copies that must live as long as the call."""
    layer = packed(**settings, outputs=90).to(dtype)
    layer.use_native()
    x = torch.randn(40, 75)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = layer(x)
        for _ in range(5):
            assert torch.equal(operators.native_linear(x, layer.parts(), layer.sizes()), expected)
            assert torch.equal(compiled(x), expected)
    torch.library.opcheck(operators.native_linear, (x, list(layer.parts()), list(layer.sizes())))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "channel", "group_size": 40}, "cannot run fc: group_size=40, which is no multiple of 16"),
        ({"backend": "reference"}, "cannot run fc: backend='reference'"),
    ],
)
def test_what_they_cannot_run_is_refused(settings, message):
    layer = packed(**settings)
    with pytest.raises(ValueError, match=message):
        layer.use_native()
    assert layer.panels is None
    with pytest.raises(ValueError, match=r"a scale of torch\.float64"):
        PackedLinear.from_float(torch.nn.Linear(8, 8).double(), LinearConfig(backend="native"))


def test_without_the_library_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(native, "levels", lambda: ())
    with pytest.raises(RuntimeError, match=r"the native kernels cannot run fc: they were not built; install a C\+\+"):
        packed(backend="native")
    with pytest.raises(RuntimeError, match="no native kernels: they were not built"):
        native.level_number()


def test_the_environment_decides_over_auto(monkeypatch):
    layer = packed()
    layer.use_native()
    assert layer.backend == "native"
    monkeypatch.setenv("FAIRSEQ_QUANTIZATION_BACKEND", "reference")
    assert layer.backend == "reference"
    x = torch.randn(3, 75)
    assert torch.equal(layer(x), reference.integer(x, layer.weight_matrix, layer.bias, layer.input_grid))


def test_structures_have_the_size_that_the_library_has():
    """Written out by the library itself: a field more on one side would shift all that follow."""
    loaded = library.load()
    for number, kind in enumerate((structures.Linear, structures.Block, structures.Call, structures.Patches)):
        assert ctypes.sizeof(kind) == loaded.fairseq_size(number)
