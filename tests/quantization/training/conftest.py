"""A student, its teacher, and pictures for them."""

import pytest
import torch

from fairseq.models.vit_quantization import ViTQuantizer


@pytest.fixture
def data():
    """40 pictures, (40, 3, 16, 16)."""
    return torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def student(tiny_vit):
    """At 2 bits, far from its teacher ``tiny_vit``."""
    return ViTQuantizer(bits=2, method="channel", execution="emulated").quantize_model(tiny_vit)
