"""Calibration: the statistics are those of the layers' inputs, and the model is left as it was."""

import copy

import pytest
import torch
from bounds import EXACT, sum_error
from torch import nn

from fairseq.quantization.architectures.layers import block_of, linear_layers
from fairseq.quantization.calibration.stream import GRADIENT_BATCH_SIZE, UNIFORM_SHARE, Stream, collect, token_weights


@pytest.fixture
def images():
    return torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(4)).double()


@pytest.fixture
def tiny_vit(tiny_vit):
    """In float64, where only a fault makes a difference."""
    return tiny_vit.double()


def inputs_by_hook(model, pixels):
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, a, name=name: seen.__setitem__(name, a[0].flatten(0, -2)))
        for name, m in linear_layers(model).items()
    ]
    with torch.no_grad():
        model(pixels)
    for hook in hooks:
        hook.remove()
    return seen


def block_names(model):
    return [b for b in dict.fromkeys(block_of(name) for name in linear_layers(model)) if b]


def walk(stream, names):
    """The inputs of every layer, in the order of a forward pass."""
    got = {}
    for name in names:
        if block_of(name):
            stream.advance_to(block_of(name))
        got[name] = torch.cat(list(stream.inputs(name)))
    return got


def test_the_stream_shows_what_each_layer_reads(tiny_vit, images):
    expected = inputs_by_hook(tiny_vit, images)
    stream = Stream(tiny_vit, tiny_vit, images, block_names(tiny_vit))
    assert stream.stored
    for name, got in walk(stream, expected).items():
        torch.testing.assert_close(got, expected[name], **EXACT)


def test_it_sees_layers_that_were_swapped_before(tiny_vit, images):
    changed = copy.deepcopy(tiny_vit)
    stream = Stream(tiny_vit, changed, images, block_names(tiny_vit))
    first, second = block_names(tiny_vit)
    stream.advance_to(first)
    with torch.no_grad():
        for name, layer in linear_layers(changed).items():
            if block_of(name) == first:
                layer.weight.mul_(1.3)
    expected = inputs_by_hook(changed, images)
    stream.advance_to(second)
    names = [name for name in expected if block_of(name) != first]
    for name in names:
        torch.testing.assert_close(torch.cat(list(stream.inputs(name))), expected[name], **EXACT)


class _Doubled(nn.Module):
    """A ViT whose blocks are not simply one after the other."""

    def __init__(self, model):
        super().__init__()
        self.vit, self.config = model.vit, model.config
        blocks = [model.get_submodule(name) for name in block_names(model)]
        blocks[1].register_forward_pre_hook(lambda m, a: (2 * a[0], *a[1:]))
        self.model = [model]

    def forward(self, pixel_values):
        return self.model[0](pixel_values)


def test_blocks_that_do_not_chain_are_reached_by_whole_passes(tiny_vit, images):
    model = _Doubled(tiny_vit)
    names = list(linear_layers(model))
    expected = inputs_by_hook(model, images)
    stream = Stream(model, model, images, block_names(model))
    assert not stream.stored
    for name, got in walk(stream, names).items():
        torch.testing.assert_close(got, expected[name], **EXACT)


def test_a_layer_that_is_never_reached_is_named(tiny_vit, images):
    tiny_vit.unused = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="unused is not reached by a forward pass"):
        list(Stream(tiny_vit, tiny_vit, images, block_names(tiny_vit)).inputs("unused"))


def whole(*shape, low=-9, high=10):
    """Small integers, whose sums of products are exact in float32, in whatever order."""
    return torch.randint(low, high, shape).float()


def test_collect_is_the_weighted_second_moment():
    torch.manual_seed(0)
    batches = [whole(7, 5), whole(4, 5)]
    x, w = torch.cat(batches), whole(11, low=1)
    weighted, plain = collect(iter(batches), [w, torch.empty(0)], ["a", "b"], None)
    assert torch.equal(weighted.second_moment, (x.T * w) @ x / w.sum())
    assert torch.equal(weighted.mean, (x.T @ w) / w.sum())
    assert torch.equal(plain.second_moment, x.T @ x / 11)


