"""SeparateAttention against torch.nn.MultiheadAttention, in every way that it is called."""

import copy
import itertools

import pytest
import torch
from torch import nn

from fairseq.quantization.architectures.separate import SeparateAttention, separated

WIDTH, HEADS, IMAGES, TOKENS, KEYS = 12, 3, 2, 5, 7


def attention(**settings):
    torch.manual_seed(0)
    made = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **settings).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def masks(kind):
    generator = torch.Generator().manual_seed(1)
    blocked = torch.rand(TOKENS, KEYS, generator=generator) < 0.3
    blocked[:, 0] = False
    padding = torch.zeros(IMAGES, KEYS, dtype=torch.bool)
    padding[1, 5:] = True
    additive = torch.randn(TOKENS, KEYS, dtype=torch.float64, generator=generator)
    return {
        "none": {},
        "boolean": {"attn_mask": blocked},
        "additive": {"attn_mask": additive},
        "each head": {"attn_mask": additive.repeat(IMAGES * HEADS, 1, 1) * torch.arange(6.0).double()[:, None, None]},
        "padding": {"key_padding_mask": padding},
        "additive padding": {"key_padding_mask": torch.zeros(IMAGES, KEYS).double().masked_fill(padding, -2.5)},
        "both": {"attn_mask": additive, "key_padding_mask": torch.zeros(2, KEYS).double().masked_fill(padding, -1e9)},
    }[kind]


KINDS = ("none", "boolean", "additive", "each head", "padding", "additive padding", "both")


@pytest.mark.parametrize(
    "settings", [{}, {"bias": False}, {"batch_first": True}, {"kdim": 8, "vdim": 10}], ids=["", "bias", "batch", "dims"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_the_same(settings, kind):
    original = attention(**settings)
    own = SeparateAttention(original)
    generator = torch.Generator().manual_seed(2)
    sizes = ((TOKENS, WIDTH), (KEYS, settings.get("kdim", WIDTH)), (KEYS, settings.get("vdim", WIDTH)))
    inputs = [torch.randn(IMAGES, *size, dtype=torch.float64, generator=generator) for size in sizes]
    if not settings.get("batch_first"):
        inputs = [x.transpose(0, 1) for x in inputs]
    for weights, average in itertools.product((True, False), repeat=2):
        given = {**masks(kind), "need_weights": weights, "average_attn_weights": average}
        with torch.no_grad():
            expected, got = original(*inputs, **given), own(*inputs, **given)
        assert torch.allclose(expected[0], got[0], atol=1e-12, rtol=0)
        assert (expected[1] is None) == (got[1] is None)
        assert expected[1] is None or torch.allclose(expected[1], got[1], atol=1e-12, rtol=0)


def test_without_a_batch():
    original, x = attention(), torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        expected, got = original(x, x, x), SeparateAttention(original)(x, x, x)
    assert [t.shape for t in expected] == [t.shape for t in got]
    assert all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(expected, got, strict=True))


def test_a_hint_alone_is_refused_as_there():
    own, x = SeparateAttention(attention()), torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match="is_causal=True is a hint"):
        own(x, x, x, is_causal=True)


def test_it_shares_the_weights_and_leaves_the_model():
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True).eval()
    before = copy.deepcopy(model.state_dict())
    result = separated(model)
    assert type(model.self_attn) is nn.MultiheadAttention
    assert type(result.self_attn) is SeparateAttention
    assert result.self_attn.q_proj.weight.untyped_storage().data_ptr() == model.self_attn.in_proj_weight.data_ptr()
    x = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        assert torch.allclose(model(x), result(x), atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_an_encoder_with_padding():
    """Its fast path would read the weights itself."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS - 1, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, TOKENS, WIDTH), torch.tensor([[False] * TOKENS, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected, got = (each(x, src_key_padding_mask=padding) for each in (model, separated(model)))
    assert torch.allclose(expected[~padding], got[~padding], atol=1e-5)


def test_one_that_blocks_share_stays_shared_and_keeps_its_hooks():
    shared = nn.MultiheadAttention(WIDTH, HEADS)
    model = nn.ModuleList([nn.ModuleDict({"attention": shared}) for _ in range(2)])
    seen = []
    shared.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    result = separated(model)
    assert result[0]["attention"] is result[1]["attention"]
    x = torch.randn(TOKENS, 1, WIDTH)
    result[0]["attention"](x, x, x)
    assert seen == [SeparateAttention]


def test_others_stay():
    kept = nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True), nn.Linear(3, 3))
    assert separated(kept) is kept
