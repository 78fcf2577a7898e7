"""The quantization equation, against exact arithmetic and over generated tensors."""

import itertools
import math
import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from strategies import tensors

import fairseq
from fairseq.modules.quantization.scalar import ops

KERNELS = {
    (bits, method): getattr(ops, f"emulate_int{bits}_{method}") for bits in (8, 4) for method in ops.METHODS
}  # fmt: skip


def step(scale, axis, w):
    """The scale, shaped to broadcast against w."""
    return (
        scale.double() if scale.numel() == 1 else scale.double().view([-1 if i == axis else 1 for i in range(w.ndim)])
    )


@given(w=tensors(), bits=st.integers(2, 8), method=st.sampled_from(["tensor", "channel"]))
def test_min_max_comes_back_within_half_a_step(w, bits, method):
    got, scale, zero_point = ops.emulate_int(w, bits, method)
    assert (got.shape, got.dtype) == (w.shape, w.dtype)
    rounding = torch.maximum(w.double().abs(), got.double().abs()) * torch.finfo(w.dtype).eps  # of the result's dtype
    rounding += torch.finfo(w.dtype).smallest_normal * torch.finfo(w.dtype).eps
    error = (got.double() - w.double()).abs()
    # half a step; scale, zero point and w / scale, of up to 2**bits steps, are rounded in the compute dtype
    half = 0.5 + 4 * 2**bits * torch.finfo(ops.compute_dtype(w.dtype)).eps
    assert bool((error <= step(scale, 0, w) * half + rounding).all())
    assert bool(((scale > 0) & torch.isfinite(scale)).all())
    assert bool(((zero_point >= 0) & (zero_point < 2**bits)).all())
    assert zero_point.dtype == torch.int32


@given(w=tensors(), bits=st.integers(2, 8), method=st.sampled_from(ops.METHODS), axis=st.sampled_from([None, 0, -1]))
def test_every_method_is_a_projection_onto_a_grid_that_holds_zero(w, bits, method, axis):
    axis = None if method == "tensor" else axis
    got, scale, zero_point = ops.emulate_int(w, bits, method, axis=axis)
    used = 0 if axis is None else axis
    assert torch.equal(ops.fake_quantize(torch.zeros_like(w), scale, zero_point, bits, used), torch.zeros_like(w))
    q = ops.quantize_to_int(w, scale, zero_point, bits, used)
    assert q.dtype == torch.uint8
    assert int(q.max()) < 2**bits
    assert torch.equal(ops.dequantize(q, scale, zero_point, used, w.dtype), got)
    channels = w.shape[used] if method == "channel" or axis is not None else 1
    assert tuple(scale.shape) == tuple(zero_point.shape) == (channels,)
    if w.dtype in (torch.float32, torch.float64):  # in half precision a value may round to the next integer
        assert torch.equal(ops.fake_quantize(got, scale, zero_point, bits, used), got)


def test_channel_is_the_output_channel_at_every_width():
    w = torch.tensor([[1.0, 2.0, 3.0], [100.0, 200.0, 300.0]])
    for bits in (4, 8):
        _, scale, _ = KERNELS[bits, "channel"](w)
        assert torch.equal(scale, torch.tensor([3.0, 300.0]) / (2**bits - 1))


@pytest.mark.parametrize(("bits", "method"), list(KERNELS))
def test_kernels_are_emulate_int_and_reuse_a_given_scale(bits, method, device):
    kernel, w = KERNELS[bits, method], torch.randn(6, 10, device=device)
    assert kernel.__name__ == f"emulate_int{bits}_{method}"
    got, scale, zero_point = kernel(w)
    for a, b in zip((got, scale, zero_point), ops.emulate_int(w, bits, method), strict=True):
        assert torch.equal(a, b)
        assert a.device == w.device
    other = 3 * w
    again, same, _ = kernel(other, scale, zero_point)
    assert same is scale
    assert torch.equal(again, ops.fake_quantize(other, scale, zero_point, bits))
    assert not torch.equal(again, kernel(other)[0])


def test_devices_agree(device):
    w = torch.randn(16, 33, generator=torch.Generator().manual_seed(3))
    for bits, method in itertools.product((2, 4, 8), ("tensor", "channel")):
        here = ops.emulate_int(w.to(device), bits, method)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(here, ops.emulate_int(w, bits, method), strict=True))


