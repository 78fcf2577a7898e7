"""compare_models: exact numbers, kinds of output, devices, and flags that stay as they were."""

import copy
import math

import pytest
import torch
from transformers import BatchFeature, ViTForMaskedImageModeling, ViTModel
from transformers.modeling_outputs import ImageClassifierOutput

from fairseq.quantization.evaluation.compare import compare_embeddings, compare_models, zero_shot_agreement


class Fixed(torch.nn.Module):
    """Returns the same logits whatever comes."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.logits)


ONE = Fixed([[0.0, 1.0, 2.0], [5.0, 0.0, 0.0], [0.0, 3.0, 1.0]])
TWO = Fixed([[0.0, 2.5, 2.0], [5.0, 0.0, 0.0], [3.0, 1.0, 2.0]])
PICTURE = torch.zeros(3, 3, 2, 2)


def test_known_numbers():
    mse, mae, match = compare_models(ONE, TWO, PICTURE)
    assert mse == pytest.approx((1.5**2 + 9 + 4 + 1) / 9)
    assert mae == pytest.approx((1.5 + 3 + 2 + 1) / 9)
    assert match == pytest.approx(1 / 3)
    assert compare_models(ONE, TWO, PICTURE, top_k=2).top_k_match == pytest.approx(2 / 3)
    assert compare_models(ONE, TWO, PICTURE, top_k=3).top_k_match == 1
    # Which model's first class is looked for in which model's first k: not symmetric.
    assert compare_models(TWO, ONE, PICTURE, top_k=2).top_k_match == pytest.approx(2 / 3)
    third = Fixed([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0]])
    assert compare_models(ONE, third, PICTURE, top_k=2).top_k_match == pytest.approx(1 / 3)


def test_nan_matches_nothing():
    nan = Fixed([[0.0, math.nan, 2.0], [5.0, 0.0, 0.0], [0.0, 3.0, 1.0]])
    for pair in ((ONE, nan), (nan, ONE), (nan, nan)):
        result = compare_models(*pair, PICTURE)
        assert result.top_k_match == pytest.approx(2 / 3)
        assert math.isnan(result.mse_loss)


def test_identical_models(tiny_vit, pixels):
    assert compare_models(tiny_vit, copy.deepcopy(tiny_vit), pixels) == (0, 0, 1)


def test_inputs_of_every_kind(tiny_vit, pixels, device):
    other = copy.deepcopy(tiny_vit).to(device)
    torch.nn.init.normal_(other.classifier.weight)
    expected = compare_models(tiny_vit, other, pixels)
    for inputs in (
        {"pixel_values": pixels},
        BatchFeature({"pixel_values": pixels}),
        pixels.to(device),
        pixels.double(),
    ):
        assert compare_models(tiny_vit, other, inputs) == pytest.approx(expected)
    assert math.isfinite(compare_models(tiny_vit, other, pixels[:1]).mse_loss)


def test_half_precision_models(tiny_vit, pixels):
    mse, _, _ = compare_models(tiny_vit, copy.deepcopy(tiny_vit).bfloat16(), pixels)
    assert 0 < mse < 0.01


def test_training_flags_are_restored_one_by_one_also_after_an_error(tiny_vit, pixels):
    tiny_vit.train()
    tiny_vit.classifier.eval()
    flags = [m.training for m in tiny_vit.modules()]
    first = compare_models(tiny_vit, copy.deepcopy(tiny_vit), pixels)
    assert first.mse_loss == 0  # dropout was off
    assert [m.training for m in tiny_vit.modules()] == flags
    with pytest.raises(Exception, match=r"size|channel|match"):
        compare_models(tiny_vit, tiny_vit, torch.zeros(1, 3, 5, 5))
    assert [m.training for m in tiny_vit.modules()] == flags


def test_models_without_logits(tiny_vit, pixels):
    bare, masked = ViTModel(tiny_vit.config).eval(), ViTForMaskedImageModeling(tiny_vit.config).eval()
    for model in (bare, masked):
        noisy = copy.deepcopy(model)
        with torch.no_grad():
            next(p for p in noisy.parameters() if p.ndim == 2).add_(0.1)
        mse, mae, match = compare_models(model, noisy, pixels)
        assert mse > 0
        assert mae > 0
        assert match is None


def test_errors(tiny_vit, pixels):
    cases = [
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 8}, ValueError, "number of classes, 7; got 8"),
        ({"top_k": 1.0}, TypeError, "top_k must be an int"),
        ({"inputs": [pixels]}, TypeError, "processor's dict, got list"),
        ({"quantized": ViTModel(tiny_vit.config)}, ValueError, "do not match: the original returns logits"),
        ({"quantized": torch.nn.Identity()}, TypeError, "pixel_values"),
    ]
    for changes, error, message in cases:
        arguments = {"original": tiny_vit, "quantized": tiny_vit, "inputs": pixels, **changes}
        with pytest.raises(error, match=message):
            compare_models(**arguments)
    with pytest.raises(ValueError, match="returned Tensor, which has none of logits"):
        compare_models(Returns(), Returns(), pixels)


class Returns(torch.nn.Module):
    def forward(self, pixel_values):
        return pixel_values


class Embedder(torch.nn.Module):
    """Returns the same embeddings, a row for each picture."""

    def __init__(self, *rows):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.tensor(rows))

    def forward(self, pixel_values):
        return {"pooler_output": self.rows[pixel_values[:, 0, 0, 0].long()]}


def test_known_embeddings():
    numbers = torch.arange(4.0).view(4, 1, 1, 1)
    one = Embedder([1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0])
    two = Embedder([3.0, 0.0], [-0.04, 0.2], [0.0, 1.0], [0.1, 1.0])  # the second has gone to the others' side
    got = compare_embeddings(one, two, numbers, k=1, batch_size=3)
    second = (-0.04 + 0.1 * 0.2) / math.sqrt(1.01 * 0.0416)
    assert got.cosine == pytest.approx((3 + second) / 4)
    assert got.cosine_min == pytest.approx(second)
    assert got.overlap == pytest.approx(1 / 2)  # nearest: 1 0 3 2, then 3 2 3 2
    assert (got.k, got.output) == (1, "pooler_output")
    assert compare_embeddings(one, two, numbers, k=3).overlap == 1
    assert compare_embeddings(one, one, {"pixel_values": numbers, "input_ids": numbers}, k=2)[:3] == pytest.approx(
        (1, 1, 1)
    )


def test_embeddings_of_tokens_are_their_mean(tiny_vit, pixels):
    model = ViTModel(tiny_vit.config, add_pooling_layer=False).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(p for p in other.parameters() if p.ndim == 2).add_(0.1)
        means = [m(pixel_values=pixels).last_hidden_state.mean(1) for m in (model, other)]
    expected = torch.nn.functional.cosine_similarity(*means)
    got = compare_embeddings(model, other, pixels, k=2, batch_size=2)
    assert got.cosine == pytest.approx(expected.mean().item())
    assert got.cosine_min == pytest.approx(expected.min().item())
    assert got.output == "last_hidden_state"


def test_errors_of_embeddings(tiny_vit, pixels):
    with pytest.raises(ValueError, match="k=5 neighbours need at least 6 pictures, got 5"):
        compare_embeddings(tiny_vit, tiny_vit, pixels)
    with pytest.raises(TypeError, match="k must be an int"):
        compare_embeddings(tiny_vit, tiny_vit, pixels, k=True)
    with pytest.raises(ValueError, match="no embedding: it returns none of image_embeds"):
        compare_embeddings(*[ViTForMaskedImageModeling(tiny_vit.config)] * 2, pixels, k=1)
    with pytest.raises(ValueError, match="the original returns logits"):
        compare_embeddings(tiny_vit, ViTModel(tiny_vit.config), pixels, k=1)
    with pytest.raises((TypeError, ValueError), match=r"input_ids|no logits_per_image"):
        zero_shot_agreement(tiny_vit, tiny_vit, pixels, torch.ones(2, 3, dtype=torch.long))
