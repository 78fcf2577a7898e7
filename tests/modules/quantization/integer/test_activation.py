"""QuantAct: ranges, calibration, state, gradients; freezing."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fairseq.modules.quantization.integer import IntSoftmax, QuantAct, freeze_model, unfreeze_model


def calibrated(x, bits=8, **arguments):
    act = QuantAct(bits, quant_mode="symmetric", **arguments).to(x.device)
    act(x)
    return act.eval()


def test_none_is_the_float_sum_and_observes_all_the_same(device):
    act, x, y = QuantAct(8).to(device), torch.randn(3, 4, device=device), torch.randn(3, 4, device=device)
    out, scale = act(x)
    assert scale is None
    assert out is x
    assert torch.equal(act(x, identity=y)[0], x + y)
    assert act.calibrated


@given(
    seed=st.integers(0, 999),
    bits=st.sampled_from([2, 4, 8, 16, 22, 23, 24, 32]),
    spread=st.floats(1e-20, 1e20),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=4),
)
def test_output_is_a_multiple_of_the_scale_and_the_maximum_is_the_last_integer(seed, bits, spread, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread
    act = calibrated(x, bits)
    y, scale = act(x)
    q, n = (y.double() / scale), 2 ** (bits - 1) - 1
    assert y.dtype == (torch.float32 if bits <= 23 else torch.float64)
    assert y.shape == x.shape
    assert q.round().abs().max() == n  # not n - 1
    assert torch.allclose(q, q.round(), rtol=2**-22, atol=1e-6)
    assert ((y - x).abs() <= scale * (0.5 + n * 2**-22)).all()


@pytest.mark.parametrize("training", [False, True])
def test_not_yet_calibrated_says_what_to_do(training):
    act = QuantAct(8, quant_mode="symmetric").train(training)
    act.fix()
    with pytest.raises(RuntimeError, match="has not observed a range yet: run a few batches"):
        act(torch.ones(2))
    with pytest.raises(RuntimeError, match="has not observed"):
        act(torch.ones(2), specified_min=-1.0)
    assert act(torch.ones(2), specified_min=-1.0, specified_max=1.0)[0].tolist() == [1, 1]


@pytest.mark.parametrize("value", [0.0, 1e-5, -1e-5, 0.3])
def test_no_value_means_not_calibrated(value):
    """I-BERT took a range of +-1e-5 for none and started anew."""
    act = QuantAct(8, act_range_momentum=0.5, quant_mode="symmetric")
    act(torch.tensor([value]))
    act(torch.tensor([value + 1.0]))
    assert torch.allclose(act.x_max, torch.tensor([value + 0.5], dtype=torch.float64))


def test_momentum_and_the_widest_range():
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([0.0, 4.0])]
    act, widest = QuantAct(8, 0.9, quant_mode="symmetric"), QuantAct(8, -1, quant_mode="symmetric")
    low, high = -1.0, 2.0
    for i, batch in enumerate(batches):
        act(batch)
        widest(batch)
        if i:
            low, high = 0.9 * low + 0.1 * float(batch[0]), 0.9 * high + 0.1 * float(batch[1])
    assert torch.allclose(torch.cat([act.x_min, act.x_max]), torch.tensor([low, high], dtype=torch.float64))
    assert torch.allclose(act.act_scaling_factor, torch.tensor([high / 127], dtype=torch.float64))
    assert (widest.x_min.item(), widest.x_max.item()) == (-3, 4)


def test_eval_and_frozen_leave_the_range_alone():
    act = QuantAct(8, quant_mode="symmetric")
    act(torch.tensor([-1.0, 1.0]))
    before = copy.deepcopy(act.state_dict())
    act.eval()(torch.tensor([9.0]))
    act.train().fix()
    y, scale = act(torch.tensor([9.0]))
    assert all(torch.equal(before[k], v) for k, v in act.state_dict().items())
    assert torch.allclose(y.double() / scale, torch.tensor([127.0]).double())  # clamped to the range
    act.unfix()
    act(torch.tensor([9.0]))
    assert act.x_max > 1


def test_specified_ends_take_the_place_of_the_running_ones():
    act = calibrated(torch.tensor([-1.0, 1.0]))
    assert torch.allclose(act(torch.ones(1), specified_max=4.0)[1] * 127, torch.tensor([4.0]).double())
    assert torch.allclose(act(torch.ones(1), specified_min=torch.tensor([-3.0]))[1] * 127, torch.tensor([3.0]).double())
    assert torch.allclose(
        act(torch.ones(1), specified_min=0.0, specified_max=0.5)[1] * 127, torch.tensor([0.5]).double()
    )
    assert torch.allclose(act.act_scaling_factor * 127, torch.tensor([1.0]).double())


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3), (2, 2, 3, 3)])
def test_per_channel_ranges_belong_to_the_last_dimension(shape, device):
    x = torch.randn(shape, device=device) * torch.tensor([0.1, 1.0, 50.0], device=device)
    act = calibrated(x, per_channel=True, channel_len=3)
    y, scale = act(x)
    assert torch.allclose(scale * 127, x.abs().reshape(-1, 3).amax(0).double())
    assert ((y - x).abs() <= scale * (0.5 + 127 * 2**-22)).all()
    requantized, _ = act(y, scale)
    assert torch.equal(requantized, y)
    act.train()
    with pytest.raises(ValueError, match="channel_len=3, got an input of shape"):
        act(torch.ones(2, 5, device=device))


@pytest.mark.parametrize("route", ["state_dict", "deepcopy", "pickle", "torch.save"])
def test_calibration_survives(route, device):
    x = torch.randn(5, 6, device=device)
    act = calibrated(x)
    if route == "state_dict":
        other = QuantAct(8, quant_mode="symmetric").to(device).eval()
        other.load_state_dict(act.state_dict())
    elif route == "deepcopy":
        other = copy.deepcopy(act)
    elif route == "pickle":
        other = pickle.loads(pickle.dumps(act))
    else:
        file = io.BytesIO()
        torch.save(act.state_dict(), file)
        file.seek(0)
        other = QuantAct(8, quant_mode="symmetric").to(device).eval()
        other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x)[0], act(x)[0])
    assert torch.equal(other(x)[1], act(x)[1])


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double])
def test_casting_the_model_keeps_the_scale(cast, device):
    x = torch.randn(5, 6, device=device)
    act = calibrated(x)
    model = nn.Sequential(act, nn.Linear(6, 6).to(device))
    before = [act.x_min.clone(), act.x_max.clone(), act.act_scaling_factor.clone(), *act(x)]
    cast(model)
    after = [act.x_min, act.x_max, act.act_scaling_factor, *act(x)]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, after))
    assert act.x_min.device.type == device.type


def test_half_inputs_are_quantized_to_a_float32_carrier(device):
    x = torch.randn(50, device=device).half()
    act = calibrated(x, 16)
    y, scale = act(x)
    assert y.dtype == torch.float32
    assert ((y - x).abs() <= scale * (0.5 + 127 * 2**-22)).all()


def test_gradient_is_that_of_the_clamp(device):
    """Finite differences of clamp(x, -n * scale, n * scale), from real numbers and from integers."""
    act = calibrated(torch.tensor([-1.0, 1.0], device=device))
    step = act.act_scaling_factor / 16
    grid = torch.arange(-4000, 4000, 9, device=device).double() * step
    grid = grid[(grid.abs() - 1).abs() > 2 * act.act_scaling_factor]
    weights, h = torch.randn_like(grid), 1e-6
    expected = weights * ((grid + h).clamp(-1, 1) - (grid - h).clamp(-1, 1)) / (2 * h)
    for pre in (None, step):
        x = grid.clone().requires_grad_()
        (act(x, pre)[0] * weights).sum().backward()
        assert torch.allclose(x.grad, expected, rtol=1e-5, atol=1e-9)
    assert (expected == 0).any()


def test_identity_is_added_in_integers_and_in_reals(device):
    x, residual = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device)
    first, second = calibrated(x, 16), calibrated(residual, 16)
    out = calibrated(x + residual, 22)
    (a, a_scale), (b, b_scale) = first(x), second(residual)
    y, scale = out(a, a_scale, b, b_scale)
    assert ((y - (x + residual)).abs() <= a_scale + b_scale + scale).all()
    assert ((out(x, identity=residual)[0] - (x + residual)).abs() <= scale).all()


def test_refusals():
    x, act = torch.ones(3), calibrated(torch.ones(3))
    with pytest.raises(ValueError, match="identity_scaling_factor needs pre_act_scaling_factor"):
        act(x, None, x, torch.ones(1))
    with pytest.raises(ValueError, match="give both or neither"):
        act(x, torch.ones(1), x)
    with pytest.raises(ValueError, match="the input of QuantAct has 1 NaN or Inf"):
        act(torch.tensor([1.0, float("inf")]))
    with pytest.raises(ValueError, match="not a multiple of its scaling factor"):
        act(x * 1.25, torch.ones(1))
    for arguments, message in (
        ({"activation_bit": 33}, "activation_bit must be from 2 to 32"),
        ({"activation_bit": 8, "act_range_momentum": 1.5}, "act_range_momentum must be from 0 to 1"),
        ({"activation_bit": 8, "per_channel": True}, "channel_len goes with per_channel=True"),
        ({"activation_bit": 8, "channel_len": 3}, "channel_len goes with per_channel=True"),
        ({"activation_bit": 8, "quant_mode": "int"}, "quant_mode must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantAct(**arguments)
    with pytest.raises(NotImplementedError, match="asymmetric"):
        QuantAct(8, quant_mode="asymmetric")


def test_freezing_reaches_every_quant_act_the_one_inside_softmax_too():
    softmax, act = IntSoftmax(8, quant_mode="symmetric"), QuantAct(8, quant_mode="symmetric")
    model = nn.ModuleDict({"inner": nn.Sequential(softmax), "act": act})
    x, scale = torch.tensor([[0.5, -1.0]]), torch.tensor([0.5])
    act(x)
    freeze_model(model)
    assert not softmax.act.running_stat
    before = copy.deepcopy(model.state_dict())
    act(x * 10)
    softmax(x, scale)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    unfreeze_model(model)
    act(x * 10)
    softmax(x, scale)
    assert act.x_max > before["act.x_max"]
    assert softmax.act.calibrated
    freeze_model(act)  # the model may be a QuantAct itself
    assert not act.running_stat