def test_collect_sees_the_drift_from_the_float_model():
    torch.manual_seed(0)
    batches, exact = [whole(7, 5), whole(4, 5)], [whole(7, 5), whole(4, 5)]
    x, lost, w = torch.cat(batches), torch.cat(exact) - torch.cat(batches), whole(11, low=1)
    weighted, plain = collect(iter(batches), [w, torch.empty(0)], ["a", "b"], None, iter(exact))
    assert torch.equal(weighted.drift, (lost.T * w) @ x / w.sum())
    assert torch.equal(weighted.drift_mean, (lost.T @ w) / w.sum())
    assert torch.equal(plain.drift, lost.T @ x / 11)
    assert weighted.samples == w.sum().item() ** 2 / w.square().sum().item()
    assert plain.samples == 11
    assert collect(iter(batches), [w], ["a"])[0].drift is None


def test_collect_finds_a_range_for_static_activations():
    torch.manual_seed(0)
    x = torch.randn(4000, 8)
    x[0, 0] = 40
    (found,) = collect(iter([x]), [torch.empty(0)], ["a"], 4)
    assert -4 < found.low < -1.5
    assert 1.5 < found.high < 12  # not the outlier's 40
    (wide,) = collect(iter([x]), [torch.empty(0)], ["a"], 8)
    assert wide.static_sqnr > found.static_sqnr > 10


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="fc1: its input is not finite"):
        collect(iter([torch.tensor([[1.0, torch.nan]])]), [torch.empty(0)], ["fc1"], None)


def test_token_weights_are_squared_gradients(tiny_vit, images):
    name = next(n for n in linear_layers(tiny_vit) if n.endswith(("fc1", "intermediate.dense")))
    got = token_weights(tiny_vit, images[:4], [name], seed=5)[name]
    seen = []
    hook = tiny_vit.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y))
    logits = tiny_vit(images[:4]).logits
    hook.remove()
    generator = torch.Generator().manual_seed(5)
    v = torch.cat([torch.randn(part.shape, generator=generator) for part in logits.split(GRADIENT_BATCH_SIZE)])
    v -= v.mean(-1, keepdim=True)
    (gradient,) = torch.autograd.grad((logits * v).sum(), seen)
    square = gradient.square().sum(-1).flatten()
    error = sum_error(gradient.shape[-1] + len(square), 1.0)  # of the squares' sum and of their mean, in float32
    expected = (1 - UNIFORM_SHARE) * square / square.mean() + UNIFORM_SHARE
    torch.testing.assert_close(got.double(), expected, atol=0, rtol=error)


def test_what_the_output_does_not_read_counts_little(tiny_vit, images):
    names = list(linear_layers(tiny_vit))
    weights = token_weights(tiny_vit, images, names)
    last = [n for n in names if n.endswith(("fc2", "output.dense")) and "attention" not in n][-1]
    tokens = weights[last].view(len(images), -1)
    assert (tokens[:, 1:] == UNIFORM_SHARE).all()  # only the class token goes on from the last block
    assert (tokens[:, 0] > 1).any()
    for values in weights.values():
        assert values.mean().item() == pytest.approx(1, abs=sum_error(len(values), 1.0))


def test_the_model_is_left_as_it_was(tiny_vit, images):
    tiny_vit.train()
    tiny_vit.requires_grad_(False)
    before = copy.deepcopy(tiny_vit.state_dict())
    token_weights(tiny_vit, images, list(linear_layers(tiny_vit)))
    assert tiny_vit.training
    assert all(p.grad is None and not p.requires_grad for p in tiny_vit.parameters())
    assert all(torch.equal(before[key], value) for key, value in tiny_vit.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_vit.modules())
