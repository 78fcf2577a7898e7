"""PackedPatchEmbedding: a convolution over patches that do not overlap, as a packed Linear on each of them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.packed.linear import PackedLinear


class PackedPatchEmbedding(nn.Module):
    """An ``nn.Conv2d`` whose stride is its kernel size: (N, C, H, W) -> (N, out, H // height, W // width).

    Each patch is one token of :attr:`linear`, and rounded by its own scale. What does not fill a patch, at the right
    and at the bottom, is left out, as the convolution does. The constructor makes a layer to load a state dict into;
    its integers are 0 until then.

    Args:
        in_channels, out_channels, kernel_size: of the convolution; the size is (height, width) of a patch.
        config: of the Linear; activations are not static.
        name: how errors call the layer.
        bias: whether there is one.
        device, dtype: of the buffers that have no dtype of their own, such as the bias.

    Attributes:
        linear: a PackedLinear from in_channels * height * width to out_channels.

    Raises:
        ValueError: static activations.
    """

    linear: PackedLinear
    like: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        config: LinearConfig,
        name: str = "patch_embedding",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if config.activations == "static":
            raise ValueError(f"{name} takes activations 'dynamic' or None, got 'static'")
        self.in_channels, self.out_channels, self.name = in_channels, out_channels, name
        self.kernel_size = self.stride = cast(tuple[int, int], tuple(kernel_size))
        self.padding, self.dilation, self.groups = (0, 0), (1, 1), 1
        features = in_channels * self.kernel_size[0] * self.kernel_size[1]
        self.linear = PackedLinear.empty(
            features, out_channels, config, f"{name}.linear", bias, device=device, dtype=dtype
        )
        with plain_context(self.linear.scale.device):
            self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @classmethod
    @plain_context()
    def from_conv(cls, conv: nn.Conv2d, linear: PackedLinear, name: str) -> PackedPatchEmbedding:
        """The twin of a convolution, ``linear`` being made of its weight, (out, C * height * width).

        Raises:
            ValueError: it does more than embed patches, see :func:`reason_not_packable`, or ``linear`` does not fit.
        """
        if reason := reason_not_packable(conv):
            raise ValueError(f"{name} cannot be packed: {reason}")
        size = cast(tuple[int, int], tuple(conv.kernel_size))
        new = cls(conv.in_channels, conv.out_channels, size, linear.config, name)
        wanted = (new.linear.out_features, new.linear.in_features)
        if (linear.out_features, linear.in_features) != wanted:
            got = (linear.out_features, linear.in_features)
            raise ValueError(f"{name} needs a linear layer of shape {wanted}, (out, in), got {got}")
        new.linear, new.like = linear, conv.weight.detach().new_empty(0)
        return new.train(conv.training)

    @property
    def weight(self) -> Tensor:
        """The rounded weight as the convolution had it, (out, C, height, width); computed at each access."""
        return self.linear.dequantize().to(self.like.dtype).view(-1, self.in_channels, *self.kernel_size)

    @property
    def bias(self) -> Tensor | None:
        """(out,) or None."""
        return self.linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W), floating -> (N, out, H // height, W // width), the same dtype."""
        if input.ndim != 4 or input.shape[1] != self.in_channels:
            raise ValueError(
                f"{self.name} takes a tensor of shape (N, {self.in_channels}, H, W), got {tuple(input.shape)}"
            )
        y = self.linear(unfold(input, self.kernel_size))  # (N, rows, columns, out)
        return cast(Tensor, y.permute(0, 3, 1, 2))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"


def reason_not_packable(conv: nn.Conv2d) -> str | None:
    """Why a convolution is more than a Linear on patches that do not overlap, or None."""
    if tuple(conv.stride) != tuple(conv.kernel_size):
        return f"its stride {tuple(conv.stride)} is not its kernel size {tuple(conv.kernel_size)}: patches overlap"
    if conv.padding not in ((0, 0), "valid"):
        return f"it pads pictures, by {conv.padding}"
    if tuple(conv.dilation) != (1, 1) or conv.groups != 1:
        return f"it has dilation {tuple(conv.dilation)} and {conv.groups} groups"
    return None


def unfold(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) -> (N, rows, columns, C * height * width), patches in the order of a convolution's weight."""
    n, channels, height, width = pictures.shape
    rows, columns = height // size[0], width // size[1]
    cut = pictures[..., : rows * size[0], : columns * size[1]]
    cut = cut.reshape(n, channels, rows, size[0], columns, size[1])
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, rows, columns, -1)
