"""ActivationQuantizer: the hook, its range, and where it is kept."""

import copy

import pytest
import torch
from torch import nn

from fairseq.modules.quantization.scalar import ops
from fairseq.modules.quantization.scalar.modules import ActivationQuantizer


def test_eval_output_lies_on_the_grid_of_the_first_batch(device):
    module = nn.Linear(4, 6).to(device).eval()
    x = torch.randn(50, 4, device=device)
    exact = module(x).detach()
    ActivationQuantizer(module, bits=4, method="tensor", clamp_threshold=None)
    expected, scale, zero_point = ops.emulate_int(exact, 4, "tensor")
    assert torch.equal(module(x), expected)
    assert torch.equal(
        module(3 * x), ops.fake_quantize(nn.functional.linear(3 * x, module.weight, module.bias), scale, zero_point, 4)
    )
    assert torch.equal(module.activation_scale, scale)


def test_channel_is_the_feature_dimension():
    for module, shape, channels in (
        (nn.Linear(4, 6), (2, 7, 4), 6),
        (nn.Conv2d(3, 5, 1), (2, 3, 4, 4), 5),
        (nn.Conv2d(3, 5, 1), (3, 7, 4), 5),
        (nn.ConvTranspose1d(3, 5, 1), (2, 3, 4), 5),
    ):
        ActivationQuantizer(module.eval(), bits=8, method="channel")
        module(torch.randn(shape))
        assert module.activation_scale.shape == (channels,)


def test_clamp_threshold_keeps_an_outlier_out_of_the_range():
    x = torch.randn(10_000)
    x[0] = 1000.0
    ranges = {}
    for threshold in (5, None):
        module = nn.Identity().eval()
        ActivationQuantizer(module, bits=8, method="tensor", clamp_threshold=threshold)
        module(x)
        end = ops.representable_range(module.activation_scale, module.activation_zero_point, 8)[1]
        ranges[threshold] = (
            float(end),
            0.501 * float(module.activation_scale),
        )  # zero is exact, so an end is half a step off
    assert ranges[None][0] == pytest.approx(1000, abs=ranges[None][1])
    assert ranges[5][0] == pytest.approx(float(x.mean() + 5 * x.std()), abs=ranges[5][1])


def test_training_follows_p_and_update_step():
    module = nn.Identity().train()
    ActivationQuantizer(module, p=0, update_step=2, bits=4, method="tensor")
    x = torch.randn(100)
    assert module(x) is x
    first = float(module.activation_scale)
    module(10 * x)
    assert float(module.activation_scale) == first
    module(10 * x)
    assert float(module.activation_scale) == pytest.approx(10 * first)
    before = module.activation_scale
    module.eval()(x)
    assert module.activation_scale is before


def test_gradient_passes_inside_the_range_only():
    module = nn.Identity().train()
    ActivationQuantizer(module, p=1, update_step=100, bits=8, method="tensor", clamp_threshold=None)
    module(torch.tensor([-1.0, 1.0]))
    x = torch.tensor([-2.0, -0.5, 0.5, 2.0], requires_grad=True)
    module(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_range_is_saved_moved_and_copied_with_the_module(tmp_path, device):
    module = nn.Sequential(nn.Linear(4, 6)).to(device).eval()
    ActivationQuantizer(module[0], bits=4)
    x = torch.randn(5, 4, device=device)
    expected = module(x)
    torch.save(module.state_dict(), tmp_path / "m.pt")
    fresh = nn.Sequential(nn.Linear(4, 6)).eval()
    ActivationQuantizer(fresh[0], bits=4)
    fresh.load_state_dict(torch.load(tmp_path / "m.pt", map_location="cpu"))
    assert torch.equal(fresh.to(device)(x), expected)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), expected)
    twin[0].activation_scale.mul_(2)
    assert torch.equal(module(x), expected)
    fresh.load_state_dict({k: v for k, v in fresh.state_dict().items() if "activation" not in k})
    assert fresh[0].activation_scale is None


def test_half_precision():
    module = nn.Linear(4, 6).eval()
    ActivationQuantizer(module, bits=8, method="tensor")
    x = torch.randn(20, 4)
    expected = module(x)
    got = module.half()(x.half())
    assert got.dtype == torch.float16
    # Half a step in each; before it, five terms of which both factors, each product and each sum are rounded.
    terms = x.abs() @ module.weight.float().abs().T + module.bias.float().abs()
    bound = module.activation_scale * 1.01 + 20 * torch.finfo(torch.float16).eps * terms
    assert bool(((got.float() - expected).abs() <= bound).all())


def test_remove_ends_it_and_a_second_one_is_refused():
    module = nn.Linear(4, 6).eval()
    x = torch.randn(5, 4)
    exact = module(x)
    quantizer = ActivationQuantizer(module, bits=2)
    assert not torch.equal(module(x), exact)
    with pytest.raises(ValueError, match="already"):
        ActivationQuantizer(module)
    quantizer.handle.remove()
    assert torch.equal(module(x), exact)
    nn.Linear(4, 6).load_state_dict(module.state_dict())  # nothing is left in it
    ActivationQuantizer(module, bits=2)
    assert not torch.equal(module(x), exact)


def test_errors():
    for settings in ({"p": 2}, {"bits": 1}, {"method": "foo"}, {"clamp_threshold": 0}, {"update_step": 0}):
        with pytest.raises(ValueError, match="|".join(settings)):
            ActivationQuantizer(nn.Identity(), **settings)
    module = nn.LSTM(2, 2)
    ActivationQuantizer(module)
    with pytest.raises(TypeError, match="got tuple"):
        module(torch.ones(1, 1, 2))
