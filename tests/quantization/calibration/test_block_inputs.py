"""BlockInputs: what each layer is called with, whatever its block does to its own input."""

import copy

import pytest
import torch
from bounds import EXACT
from torch import nn

from fairseq.quantization.architectures.layers import block_of, linear_layers
from fairseq.quantization.calibration import block_inputs
from fairseq.quantization.calibration.block_inputs import SAMPLE, BlockInputs
from fairseq.quantization.calibration.token_weights import token_weights
from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.conversion.convert import convert


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


def test_they_are_what_each_layer_reads(tiny_vit, images):
    expected = inputs_by_hook(tiny_vit, images)
    stream = BlockInputs(tiny_vit, tiny_vit, images, block_names(tiny_vit))
    assert stream.stored
    for name, got in walk(stream, expected).items():
        torch.testing.assert_close(got, expected[name], **EXACT)


def test_it_sees_layers_that_were_swapped_before(tiny_vit, images):
    changed = copy.deepcopy(tiny_vit)
    stream = BlockInputs(tiny_vit, changed, images, block_names(tiny_vit))
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
    stream = BlockInputs(model, model, images, block_names(model))
    assert not stream.stored
    for name, got in walk(stream, names).items():
        torch.testing.assert_close(got, expected[name], **EXACT)


def test_a_layer_that_is_never_reached_is_named(tiny_vit, images):
    tiny_vit.unused = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="unused is not reached by a forward pass"):
        list(BlockInputs(tiny_vit, tiny_vit, images, block_names(tiny_vit)).inputs("unused"))


class _Block(nn.Module):
    """A block that may write into what it is given, and may halve the tokens."""

    def __init__(self, edits, halves):
        super().__init__()
        self.fc1, self.fc2, self.edits, self.halves = nn.Linear(6, 12), nn.Linear(12, 6), edits, halves

    def forward(self, x, factor):
        x = x.mul_(0.7) if self.edits else x * 0.7
        if self.edits:
            factor["more"] = factor["more"] + 1 if self.edits == "arguments" else factor["more"]
        x = x + factor["scale"] * self.fc2(self.fc1(x).relu())
        return x[:, ::2] if self.halves else x


class _Chain(nn.Module):
    """In float64."""

    def __init__(self, edits=False, halves=False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(_Block(edits, halves) for _ in range(3))
        self.latents = nn.Parameter(torch.randn(1, 8, 6))
        self.between = lambda x: x
        self.double()

    def forward(self, pixel_values):
        x = self.latents.expand(len(pixel_values), -1, -1)
        if pixel_values.shape[-1] != 1:
            x = x + pixel_values.mean((1, 2, 3))[:, None, None]
        factor = {"scale": torch.ones(()), "more": torch.zeros(())}
        for block in self.blocks:
            x = self.between(block(x, factor))
        return {"logits": x.mean(1)}


@pytest.mark.parametrize("halves", [False, True], ids=["one shape", "shapes that change"])
def test_a_block_that_edits_its_input_is_seen_as_one_that_does_not(images, halves):
    expected = inputs_by_hook(_Chain(halves=halves), images)
    model = _Chain(edits="input", halves=halves)
    stream = BlockInputs(model, model, images, block_names(model))
    assert stream.stored
    for _ in range(2):  # nothing that was stored was written
        for name in [n for n in expected if n.startswith("blocks.0.")]:
            torch.testing.assert_close(torch.cat(list(stream.inputs(name))), expected[name], **EXACT)
    for name, got in walk(stream, expected).items():
        torch.testing.assert_close(got, expected[name], **EXACT)


@pytest.mark.parametrize("count", [1, 3])
def test_a_parameter_that_a_block_is_given_is_not_written(count):
    """The first block is called with a view of a parameter: hidden states are stored apart from it."""
    model = _Chain()
    before = model.latents.detach().clone()
    images = torch.zeros(count, 3, 1, 1, dtype=torch.float64)
    stream = BlockInputs(model, model, images, block_names(model))
    assert stream.stored
    walk(stream, linear_layers(model))
    assert torch.equal(model.latents, before)


def test_what_changes_between_blocks_is_reached_by_whole_passes(images):
    """By an edit in place the same tensor comes to the next block with other numbers."""
    model = _Chain()
    model.between = lambda x: x.add_(1)
    stream = BlockInputs(model, model, images, block_names(model))
    assert not stream.stored
    expected = inputs_by_hook(model, images)
    for name, got in walk(stream, expected).items():
        torch.testing.assert_close(got, expected[name], **EXACT)
    changing = _Chain(edits="arguments")
    assert not BlockInputs(changing, changing, images, block_names(changing)).stored


def test_a_sample_stands_for_all_tokens_as_they_weigh(tiny_vit, monkeypatch):
    """The first patch of each picture weighs nine times as much as all else of it, and later pictures nine times as
    much as earlier ones."""
    monkeypatch.setattr(block_inputs, "SAMPLE", 400)
    name, pictures = next(iter(linear_layers(tiny_vit))), torch.randn(200, 3, 16, 16).double()
    read = inputs_by_hook(tiny_vit, pictures)[name].float()
    tokens = len(read) // 200
    weights = torch.full((200, tokens), 0.1 * tokens / (tokens - 1))
    weights[:, 1] = 0.9 * tokens
    weights *= torch.where(torch.arange(200) < 100, 0.2, 1.8)[:, None]
    stream = BlockInputs(tiny_vit, tiny_vit, pictures, block_names(tiny_vit))
    for given, patch, earlier in ((weights.flatten(), 0.9, 0.1), (None, 1 / tokens, 0.5)):
        sample = stream.sample(name, given)
        nearest = torch.cdist(sample.tokens, read).argmin(1)
        torch.testing.assert_close(sample.tokens, read[nearest], rtol=0, atol=1e-5)
        assert 250 <= len(sample.tokens) <= 402
        assert abs(sample.weights.sum().item() - 400) <= 20
        share = sample.weights / sample.weights.sum()
        assert abs(share[nearest % tokens == 1].sum().item() - patch) <= 0.03
        known = nearest % tokens > 0  # class tokens are alike in all pictures
        assert abs((share * known)[nearest // tokens < 100].sum().item() / share[known].sum().item() - earlier) <= 0.03


def test_few_tokens_are_all_in_the_sample(tiny_vit, images):
    name = next(iter(linear_layers(tiny_vit)))
    read = inputs_by_hook(tiny_vit, images)[name]
    assert len(read) < SAMPLE
    weights = torch.rand(len(read))
    sample = BlockInputs(tiny_vit, tiny_vit, images, block_names(tiny_vit)).sample(name, weights)
    torch.testing.assert_close(sample.tokens, read.float(), **EXACT)
    assert torch.equal(sample.weights, weights)


def test_a_sample_is_by_the_weights_of_all_layers_that_read_the_tensor(tiny_vit, images, monkeypatch):
    model, images, seen = tiny_vit.float(), images.float(), {}
    sample = BlockInputs.sample
    monkeypatch.setattr(BlockInputs, "sample", lambda s, name, w=None: seen.update({name: w}) or sample(s, name, w))
    convert(model, QuantizationConfig(bits=4, method="channel", activation_bits=4), images, engine="layers")
    names = list(linear_layers(model))
    weights = token_weights(model, images, names)
    assert len(seen) == 4 * len(block_names(model)) + 1
    for name, used in seen.items():
        readers = names[names.index(name) :][: 3 if name.endswith(names[0].split(".")[-1]) else 1]
        torch.testing.assert_close(used, torch.stack([weights[reader] for reader in readers]).mean(0), **EXACT)
