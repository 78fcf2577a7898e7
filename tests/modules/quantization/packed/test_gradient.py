"""The gradient of a packed layer is that of its emulated twin: straight through the rounding, by the rounded weight."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

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


def layers(layout, activations, factor):
    by = torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.5 if factor else None
    packed, emulated = twins(LinearConfig(4, "channel", activations=activations), by)
    if layout == "native":
        if not native.levels():
            pytest.skip(library.NOT_BUILT)
        packed.use_native()
        assert packed.panels is not None
    return packed, emulated


each_layout = pytest.mark.parametrize(
    ("layout", "activations"),
    [("rows", "dynamic"), ("rows", "static"), ("rows", None), ("native", "dynamic"), ("native", "static")],
)


@each_layout
@pytest.mark.parametrize("factor", [False, True])
def test_it_is_that_of_the_emulated_layer(layout, activations, factor):
    packed, emulated = layers(layout, activations, factor)
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


@each_layout
def test_transforms_of_functions_follow_it(layout, activations):
    """Batched, backwards, forwards and twice: each is the same linear function, and the outputs keep their bits."""
    packed, _ = layers(layout, activations, factor=True)
    random = torch.Generator().manual_seed(2)
    x, t = torch.randn(2, 3, 5, 24, generator=random)
    v = torch.randn(3, 5, 17, generator=random)
    leaf, eps = x.clone().requires_grad_(), torch.finfo(torch.float32).eps
    y = packed(leaf)
    (backwards,) = torch.autograd.grad(y, leaf, v)
    for dim in (0, 1):
        assert torch.equal(torch.func.vmap(packed, dim, dim)(x), y)
    assert torch.equal(torch.func.vmap(lambda _: packed(x), randomness="error")(v), y.expand(3, *y.shape))

    def loss(x, v):
        return (packed(x) * v).sum()

    weight = packed.dequantize().abs()
    bound = (17 + 2) * eps * (v.abs() @ weight)
    for got in (torch.func.grad(loss)(x, v), torch.func.vmap(torch.func.grad(loss))(x, v)):
        assert ((got - backwards).abs() <= bound).all()

    expected = t * (backwards != 0 if activations == "static" else 1) @ packed.dequantize().T
    bound = (24 + 2) * eps * (t.abs() @ weight.T)
    outputs, forwards = torch.func.jvp(packed, (x,), (t,))
    assert torch.equal(outputs, y)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.unpack_dual(packed(forward_ad.make_dual(x, t))).tangent
    again = torch.func.grad(lambda v: (torch.func.grad(loss)(x, v) * t).sum())(v)
    for got in (forwards, dual, again):
        assert ((got - expected).abs() <= bound).all()


@each_layout
def test_it_is_recomputed_by_a_checkpoint(layout, activations):
    packed, _ = layers(layout, activations, True)
    gradients = []
    for run in (packed, lambda x: checkpoint(packed, x, use_reentrant=False)):
        leaf = torch.linspace(-2, 2, 48).view(2, 24).requires_grad_()
        run(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_a_transform_around_functionalize_is_refused_not_wrong():
    packed, _ = layers("rows", "dynamic", False)
    with pytest.raises(RuntimeError, match="Functionalize"):
        torch.func.grad(torch.func.functionalize(lambda x: packed(x).sum()))(torch.randn(2, 24))


@pytest.mark.parametrize("layout", ["rows", "native"])
def test_zeros_without_memory(layout):
    packed, _ = layers(layout, "dynamic", False)
    assert torch.equal(packed(torch._efficientzerotensor(3, 24)), packed(torch.zeros(3, 24)))


def test_transforms_do_not_reach_integers():
    packed, _ = twins(LinearConfig(8, "channel"), None)
    scales, x = torch.stack([packed.scale, packed.scale * 2]), torch.randn(2, 24)
    with pytest.raises(RuntimeError, match="can transform the input of fc1, but not its integers, scales and bias"):
        torch.func.vmap(lambda s: torch.func.functional_call(packed, {"scale": s}, (x,)))(scales)


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
