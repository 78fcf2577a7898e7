"""What is known of the blocks of each family, computed in float64: what the blocks themselves give."""

import families
import pytest
import torch
from known_blocks import by_reference, first, inputs, known_blocks, run

from fairseq.models.vit_quantization import ViTQuantizer

ROUNDINGS = {"rtol": 1e-11, "atol": 1e-11}
"""For float64 results of order 1: room for 5e4 roundings; a number kept in float32 on the way is off by 6e-8."""


def build(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    return families.build(name)


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


def made(model, name):
    return build(model).double().get_submodule(name)


def called(block, x, **given):
    """A call of one block, as a forward pass would make it."""
    with torch.no_grad():
        return [("block", block, (x,), given, block(x, **given))]


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (4, 7), (11, 6)], ids=str)
@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_windows_of_any_grid(name, size, images):
    """Whole, or padded below, on the right or both; shifted in the second block, unless one window is all."""
    for index in (0, 1):
        block = made(name, f"{name}.encoder.layers.0.blocks.{index}")
        assert block.shift_size == (2 if index else 0)
        x = torch.randn(images, size[0] * size[1], 12, dtype=torch.float64)
        assert_known(called(block, x, input_dimensions=size))


@pytest.mark.parametrize("always", [False, True])
def test_a_window_as_large_as_the_grid(always):
    """Swin then shifts no more, in all calls to come; asked to always partition, it does."""
    blocks = [made("swin", "swin.encoder.layers.0.blocks.1") for _ in range(2)]
    for size in ((4, 5), (8, 8)):
        x = torch.randn(2, size[0] * size[1], 12, dtype=torch.float64)
        ((_, _, _, _, expected),) = called(blocks[0], x, input_dimensions=size, always_partition=always)
        got = by_reference(blocks[1], (x,), {"input_dimensions": size, "always_partition": always})
        torch.testing.assert_close(got, first(expected), **ROUNDINGS)
        assert blocks[1].shift_size == blocks[0].shift_size == (2 if always else 0)
        assert blocks[1].window_size == blocks[0].window_size == 4


SIZES = {"dinov2": (16, 28), "dinov2-registers": (12, 16), "dinov3": (16, 24), "dinov3-gated": (8, 20),
         "beit": (20, 12), "beit-shared-bias": (12, 24)}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_pictures_that_are_not_square(name):
    model = build(name).double()
    interpolate = {"interpolate_pos_encoding": True} if "dinov2" in name else {}
    assert_known(run(model, **inputs(model, name, 2, SIZES[name]), **interpolate))


@pytest.mark.parametrize("size", [(16, 16), (20, 12), (8, 32)], ids=str)
def test_position_biases_of_other_sizes(size):
    model = build("beit").double()
    block = next(iter(known_blocks(model).values()))
    tokens = size[0] // 4 * (size[1] // 4) + 1
    assert_known(called(block, torch.randn(2, tokens, 24, dtype=torch.float64), resolution=size))
    x = torch.randn(2, 12, 24, dtype=torch.float64)  # as if some tokens had been dropped
    assert_known(called(block, x, resolution=size, interpolate_pos_encoding=True))


def test_pictures_of_several_sizes_at_once():
    """SigLIP 2 fills them up with patches that nothing attends to."""
    model = build("siglip2-vision").double()
    given = inputs(model, "siglip2-vision", 3)
    given["pixel_attention_mask"] = torch.ones(3, given["pixel_values"].shape[1], dtype=torch.int32)
    assert_known(run(model, **given))
    given["pixel_attention_mask"][0, 9:] = 0
    given["pixel_attention_mask"][2, 12:] = 0
    given["spatial_shapes"][0], given["spatial_shapes"][2] = torch.tensor([3, 3]), torch.tensor([3, 4])
    assert_known(run(model, **given))


def test_texts_of_several_lengths():
    for name in ("clip", "siglip", "siglip2"):
        model = build(name).double()
        given = inputs(model, name)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][1, 5:] = 0
        assert_known(run(model, **given))


def test_a_masked_picture():
    model = build("vit-masked").double()
    masked = torch.arange(16)[None] % 3 == 0
    assert_known(run(model, **inputs(model, "vit-masked", 1), bool_masked_pos=masked))