def test_memory_layout_does_not_matter():
    w = torch.randn(8, 6, 5, 4, generator=torch.Generator().manual_seed(3))
    layouts = [w.to(memory_format=torch.channels_last), w.transpose(0, 1).contiguous().transpose(0, 1)]
    for bits, method in itertools.product((4, 8), ops.METHODS):
        expected = ops.emulate_int(w, bits, method)
        for layout in layouts:
            assert all(torch.equal(a, b) for a, b in zip(ops.emulate_int(layout, bits, method), expected, strict=True))


def test_the_input_is_not_changed():
    w = torch.randn(5, 5)
    before = w.clone()
    for bits, method in itertools.product((4, 8), ops.METHODS):
        ops.emulate_int(w, bits, method)
    assert torch.equal(w, before)


def test_quantize_is_fairseqs_name_for_fake_quantize():
    """It returns reals, so nothing in the house uses it."""
    w, scale, zero_point = torch.randn(4, 6), torch.tensor([0.1]), torch.tensor([5], dtype=torch.int32)
    assert torch.equal(ops.quantize(w, scale, zero_point, 4), ops.fake_quantize(w, scale, zero_point, 4))
    users = re.compile(r"ops\.quantize\(|scalar\.(ops|grid) import [^\n]*\bquantize\b")
    root = Path(fairseq.__file__).parent
    assert not [path for path in root.rglob("*.py") if users.search(path.read_text())]


GOOD = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((GOOD, 16, "tensor"), ValueError, "bits must be from 2 to 8, got 16"),
        ((GOOD, 1, "tensor"), ValueError, "bits must be from 2 to 8, got 1"),
        ((GOOD, 8.0, "tensor"), TypeError, "bits must be an int"),
        ((GOOD, True, "tensor"), TypeError, "bits must be an int"),
        ((GOOD, 8, "foo"), ValueError, "tensor, channel, histogram, got 'foo'"),
        ((GOOD.int(), 8, "tensor"), TypeError, "w must be float16"),
        (([1.0], 8, "tensor"), TypeError, "w must be a torch.Tensor, got list"),
        ((torch.empty(0, 3), 8, "tensor"), ValueError, r"w is empty: shape \(0, 3\)"),
        ((torch.ones(2, device="meta"), 8, "tensor"), ValueError, "meta device"),
        ((torch.tensor([1.0, math.nan]), 8, "histogram"), ValueError, "w has 1 NaN or Inf among its 2 values"),
        ((torch.tensor([-math.inf]), 4, "channel"), ValueError, "NaN or Inf"),
        ((torch.tensor(1.0), 4, "channel"), ValueError, "no channels"),
        ((GOOD, 8, "tensor", torch.ones(1)), ValueError, "give both or neither"),
        ((GOOD, 8, "tensor", torch.ones(2), torch.zeros(2)), ValueError, "one scale for the whole tensor"),
        ((GOOD, 8, "channel", torch.ones(3), torch.zeros(3)), ValueError, r"got \(3,\)"),
        ((GOOD, 8, "channel", torch.ones(2), torch.zeros(1)), ValueError, "must have one shape"),
        ((GOOD, 8, "tensor", torch.zeros(1), torch.zeros(1)), ValueError, "scale must be positive"),
        ((GOOD, 4, "tensor", torch.ones(1), torch.tensor([16])), ValueError, "integers from 0 to 15 at 4 bits"),
    ],
)
def test_errors_say_what_came_and_what_is_accepted(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.emulate_int(*arguments)


def test_errors_of_axis_and_name():
    with pytest.raises(ValueError, match="takes no axis"):
        ops.emulate_int(GOOD, 8, "tensor", axis=0)
    with pytest.raises(ValueError, match="takes no axis"):
        ops.emulate_int(GOOD, 8, "tensor", torch.ones(1), torch.zeros(1), axis=0)
    with pytest.raises(ValueError, match="axis must be from -2 to 1"):
        ops.emulate_int(GOOD, 8, "channel", axis=2)
    with pytest.raises(ValueError, match=r"layer\.7\.weight has 1 NaN"):
        ops.emulate_int(torch.tensor([math.nan]), 8, "tensor", name="layer.7.weight")
