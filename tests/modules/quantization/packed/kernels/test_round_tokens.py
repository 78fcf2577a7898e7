"""Tokens rounded and back by the native kernels: the bits of scalar/tokens.py, which falls back on its own."""

import itertools

import pytest
import torch
from packed_layers import rows_of
from torch._subclasses.fake_tensor import FakeTensorMode

from fairseq.modules.quantization.packed import kernels
from fairseq.modules.quantization.packed.kernels import library, native, native_calls
from fairseq.modules.quantization.scalar import tokens

pytestmark = pytest.mark.skipif(not native.levels(), reason=library.NOT_BUILT)
LEVELS = [native.level_names().index(name) for name in native.levels()]


def definition(x, bits):
    q, scale = tokens.quantize_tokens(x, bits)
    return q * scale


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("level", LEVELS)
def test_tokens_have_the_bits_of_the_definition(monkeypatch, level, bits):
    for width, threads in itertools.product((1, 7, 70, 171), (1, 3)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        x = torch.cat([rows_of(19, width), 3e38 * rows_of(3, width).clamp(-1, 1)])
        x[15] *= 1e-8
        got, expected = native_calls.round_tokens(x, bits, level), definition(x, bits)
        assert torch.equal(got.view(torch.int32), expected.view(torch.int32)), (width, threads)  # signs of zeros, too


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_token_that_is_not_finite_becomes_nan_and_no_other(level, bits, value):
    x = rows_of(9, 40)
    x[8, 31] = value
    got = native_calls.round_tokens(x, bits, level)
    assert torch.equal(got[:8], definition(x[:8], bits))
    assert bool(got[8].isnan().all())
    assert bool(definition(x, bits)[8].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_emulation_calls_them_wherever_its_numbers_lie(monkeypatch, dtype):
    called = []
    run = native_calls.round_tokens
    monkeypatch.setattr(native_calls, "round_tokens", lambda *args: called.append(args) or run(*args))
    strided = rows_of(24, 30).to(dtype).view(2, 12, 30).transpose(0, 1).requires_grad_()
    for x in (strided, strided[..., ::2], strided[0, 0]):
        got = tokens.fake_quantize_tokens(x, 3)
        assert got.dtype == dtype
        assert torch.equal(got, definition(x.detach().float(), 3).to(dtype))
        assert torch.equal(torch.autograd.grad(got.sum(), x)[0], torch.ones_like(x))
    assert len(called) == 3


def test_they_leave_to_the_definition_what_they_do_not_take(monkeypatch):
    x = rows_of(4, 20)
    assert kernels.round_tokens(x.double(), 4) is None
    assert kernels.round_tokens(x[:, :0], 4) is None
    assert kernels.round_tokens(x.to("meta"), 4) is None
    with FakeTensorMode():
        assert kernels.round_tokens(torch.empty(4, 20), 4) is None
    monkeypatch.setenv(kernels.ENVIRONMENT, "reference")
    assert kernels.round_tokens(x, 4) is None
    assert torch.equal(tokens.fake_quantize_tokens(x, 4), definition(x, 4))


def test_compiled_and_exported_they_are_the_same():
    x, expected = rows_of(6, 20), definition(rows_of(6, 20), 4)
    traced = torch.jit.trace(lambda t: tokens.fake_quantize_tokens(t, 4), rows_of(6, 20, seed=1))
    assert torch.equal(traced(x), expected)
    graph = torch.compile(Rounds(), backend="eager", fullgraph=True)
    assert torch.equal(graph(x), expected)
    some = x[:, 0] > 0  # how many there are is not known while it is recorded
    recorded = torch.export.export(Rounds(), (x, some)).module()
    assert torch.equal(recorded(x, some), expected[some])


class Rounds(torch.nn.Module):
    def forward(self, x, some=None):
        return tokens.fake_quantize_tokens(x if some is None else x[some], 4)
