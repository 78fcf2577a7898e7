"""compare_models: exact numbers, kinds of output, devices, and flags that stay as they were."""

import copy
import math

import pytest
import torch
import transformers
from transformers import BatchFeature, ViTForMaskedImageModeling, ViTModel

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.evaluation.compare import compare_embeddings, compare_models, embeddings, zero_shot_agreement


class Fixed(torch.nn.Module):
    """Returns the same output, logits unless it is called otherwise, whatever comes."""

    def __init__(self, output, name="logits"):
        super().__init__()
        self.output, self.name = torch.nn.Parameter(torch.as_tensor(output)), name

    def forward(self, pixel_values):
        return {self.name: self.output}


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


def test_in_a_map_each_pixel_has_a_class():
    """(N, classes, H, W) with W = 3: by the last dimension all three classes were kept."""
    first = torch.zeros(1, 3, 2, 3)
    first[0, 1] = 1.0  # class 1 everywhere
    second = first.clone()
    second[0, 2, 0] = 2.0  # class 2 in the first row
    models = Fixed(first), Fixed(second)
    assert compare_models(*models, PICTURE).top_k_match == pytest.approx(1 / 2)
    assert compare_models(*models, PICTURE, top_k=2).top_k_match == 1
    second[0, 0, 1, 0] = math.nan  # of one pixel more
    assert compare_models(models[0], Fixed(second), PICTURE).top_k_match == pytest.approx(2 / 6)
    with pytest.raises(ValueError, match="number of classes, 3; got 4"):
        compare_models(*models, PICTURE, top_k=4)


def test_in_a_detector_each_query_has_a_class():
    first, second = torch.eye(4).expand(2, 4, 4).clone(), torch.eye(4).expand(2, 4, 4).clone()
    second[1, 3] = torch.tensor([1.0, 0.0, 0.0, 0.5])
    assert compare_models(Fixed(first), Fixed(second), PICTURE).top_k_match == pytest.approx(7 / 8)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("predicted_depth", (3, 2, 2)),
        ("logits", (3, 1)),  # a regression
        ("logits", (3, 1, 2, 2)),  # one map, of foreground
        ("logits", (3, 2, 2)),  # likewise, as large as the pictures
        ("feature_maps", (3, 5, 4, 4)),
    ],
)
def test_without_classes_there_is_no_match(name, shape):
    first = torch.randn(shape)
    got = compare_models(Fixed(first, name), Fixed(first + 0.5, name), PICTURE)
    assert got == (pytest.approx(0.25, rel=1e-5), pytest.approx(0.5, rel=1e-5), None)


PLAIN = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "patch_size": 4}
SIZE = {**PLAIN, "intermediate_size": 40, "image_size": [16, 16]}


def detector():
    return transformers.YolosForObjectDetection(
        transformers.YolosConfig(**SIZE, num_detection_tokens=3, num_labels=4)
    )  # (N, 3, 5) and boxes


def backbone():
    config = transformers.Dinov2Config(**PLAIN, image_size=16, out_features=["stage1", "stage2"], mlp_ratio=2)
    return transformers.Dinov2Backbone(config)


def depth_estimator():
    config = transformers.Dinov2Config(
        **{**PLAIN, "num_hidden_layers": 4}, image_size=16, mlp_ratio=2, reshape_hidden_states=False,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    sizes = {"reassemble_hidden_size": 24, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "head_hidden_size": 4}
    return transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(backbone_config=config, patch_size=4, **sizes)
    )


@pytest.mark.parametrize("make", [detector, backbone, depth_estimator])
@pytest.mark.filterwarnings("ignore:calibrating on")
def test_pictures_help_models_of_every_output(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in (2, 4):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    pictures = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    quantizer = ViTQuantizer(bits=3, method="channel")
    plain, calibrated = (quantizer.quantize_model(model, calibration=x) for x in (None, pictures))
    errors = [compare_models(model, quantized, pictures).mse_loss for quantized in (plain, calibrated)]
    assert 0 < errors[1] < 0.7 * errors[0]


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
        ({"quantized": torch.nn.Identity()}, ValueError, r"the quantized one output \(5, 3, 16, 16\)"),
        ({"quantized": Fixed([[1.0, 2.0]], "loss_of_all")}, ValueError, r"the quantized one loss_of_all \(1, 2\)"),
    ]
    for changes, error, message in cases:
        arguments = {"original": tiny_vit, "quantized": tiny_vit, "inputs": pixels, **changes}
        with pytest.raises(error, match=message):
            compare_models(**arguments)
    with pytest.raises(ValueError, match=r"Fixed returned no floating tensor .*; it returned loss: Parameter"):
        compare_models(*[Fixed(1.0, "loss")] * 2, pixels)


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


def test_embeddings_of_maps_are_the_mean_over_their_pixels():
    """(N, channels, H, W), as ConvNets and hierarchical models return it: one number per channel."""
    maps = torch.randn(3, 5, 2, 4)
    kind, vectors = embeddings(Fixed(maps, "last_hidden_state"), {"pixel_values": PICTURE})
    assert kind == "last_hidden_state"
    torch.testing.assert_close(vectors, maps.mean((2, 3)))


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
