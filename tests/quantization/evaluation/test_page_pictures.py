"""Hidden states of patches as colours, thumbnails and the scatter plot."""

import base64
import io
from xml.etree import ElementTree

import families
import other_heads
import pytest
import torch
from PIL import Image

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.evaluation.page_pictures import (
    Point,
    as_colours,
    hidden_states,
    last_block,
    scatter,
    thumbnail,
)


def content(url):
    kind, _, data = url.partition(";base64,")
    return kind.removeprefix("data:"), base64.b64decode(data)


def pixels(url):
    return torch.frombuffer(bytearray(Image.open(io.BytesIO(content(url)[1])).tobytes()), dtype=torch.uint8)


@pytest.mark.parametrize(("name", "patches"), [("vit", 16), ("deit", 16), ("dinov2-registers", 16), ("swin", 16)])
def test_hidden_states_are_those_of_the_patches(name, patches):
    model = families.build(name)
    quantized = ViTQuantizer(bits=8, method="channel").quantize_model(model)
    block = last_block(quantized)
    seen = []
    hook = model.get_submodule(block).register_forward_hook(lambda *a: seen.append(a[2]))
    found = hidden_states(model, families.pictures(2), block)
    hook.remove()
    tokens = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert found.shape == (2, 4, 4, tokens.shape[-1])
    assert torch.equal(found.flatten(1, 2), tokens[:, -patches:])
    assert (
        block == [key for key in dict(model.named_modules()) if key.endswith((".1", ".1.blocks.1"))][-1]
        or name == "swin"
    )


def test_colours_show_what_is_the_same_and_what_is_not():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 6, 12, generator=generator) * torch.tensor([9.0, 4.0, 2.0] + [0.01] * 9)
    first, second = as_colours(states, states.clone())
    assert first == second
    kind, data = content(first)
    assert kind == "image/png"
    assert Image.open(io.BytesIO(data)).size == (6 * 21, 4 * 21)
    moved = states.clone()
    moved[0, 0] = states[3, 5]
    _, other = as_colours(states, moved)
    changed = (pixels(first) != pixels(other)).view(4, 21, 6, 21, 3).any(4).any(3).any(1)
    assert changed.nonzero().tolist() == [[0, 0]]
    far, _ = as_colours(states, states)
    assert pixels(far).max() == 255
    assert pixels(far).min() == 0


def test_colours_of_another_model_are_clipped_to_the_first_ones_range():
    states = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(1))
    _, other = as_colours(states, 100 * states)
    first, _ = as_colours(states, states)
    ends = (pixels(other) == 0) | (pixels(other) == 255)
    assert ends.float().mean() > 0.9 > ((pixels(first) == 0) | (pixels(first) == 255)).float().mean()


def test_a_map_of_one_patch_and_names_with_signs():
    first, second = as_colours(torch.randn(1, 1, 8), torch.randn(1, 1, 8))
    assert content(first)[0] == content(second)[0] == "image/png"
    assert b"vit$x^$" in content(scatter([Point("vit$x^$", 1.0, 1.0, 1.0)], "the classes"))[1]


def test_no_map_with_tokens_behind_the_patches_or_without_numbers():
    detector = other_heads.build("yolos")
    assert hidden_states(detector, other_heads.pictures("yolos"), "vit.encoder.layer.1") is None
    model = families.build("vit")
    block = last_block(ViTQuantizer(bits=8, method="channel").quantize_model(model))
    with torch.no_grad():
        model.get_submodule(block).layernorm_after.weight.fill_(torch.nan)
    assert hidden_states(model, families.pictures(2), block) is None


def test_thumbnails_are_small():
    kind, data = content(thumbnail(Image.new("RGB", (900, 450), (200, 30, 30))))
    assert kind == "image/jpeg"
    assert Image.open(io.BytesIO(data)).size == (128, 64)
    assert len(data) < 3000


def test_the_scatter_plot_names_each_point():
    points = [Point("the float one", 90.0, 1.0, 12.3), Point("four", 15.0, 0.91, 4.5), Point("three", 12.0, 0.7, None)]
    kind, data = content(scatter(points, "the classes"))
    assert kind == "image/svg+xml"
    assert ElementTree.fromstring(data).tag.endswith("svg")
    text = data.decode()
    assert all(comment in text for comment in ("the float one", "12.3 ms", "four", "three", "the classes"))
