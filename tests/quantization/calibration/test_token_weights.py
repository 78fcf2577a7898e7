"""Token weights: squared gradients of the output, and the model is left as it was."""

import copy

import pytest
import torch
from bounds import sum_error
from torch import nn

from fairseq.quantization.architectures.layers import linear_layers
from fairseq.quantization.calibration.token_weights import BATCH_SIZE, UNIFORM_SHARE, token_weights


@pytest.fixture
def images():
    return torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(4)).double()


@pytest.fixture
def tiny_vit(tiny_vit):
    """In float64, where only a fault makes a difference."""
    return tiny_vit.double()


def test_token_weights_are_squared_gradients(tiny_vit, images):
    name = next(n for n in linear_layers(tiny_vit) if n.endswith(("fc1", "intermediate.dense")))
    got = token_weights(tiny_vit, images[:4], [name], seed=5)[name]
    seen = []
    hook = tiny_vit.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y))
    logits = tiny_vit(images[:4]).logits
    hook.remove()
    generator = torch.Generator().manual_seed(5)
    v = torch.cat([torch.randn(part.shape, generator=generator) for part in logits.split(BATCH_SIZE)])
    v -= v.mean(-1, keepdim=True)
    (gradient,) = torch.autograd.grad((logits * v).sum(), seen)
    square = gradient.square().sum(-1).flatten()
    error = sum_error(gradient.shape[-1] + len(square), 1.0)  # of the squares' sum and of their mean, in float32
    expected = (1 - UNIFORM_SHARE) * square / square.mean() + UNIFORM_SHARE
    torch.testing.assert_close(got.double(), expected, atol=0, rtol=error)


def test_layers_get_more_projections_which_change_no_weight(tiny_vit, images):
    first, last = (n for n in linear_layers(tiny_vit) if n.endswith(("fc1", "intermediate.dense")))
    told = []
    got = token_weights(tiny_vit, images[:4], [first, last], 5, gradients=told.append, again=[last])
    assert [set(found) for found in told] == [*[{first, last}, {last}, {last}, {last}] * 2, set()]
    expected = token_weights(tiny_vit, images[:4], [first, last], 5)
    for name in (first, last):
        assert torch.equal(got[name], expected[name])
    drawn = [found[last] for found in told if found]
    assert not any(torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])


class _Heads(nn.Module):
    """A ViT with another head: ``head`` makes the output of the hidden states, (N, 17, 24)."""

    def __init__(self, model, head):
        super().__init__()
        self.vit, self.config, self.head = model.vit, model.config, head

    def forward(self, pixel_values):
        return self.head(self.vit(pixel_values).last_hidden_state)


def maps(hidden):
    """(N, 24, 4, 4)."""
    return hidden[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


@pytest.mark.parametrize(
    ("head", "centred"),
    [
        (lambda hidden: {"logits": maps(hidden)}, 1),  # a class for each pixel
        (lambda hidden: {"logits": hidden[:, 0, :1]}, None),  # one number: less its mean, nothing is left
        (lambda hidden: {"loss": torch.zeros(()), "predicted_depth": maps(hidden).mean(1)}, None),
        (lambda hidden: [maps(hidden)[:, :3], maps(hidden)], None),  # feature maps: the last
        (lambda hidden: (maps(hidden)[:, 0], maps(hidden)), None),
    ],
)
def test_token_weights_of_other_outputs(tiny_vit, images, head, centred):
    model = _Heads(tiny_vit, head)
    name = next(n for n in linear_layers(model) if n.endswith(("fc1", "intermediate.dense")))
    got = token_weights(model, images[:2], [name], seed=5)[name]
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y))
    output = model(images[:2])
    hook.remove()
    value = list(output.values())[-1] if isinstance(output, dict) else output[isinstance(output, list)]
    v = torch.randn(value.shape, generator=torch.Generator().manual_seed(5))
    if centred is not None:
        v -= v.mean(centred, keepdim=True)
    (gradient,) = torch.autograd.grad((value * v).sum(), seen)
    square = gradient.square().sum(-1).flatten()
    error = sum_error(gradient.shape[-1] + len(square), 1.0)  # of the squares' sum and of their mean, in float32
    expected = (1 - UNIFORM_SHARE) * square / square.mean() + UNIFORM_SHARE
    torch.testing.assert_close(got.double(), expected, atol=0, rtol=error)


def test_an_output_that_no_layer_reaches_weights_all_tokens_alike(tiny_vit, images):
    model = _Heads(tiny_vit, lambda hidden: {"anchors": torch.ones(2, 4)})
    names = list(linear_layers(model))
    assert all(not len(weights) for weights in token_weights(model, images[:2], names).values())


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
