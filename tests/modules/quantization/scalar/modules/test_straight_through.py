"""Straight-through gradients and Quant-Noise."""

import pytest
import torch

from fairseq.modules.quantization.scalar import ops
from fairseq.modules.quantization.scalar.modules.straight_through import check_noise, fake_quantize_ste, quant_noise


@pytest.mark.parametrize("axis", [0, 1, None])
def test_gradient_is_that_of_the_piecewise_linear_surrogate(axis, device):
    """Against central differences of clamp(x, low, high), on points inside, outside and not on a kink."""
    x = torch.linspace(-4, 4, 60, dtype=torch.float64, device=device).view(6, 10) + 0.0123
    count = 1 if axis is None else x.shape[axis]
    scale = torch.linspace(0.1, 0.3, count, dtype=torch.float64, device=device)
    zero_point = torch.linspace(3, 11, count, device=device).to(torch.int32)
    used = 0 if axis is None else axis
    weights = torch.linspace(-1, 2, 60, dtype=torch.float64, device=device).view(6, 10)

    leaf = x.clone().requires_grad_()
    out = fake_quantize_ste(leaf, scale, zero_point, 4, used)
    (out * weights).sum().backward()
    assert torch.equal(out.detach(), ops.fake_quantize(x, scale, zero_point, 4, used))

    low, high = ops.representable_range(*ops.broadcast_qparams(scale, zero_point, x, used), 4)

    def surrogate(value):
        return torch.minimum(torch.maximum(value, low), high) * weights

    h = 1e-6
    numeric = (surrogate(x + h) - surrogate(x - h)) / (2 * h)
    assert 0 < int((numeric == 0).sum()) < 60
    # x + h, x - h and the two products are rounded; the quotient makes that larger. No point is within h of a kink.
    bound = 4 * torch.finfo(torch.float64).eps * float(x.abs().max() * weights.abs().max()) / (2 * h)
    assert bool(((leaf.grad - numeric).abs() <= bound).all())


def test_without_gradients_it_is_fake_quantize():
    x, scale, zero_point = torch.randn(5), torch.tensor([0.1]), torch.tensor([8], dtype=torch.int32)
    assert not fake_quantize_ste(x, scale, zero_point, 4).requires_grad
    with torch.no_grad():
        out = fake_quantize_ste(x.requires_grad_(), scale, zero_point, 4)
    assert not out.requires_grad
    assert torch.equal(out, ops.fake_quantize(x.detach(), scale, zero_point, 4))


def test_noise_takes_a_share_p_of_the_elements():
    torch.manual_seed(0)
    x, quantized = torch.zeros(200, 200), torch.ones(200, 200)
    assert quant_noise(x, quantized, 0) is x
    assert quant_noise(x, quantized, 1) is quantized
    share = quant_noise(x, quantized, 0.3)
    assert abs(float(share.mean()) - 0.3) < 0.01  # 4 standard deviations
    assert 0 < float(share.mean(0).std()) < 0.05  # elementwise, not by row or column


@pytest.mark.parametrize(("p", "update_step"), [(-0.1, 1), (1.1, 1), (0.5, 0), (0.5, 1.5), (0.5, True)])
def test_settings_outside_their_range(p, update_step):
    with pytest.raises(ValueError, match="p is the probability" if update_step == 1 and p != 0.5 else "update_step"):
        check_noise(p, update_step)
