"""Patch embeddings in float32 by the kernels: near the convolution, and the convolution wherever it must be."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed.kernels import library, native, patch_products
from fairseq.quantization.engine import patch_convolution
from fairseq.quantization.engine.fused_block import FusedBlock
from fairseq.quantization.engine.patch_convolution import PatchConvolution, reason_not_patches

pytestmark = pytest.mark.skipif(not native.levels(), reason=library.NOT_BUILT)
TILES = [level for level in native.levels() if native.fast_halves(native.level_number(level))]
FLOATS = [level for level in native.levels() if native.fast_floats(native.level_number(level))]


def convolution(channels=3, outputs=40, size=(5, 7), bias=True):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, outputs, size, size, bias=bias)
    conv.__class__ = PatchConvolution
    return conv


@pytest.fixture(params=[*TILES[:1], *FLOATS[:1]])
def used(monkeypatch, request):
    """The shapes of pictures that the kernels were given, on emulated tiles, and on AVX-512 where there is that."""
    monkeypatch.setenv("FAIRSEQ_QUANTIZATION_LEVEL", request.param)
    monkeypatch.setattr(patch_convolution, "FEWEST", 1)
    seen, run = [], patch_products.run_patches

    def record(pixels, *args):
        seen.append(tuple(pixels.shape))
        return run(pixels, *args)

    monkeypatch.setattr(patch_products, "run_patches", record)
    return seen


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize(
    ("pictures", "size", "outputs", "bias"),
    [((2, 3, 32, 45), (5, 7), 40, True), ((5, 1, 8, 8), (4, 4), 3, False), ((1, 3, 96, 64), (16, 16), 70, True)],
)
def test_it_is_the_convolution_to_its_bound(level, pictures, size, outputs, bias):
    conv = convolution(pictures[1], outputs, size, bias)
    x = torch.randn(pictures, generator=torch.Generator().manual_seed(1))
    x[0, 0, 0, 0] = 1e4
    weight, number = conv.weight.detach(), native.level_number(level)
    bias = None if conv.bias is None else conv.bias.detach()
    exact = nn.functional.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), size)
    sizes = nn.functional.conv2d(x.abs().double(), weight.abs().double(), None, size)
    terms, halves = weight[0].numel(), level in TILES
    per_term = 3 * 2**-18 + 3 * terms * 2**-24 if halves else 1.01 * (terms + 1) * 2**-24
    bound = sizes * per_term + 2**-23 * (0 if bias is None else bias.abs().max())
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(patch_products.run_patches(x, weight, bias, number))
        found.append(torch.cat([patch_products.run_patches(one[None], weight, bias, number) for one in x]))
    assert (found[0].permute(0, 3, 1, 2) - exact).abs().le(bound).all()
    rounded = nn.functional.conv2d(x.bfloat16().double(), weight.bfloat16().double(), None, size)
    assert not (rounded - exact).abs().le(bound).all()  # what one product of bfloat16 would give
    assert all(torch.equal(other, found[0]) for other in found[1:])
    if not halves:  # the order of the terms is the same everywhere
        assert torch.equal(found[0], patch_products.run_patches(x, weight, bias, native.level_number("portable")))


def test_what_is_not_finite_does_not_become_finite(used):
    conv, x = convolution(), torch.zeros(1, 3, 10, 14)
    x[0, 0, 0, 0], x[0, 0, 6, 8] = torch.nan, torch.inf
    with torch.no_grad():
        y = conv(x)
    assert not y[..., 0, 0].isfinite().any()
    assert not y[..., 1, 1].isfinite().any()
    assert y[..., 0, 1].isfinite().all()


def test_when_it_is_the_convolution(used, monkeypatch):
    conv, plain = convolution(), convolution()
    plain.__class__ = nn.Conv2d
    x = torch.randn(2, 3, 20, 30)
    with torch.no_grad():
        expected = plain(x)
        assert torch.allclose(conv(x), expected, atol=1e-5)
        assert torch.allclose(conv(x.transpose(2, 3).contiguous().transpose(2, 3)), expected, atol=1e-5)
    assert len(used) == 2
    del used[:]
    with torch.no_grad():
        assert torch.equal(conv(x[0]), plain(x[0]))
        with pytest.raises(RuntimeError):
            conv(torch.randn(2, 4, 20, 30))
        with pytest.raises(RuntimeError):
            conv(torch.randn(2, 3, 4, 30))
        for module in (conv, plain):
            module.bfloat16()
        assert torch.equal(conv(x.bfloat16()), plain(x.bfloat16()))
        for module in (conv, plain):
            module.float()
        with torch.autocast("cpu"):
            assert torch.equal(conv(x), plain(x))
        assert torch.equal(torch.jit.trace(conv, x, check_trace=False)(x), plain(x))
        monkeypatch.setenv("FAIRSEQ_QUANTIZATION_ATTENTION", "float32")
        assert torch.equal(conv(x), plain(x))
        monkeypatch.delenv("FAIRSEQ_QUANTIZATION_ATTENTION")
        monkeypatch.setenv("FAIRSEQ_QUANTIZATION_LEVEL", "portable")
        assert torch.equal(conv(x), plain(x))
    assert not used


def test_gradients_are_those_of_the_convolution(used):
    for bias in (True, False):
        conv, plain, x, found = convolution(bias=bias), convolution(bias=bias), torch.randn(2, 3, 20, 30), []
        plain.__class__ = nn.Conv2d
        with torch.no_grad():
            expected = conv(x)
        for module in (conv, plain):
            x.grad = None
            y = module(x.requires_grad_())
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            found.append([x.grad, *(parameter.grad for parameter in module.parameters())])
            if module is conv:
                assert torch.equal(y, expected)
        assert all(map(torch.equal, *found))
        conv.weight.requires_grad_(False)
        conv(x.detach()).sum()
    assert len(used) == 6


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiler_records_it(used, backend):
    torch.compiler.reset()
    conv, x = convolution(), torch.randn(2, 3, 20, 30)
    compiled = torch.compile(conv, backend=backend, fullgraph=True)
    with torch.no_grad():
        expected = conv(x)
        assert torch.equal(compiled(x), expected)
        assert len(used) == 2
        conv.weight.mul_(2)
        assert torch.equal(compiled(x), conv(x))
        assert not torch.equal(compiled(x), expected)
    compiled(x).sum().backward()
    assert torch.allclose(conv.bias.grad, torch.full((40,), 2.0 * 4 * 4))


def test_a_weight_that_changes(used):
    conv, x = convolution(), torch.randn(2, 3, 20, 30)
    with torch.no_grad():
        for change in (
            lambda: conv.weight.mul_(2),
            lambda: conv.load_state_dict({key: value + 1 for key, value in conv.state_dict().items()}),
            lambda: setattr(conv, "weight", nn.Parameter(conv.weight.flip(0))),
        ):
            before = conv(x)
            change()
            after = conv(x)
            assert not torch.equal(after, before)
            assert torch.allclose(after, nn.functional.conv2d(x, conv.weight, conv.bias, (5, 7)), atol=1e-3)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        with torch.no_grad():
            assert torch.equal(other(x), conv(x))


def test_which_convolutions_become_one(tiny_vit, used):
    reasons = {
        "not an nn.Conv2d": nn.ConvTranspose2d(3, 4, 4, 4),
        "less than 4 x 4": nn.Conv2d(3, 4, 1),
        "patches overlap": nn.Conv2d(3, 4, 7, 4),
        "it pads pictures": nn.Conv2d(3, 4, 4, 4, padding=1),
        "2 groups": nn.Conv2d(4, 4, 4, 4, groups=2),
    }
    for reason, module in reasons.items():
        assert reason in reason_not_patches(module)
    quantizer = ViTQuantizer(bits=8, method="channel")
    fused = quantizer.quantize_model(tiny_vit, engine="fused")
    kinds = [type(module) for module in fused.modules() if isinstance(module, nn.Conv2d)]
    assert kinds == [PatchConvolution]
    layers = quantizer.optimize(fused, "layers")
    name = next(name for name, _ in tiny_vit.named_modules() if name.endswith(("q_proj", "attention.query")))
    glob = f"*{name.rpartition('.')[2]}"  # which rounds otherwise than key and value: nothing is fused
    apart = ViTQuantizer(bits=8, method="channel", overrides={glob: {"activations": None}}).quantize_model(tiny_vit)
    assert not any(isinstance(module, FusedBlock) for module in apart.modules())
    assert [type(module) for module in apart.modules() if isinstance(module, nn.Conv2d)] == [nn.Conv2d]
    assert [type(module) for module in layers.modules() if isinstance(module, nn.Conv2d)] == [nn.Conv2d]
    size = tiny_vit.config.image_size
    with torch.no_grad():
        fused(torch.randn(2, 3, size, size))
    assert used == [(2, 3, size, size)]
    assert fused.state_dict().keys() == layers.state_dict().keys()


def test_tensors_that_are_more_than_numbers(used):
    """Fake, batched and derived ones go to the convolution, which knows them."""
    conv, plain, x = convolution(), convolution(), torch.randn(2, 3, 20, 30)
    plain.__class__ = nn.Conv2d
    weights = torch.stack([conv.weight.detach(), conv.weight.detach() * 2])
    with torch.no_grad():

        def run(module, weight):
            return torch.func.functional_call(module, {"weight": weight}, (x,))

        got, expected = (torch.func.vmap(lambda w, m=module: run(m, w))(weights) for module in (conv, plain))
        assert torch.allclose(got, expected, atol=1e-5)
        for module in (conv, plain):
            with torch.autograd.forward_ad.dual_level():
                weight = torch.autograd.forward_ad.make_dual(weights[0], weights[1])
                y = run(module, weight)
                assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            assert conv(torch.empty(2, 3, 20, 30)).shape == expected.shape[1:]
    assert not used


def test_a_weight_that_went_through_another_dtype(used):
    conv, x = convolution(), torch.randn(2, 3, 20, 30)
    with torch.no_grad():
        for _ in range(5):
            conv(x)
            conv.half().float()
            assert torch.allclose(conv(x), nn.functional.conv2d(x, conv.weight, conv.bias, (5, 7)), atol=1e-4)
            conv.weight.copy_(torch.randn_like(conv.weight) * 0.1)
