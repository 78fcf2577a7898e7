"""OutputMoments: sums of the gradients' products, the same whoever adds them up, and of the model that is rounded."""

import copy

import pytest
import torch
from bounds import sum_error
from conftest import make_tiny_vit
from torch import nn

from fairseq.models.vit_quantization import Reconstruction, ViTQuantizer
from fairseq.quantization.calibration import calibration, output_moments
from fairseq.quantization.calibration.output_moments import OutputMoments
from fairseq.quantization.calibration.token_weights import BATCH_SIZE, token_weights
from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.conversion import quantize_layer
from fairseq.quantization.conversion.convert import convert


def gradients(seed=0, batches=5, outputs=(6, 11)):
    generator = torch.Generator().manual_seed(seed)
    return [
        {f"layer{n}": torch.randn(2, 3, n, generator=generator) * torch.rand(n, generator=generator) for n in outputs}
        for _ in range(batches)
    ]


def added(batches, *arguments):
    moments = OutputMoments(*arguments)
    for batch in batches:
        moments.add(batch)
    moments.finish()
    return moments


def expected(batches, name):
    """E[g g^T] with a mean of 1 on its diagonal, and the samples, float64."""
    rows = torch.cat([batch[name].flatten(0, -2) for batch in batches]).double()
    g, squares = rows.T @ rows, rows.square().sum(1)
    return g / g.diagonal().mean(), float(squares.sum() ** 2 / squares.square().sum())


def test_they_are_the_mean_products_of_gradients():
    batches = gradients()
    moments = added(batches, ["layer6", "layer11"])
    for name in ("layer6", "layer11"):
        g, samples = expected(batches, name)
        found = moments.of(name)
        (block,) = found.blocks
        assert block.dtype == torch.float32
        torch.testing.assert_close(block.double(), g, rtol=0, atol=sum_error(40, float(g.diagonal().max())))
        assert found.samples == pytest.approx(samples, rel=1e-6)


def test_wide_layers_have_blocks_along_the_diagonal(monkeypatch):
    monkeypatch.setattr(output_moments, "LARGEST", 4)
    batches = gradients()
    blocks = added(batches, ["layer11"]).of("layer11").blocks
    assert [len(block) for block in blocks] == [4, 4, 3]
    g, _ = expected(batches, "layer11")
    at = 0
    for block in blocks:
        here = slice(at, at + len(block))
        torch.testing.assert_close(block.double(), g[here, here], rtol=0, atol=sum_error(40, float(g.diagonal().max())))
        at += len(block)


def test_only_layers_that_are_wanted_and_finite_have_some():
    batches = gradients()
    batches[-1]["layer11"][0, 0, 0] = torch.nan
    moments = added(batches, ["layer11", "nowhere"])
    assert moments.of("layer6") is None  # not wanted
    assert moments.of("layer11") is None
    assert moments.of("nowhere") is None
    zero = added([{"a": torch.zeros(2, 3)}], ["a"])
    assert zero.of("a") is None
    assert added([], ["a"]).of("a") is None


def test_the_order_does_not_matter():
    """Nor, so, how many processes have which."""
    batches = gradients(batches=8)
    first, second = (added([batches[0], *order], ["layer6"]).of("layer6") for order in (batches[1:], batches[:0:-1]))
    assert torch.equal(first.blocks[0], second.blocks[0])
    assert first.samples == second.samples


def test_what_was_kept_is_what_was_found():
    moments = added(gradients(), ["layer6", "layer11"])
    again = OutputMoments(())
    again.load(moments.tensors())
    for name in ("layer6", "layer11"):
        assert again.of(name).samples == moments.of(name).samples
        assert torch.equal(again.of(name).blocks[0], moments.of(name).blocks[0])


def test_gradients_are_those_of_the_token_weights():
    model = make_tiny_vit().eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    name = next(
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(("fc1", "intermediate.dense"))
    )
    moments = OutputMoments([name])
    token_weights(model, images, [name], 5, gradients=moments.add)
    moments.finish()
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y))
    logits = model(images).logits
    hook.remove()
    generator = torch.Generator().manual_seed(5)
    v = torch.cat([torch.randn(part.shape, generator=generator) for part in logits.split(BATCH_SIZE)])
    (g,) = torch.autograd.grad((logits * (v - v.mean(-1, keepdim=True))).sum(), seen)
    whole, samples = expected([{name: g.detach()}], name)
    torch.testing.assert_close(moments.of(name).blocks[0].double(), whole, rtol=1e-4, atol=1e-4)
    assert moments.of(name).samples == pytest.approx(samples, rel=1e-4)


