"""The gradient of a packed layer is that of its emulated twin: straight through the rounding, by the rounded weight."""

import pytest
import torch
from torch import nn

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.kernels import library, native
from fairseq.modules.quantization.scalar.modules import EmulatedLinear


def twins(config, factor):
    torch.manual_seed(0)
    linear = nn.Linear(24, 17)
    span = (-1.0, 1.5) if config.activations == "static" else None
    emulated = EmulatedLinear.from_linear(
        linear, config.bits, config.method, activations=config.activations, input_range=span, input_factor=factor
    ).eval()
    packed = PackedLinear.from_integers(
        emulated.integers(), emulated.scale, emulated.zero_point, linear.bias, config, "fc1", span, factor
    ).eval()
    return packed, emulated


@pytest.mark.parametrize(
    ("layout", "activations"),
    [("rows", "dynamic"), ("rows", "static"), ("rows", None), ("native", "dynamic"), ("native", "static")],
)
@pytest.mark.parametrize("factor", [False, True])
def test_it_is_that_of_the_emulated_layer(layout, activations, factor):
    by = torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.5 if factor else None
    packed, emulated = twins(LinearConfig(4, "channel", activations=activations), by)
    if layout == "native":
        if not native.levels():
            pytest.skip(library.NOT_BUILT)
        packed.use_native()
        assert packed.panels is not None
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2))
    v = torch.randn(3, 5, 17, generator=torch.Generator().manual_seed(3))
    gradients = []
    for layer in (packed, emulated):
        leaf = x.clone().requires_grad_()
        (layer(leaf) * v).sum().backward()
        gradients.append(leaf.grad)
    assert (gradients[0] == 0).any() == (activations == "static")  # where it saturates
    # sums of 17 products, each in an order of its own, and the factor before or after them
    bound = (17 + 2) * torch.finfo(torch.float32).eps * (v.abs() @ packed.dequantize().abs())
    assert ((gradients[0] - gradients[1]).abs() <= bound).all()


def test_in_half_precision_and_for_views_that_are_written_to():
    packed, _ = twins(LinearConfig(8, "channel"), None)
    x = torch.randn(2, 24, dtype=torch.bfloat16, requires_grad=True)
    y = packed(x)
    y += 1  # as a block may do
    y.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.abs().sum() > 0


def test_what_comes_before_is_trained_the_integers_are_not():
    packed, _ = twins(LinearConfig(4, "channel"), None)
    norm, before = nn.LayerNorm(24), packed.integers().clone()
    optimizer = torch.optim.Adam(norm.parameters(), 0.05)
    x, losses = torch.randn(64, 24, generator=torch.Generator().manual_seed(4)), []
    for _ in range(30):
        loss = packed(norm(x)).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(packed.integers(), before)
