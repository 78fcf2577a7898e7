"""A model on disk, as the scripts load it."""

import pytest
from families import shortened
from transformers import ViTImageProcessor


@pytest.fixture
def tiny_vit(tiny_vit):
    """Of one block and 7 Linear layers: the second is like the first."""
    return shortened(tiny_vit)


@pytest.fixture
def model(tiny_vit, tmp_path):
    """A folder with a tiny classifier and its image processor."""
    folder = tmp_path / "vit"
    tiny_vit.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