def rounded(model, images, **settings):
    """By layer of the vision tower: what it was in float when it was rounded, and the statistics."""
    seen = {}

    def watch(layer, linear, statistics, factor):
        seen[layer.name] = copy.deepcopy(linear), statistics

    convert(model, QuantizationConfig(**settings), images, watch=watch)
    return seen


@pytest.mark.filterwarnings("ignore:calibrating on")
def test_they_follow_what_equalization_does_to_the_outputs():
    """Of the value layers, whose bias shows the factor; all other outputs are as they were."""
    model = make_tiny_vit()
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    plain = rounded(model, images, bits=3, method="tensor", equalize=False)
    equalized = rounded(model, images, bits=3, method="tensor")
    changed = 0
    for name, (linear, found) in equalized.items():
        before, was = plain[name]
        if was.outputs is None:
            assert "classifier" in name
            continue
        factor = linear.bias / before.bias
        changed += not torch.allclose(factor, torch.ones(()))
        torch.testing.assert_close(
            found.outputs.blocks[0], was.outputs.rescaled(factor).blocks[0], rtol=1e-4, atol=1e-6
        )
    assert changed


@pytest.mark.filterwarnings("ignore:calibrating on")
@pytest.mark.parametrize(
    ("settings", "most", "some"),
    [
        ({"bits": 7}, 2**19, True),
        ({"bits": 8}, 2**19, False),
        ({"bits": 3, "rounding": "gptq"}, 2**19, False),
        ({"bits": 3}, 1, False),
        ({"bits": 3, "rounding": "coordinate"}, 1, True),
    ],
    ids=str,
)
def test_they_are_taken_where_rounding_looks_at_them(settings, most, some, monkeypatch):
    monkeypatch.setattr(calibration, "TWO_SIDED_WEIGHTS", most)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    found = []
    quantize = quantize_layer.round_weight
    monkeypatch.setattr(
        quantize_layer,
        "round_weight",
        lambda w, known, *more: (found.append(known.outputs), quantize(w, known, *more))[1],
    )
    model = make_tiny_vit()
    ViTQuantizer(method="channel", **settings).quantize_model(model, images)
    assert sum(outputs is not None for outputs in found) == (len(found) - 1 if some else 0)  # not of the classifier


@pytest.mark.filterwarnings("ignore:calibrating on")
def test_a_layer_that_may_become_narrower_has_some_at_eight_bits():
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    found = rounded(make_tiny_vit(), images, bits=8, method="channel")
    assert all(known.outputs is not None for name, (_, known) in found.items() if "classifier" not in name)


@pytest.mark.filterwarnings("ignore:calibrating on")
@pytest.mark.parametrize(("bits", "most"), [(3, 1), (5, 2**19)])  # gptq, at 5 bits, looks at no outputs
def test_blocks_that_are_going_to_learn_keep_to_what_auto_can_afford(monkeypatch, bits, most):
    monkeypatch.setattr(calibration, "TWO_SIDED_WEIGHTS", most)
    taken = []
    start = OutputMoments.finish
    monkeypatch.setattr(OutputMoments, "finish", lambda self: (taken.append(self.names), start(self)))
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    quantizer = ViTQuantizer(bits=bits, method="channel", activation_bits=4)
    quantizer.quantize_model(make_tiny_vit(), images, reconstruct=Reconstruction(epochs=1))
    assert taken == [frozenset()]


@pytest.mark.filterwarnings("ignore:calibrating on")
def test_the_later_blocks_get_more_projections(monkeypatch):
    asked = []
    weigh = calibration.token_weights
    monkeypatch.setattr(calibration, "token_weights", lambda *given: (asked.append(given[-1]), weigh(*given))[1])
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    model = make_tiny_vit()
    ViTQuantizer(bits=4, method="channel").quantize_model(model, images)
    last = next(
        name for name, module in reversed(list(model.named_modules())) if name.endswith((".layer.1", "layers.1"))
    )
    assert set(asked[0]) == {
        name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith(f"{last}.")
    }
    assert asked[0]
