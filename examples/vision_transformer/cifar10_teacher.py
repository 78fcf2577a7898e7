"""A small convolutional network and what it teaches the ViT of ``train_cifar10.py``: classes, and what is where.

A ViT has to learn from the pictures that neighbouring patches belong together; a convolution knows. Few epochs of a
teacher of convolutions spare the ViT many: DeiT (Touvron et al., 2021, https://arxiv.org/abs/2012.12877) takes its
classes, locality guidance (Li et al., 2022, https://arxiv.org/abs/2207.10026) its features, place by place. The teacher
sees the same crop, and the same mixture, as the ViT (Beyer et al., 2022, https://arxiv.org/abs/2106.05237).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = (128, 256)  # of its last two stages, of 8x8 and 4x4 places
TEMPERATURE = 2.0  # of the softmax of both, when classes are compared
SHARE = 0.5  # of the teacher's classes in the loss; the labels have the rest
GUIDANCE = 1.0  # the weight of the features' error in the loss


class Taught(NamedTuple):
    """What the teacher says of B pictures: logits (B, classes); features of two stages, (B, channels, side, side)."""

    logits: Tensor
    stages: tuple[Tensor, Tensor]


class Conv(nn.Module):
    """A 3x3 convolution without bias whose weight is a matrix, (out, 9 * in), as Muon takes it."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        first = torch.empty(out, channels, 3, 3)
        nn.init.dirac_(first)
        self.weight = nn.Parameter(first.flatten(1) + torch.randn(out, 9 * channels) / math.sqrt(9 * channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.view(len(self.weight), -1, 3, 3), padding=1)


class Stage(nn.Sequential):
    """Two convolutions; behind the first, half of the resolution."""

    def __init__(self, channels: int, out: int):
        first = Conv(channels, out), nn.MaxPool2d(2), nn.BatchNorm2d(out), nn.GELU()
        super().__init__(*first, Conv(out, out), nn.BatchNorm2d(out), nn.GELU())


class Teacher(nn.Module):
    """Seven convolutions for pictures of 32x32 pixels, after Jordan (2024, https://arxiv.org/abs/2404.00498).

    Args:
        pictures: normalized, (N, 3, 32, 32); the first convolution whitens patches of 2x2 pixels of them, and stays.
        classes: how many.
    """

    def __init__(self, pictures: Tensor, classes: int):
        super().__init__()
        patches = F.unfold(pictures, 2, stride=2).transpose(1, 2).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        white = (vectors / (values + 5e-4).sqrt()).T
        self.register_buffer("white", torch.cat([white, -white]).view(24, 3, 2, 2))
        self.stages = nn.ModuleList(Stage(*channels) for channels in ((24, 64), (64, CHANNELS[0]), CHANNELS))
        self.head = nn.Linear(CHANNELS[1], classes, bias=False)

    def forward(self, pixel_values: Tensor) -> Taught:
        """What it says of pictures, float32 (B, 3, 32, 32), normalized."""
        images = F.pad(pixel_values, (0, 1, 0, 1)).contiguous(memory_format=torch.channels_last)
        first, second, third = self.stages
        features = second(first(F.gelu(F.conv2d(images, self.white))))  # (B, channels, 8, 8)
        more = third(features)  # (B, channels, 4, 4)
        return Taught(self.head(more.amax((2, 3))).float() / 9, (features, more))

    def optimizers(self, lr: float) -> list[torch.optim.Optimizer]:
        """Muon for the convolutions, AdamW for the rest."""
        convolutions = [m.weight for m in self.modules() if isinstance(m, Conv)]
        rest = [p for p in self.parameters() if not any(p is weight for weight in convolutions)]
        return [
            torch.optim.Muon(convolutions, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.95)),
        ]


class Guide(nn.Module):
    """The loss by which a ViT of ``hidden`` channels, with 8 rows of 8 patches, learns from a teacher and from labels.

    Its tokens have to tell the teacher's last two stages after half of its ``layers``, and before the last one.
    """

    def __init__(self, hidden: int, layers: int):
        super().__init__()
        self.layers = (layers // 2, layers - 1)
        self.heads = nn.ModuleList(nn.Linear(hidden, channels) for channels in CHANNELS)

    def forward(
        self, loss: Tensor, taught: Taught, logits: Tensor, hidden_states: tuple[Tensor, ...], kept: Tensor | None
    ) -> Tensor:
        """The loss with the divergence of the classes and the error of the features; a number.

        Args:
            loss: the one of the labels.
            taught: the teacher's.
            logits: the ViT's, (B, classes).
            hidden_states: before the first of its layers and behind each, (B, 1 + n, hidden), the class token first.
            kept: the numbers of the n patches that each picture has, (B, n); None for all 64, in order.
        """
        wanted = (taught.logits / TEMPERATURE).log_softmax(-1)
        given = (logits / TEMPERATURE).log_softmax(-1)
        classes = TEMPERATURE**2 * F.kl_div(given, wanted, log_target=True, reduction="batchmean")
        features = 0.0
        for head, layer, stage in zip(self.heads, self.layers, taught.stages, strict=True):
            even = F.batch_norm(stage.float(), None, None, training=True)  # each channel with variance 1
            places = F.interpolate(even, (8, 8)).flatten(2).transpose(1, 2)  # (B, 64, channels)
            if kept is not None:
                places = places.gather(1, kept.unsqueeze(-1).expand(-1, -1, places.shape[-1]))
            features = features + F.mse_loss(head(hidden_states[layer][:, 1:]).float(), places)
        return (1 - SHARE) * loss + SHARE * classes + GUIDANCE * features
