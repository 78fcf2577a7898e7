"""What is known of the blocks of each family, computed in float64: what the blocks themselves give."""

import families
import pytest
import torch
from known_blocks import by_reference, first, inputs, known_blocks, run

from fairseq.models.vit_quantization import ViTQuantizer

ROUNDINGS = {"rtol": 1e-11, "atol": 1e-11}
"""For float64 results of order 1: room for 5e4 roundings; a number kept in float32 on the way is off by 6e-8."""
UNKNOWN = {"encoder-decoder": 2}
"""Blocks of the known families that pictures go through, but for these: all; two each, and four of Swin and MAE."""


def build(name, **keywords):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    return families.build(name, **keywords)


def assert_known(calls):
    for name, block, args, kwargs, output in calls:
        got = by_reference(block, args, kwargs)
        assert isinstance(got, torch.Tensor), f"{name}: {got}"
        torch.testing.assert_close(got, first(output), **ROUNDINGS, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", families.NAMES)
def test_every_block_is_what_is_known_of_it(name, images):
    model = build(name).double()
    calls = run(model, **inputs(model, name, images))
    assert {name for name, *_ in calls} == set(known_blocks(model))
    assert_known(calls)


@pytest.mark.parametrize("name", families.NAMES)
def test_the_same_with_packed_layers(name):
    """Rounded alike layer by layer: in float64, nothing lies so near to an edge that it rounds to the other side."""
    model = ViTQuantizer(bits=8, method="channel").quantize_model(build(name).double(), engine="layers")
    assert_known(run(model, **inputs(model, name)))
