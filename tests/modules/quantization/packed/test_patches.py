"""PackedPatchEmbedding is the convolution of its rounded weight; what overlaps is refused; it loads on any device."""

import pytest
import torch
from bounds import bound, exact, half_steps, is_within
from torch import nn
from torch.nn import functional as F

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.patches import PackedPatchEmbedding, reason_not_packable, unfold

WEIGHT_ONLY = LinearConfig(bits=4, method="channel", activations=None)


def packed(conv, config=WEIGHT_ONLY):
    linear = nn.Linear(conv.weight[0].numel(), conv.out_channels, conv.bias is not None)
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1))
    linear.bias = conv.bias
    return PackedPatchEmbedding.from_conv(conv, PackedLinear.from_float(linear, config), "patches")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(8, 6), (9, 7)], ids=["whole", "with a rest"])
def test_it_is_the_convolution_of_its_weight(bias, size):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 10, (4, 3), (4, 3), bias=bias)
    layer, x = packed(conv), torch.randn(2, 3, *size)
    expected = F.conv2d(x, layer.weight, layer.bias, stride=(4, 3))
    tokens = unfold(x, (4, 3)).flatten(0, 2)

    def as_pictures(allowed):  # (N * rows * columns, out) -> (N, out, rows, columns)
        return allowed.unflatten(0, (2, *expected.shape[2:])).permute(0, 3, 1, 2)

    assert is_within(layer(x), expected, 2 * as_pictures(bound(layer.linear, tokens, exact(layer.linear, tokens))))
    assert not torch.equal(layer.weight, conv.weight)
    assert is_within(layer.weight, conv.weight, layer.linear.scale[:, None, None, None] / 2 * 1.001)
    dynamic = packed(conv, LinearConfig(bits=8, method="channel"))
    assert is_within(dynamic(x), conv(x), as_pictures(half_steps(dynamic.linear, tokens)))


def test_dtype_and_state_dict():
    conv = nn.Conv2d(3, 10, 4, 4, bias=False)
    layer = packed(conv)
    assert layer.weight.dtype == torch.float32
    half = packed(conv).half()
    assert half.weight.dtype == half(torch.randn(1, 3, 8, 8).half()).dtype == torch.float16
    assert half.linear.scale.dtype == torch.float32
    for device in ("cpu", "meta"):
        blank = PackedPatchEmbedding(3, 10, (4, 4), WEIGHT_ONLY, "patches", bias=False, device=device)
        blank.load_state_dict(layer.state_dict(), assign=device == "meta")
        x = torch.randn(1, 3, 8, 8)
        assert torch.equal(blank.linear(x[..., :4, :4].flatten(1)), layer.linear(x[..., :4, :4].flatten(1)))


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(3, 4, 4, 2), "stride .* patches overlap"),
        (nn.Conv2d(3, 4, 4, 4, padding=1), "pads pictures"),
        (nn.Conv2d(4, 4, 4, 4, groups=2), "2 groups"),
        (nn.Conv2d(3, 4, 2, 2, dilation=2), "dilation"),
    ],
)
def test_other_convolutions_are_refused(conv, message):
    with pytest.raises(ValueError, match=message):
        packed(conv)
    assert reason_not_packable(conv)


def test_errors():
    with pytest.raises(ValueError, match=r"patches takes a tensor of shape \(N, 3, H, W\), got \(3, 8, 8\)"):
        packed(nn.Conv2d(3, 4, 4, 4))(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="patches takes activations 'dynamic' or None"):
        PackedPatchEmbedding(3, 4, (4, 4), LinearConfig(activations="static"), "patches")
    with pytest.raises(ValueError, match=r"shape \(4, 48\), \(out, in\), got \(4, 5\)"):
        PackedPatchEmbedding.from_conv(
            nn.Conv2d(3, 4, 4, 4), PackedLinear.from_float(nn.Linear(5, 4), WEIGHT_ONLY), "p"
        )
