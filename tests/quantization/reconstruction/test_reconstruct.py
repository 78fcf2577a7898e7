"""Blocks that learn come nearer to the float model on other pictures, or stay as they were."""

import copy
from dataclasses import replace

import pytest
import torch
from families import build
from torch import nn

from fairseq.models.vit_quantization import Reconstruction, ViTQuantizer, compare_models
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.quantization.calibration import calibration
from fairseq.quantization.calibration.block_inputs import Stored, first
from fairseq.quantization.calibration.storage import Storage
from fairseq.quantization.reconstruction import reconstruct as reconstructing
from fairseq.quantization.reconstruction.learned_linear import LearnedLinear
from fairseq.quantization.reconstruction.learner import Learner
from fairseq.quantization.reconstruction.task import Task, token_weights
from fairseq.quantization.rounding import coordinate

PICTURES = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(3))
OTHERS = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(4))
FAST = Reconstruction(epochs=12, batch_size=8)
SETTINGS = {"bits": 2, "method": "channel", "activations": None, "rounding": "nearest"}


def quantize(model, reconstruct=FAST, pictures=PICTURES[:24], resume=None, **changes):
    quantizer = ViTQuantizer(**{**SETTINGS, **changes})
    result = quantizer.quantize_model(model, calibration=pictures, reconstruct=reconstruct, resume=resume)
    return result, quantizer.report


def integers(model):
    return [m.integers() for m in model.modules() if hasattr(m, "integers")]


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activations": "dynamic", "activation_bits": 3},
        *(pytest.param(more, marks=pytest.mark.matrix) for more in ({"method": "tensor"}, {"group_size": 32})),
    ],
    ids=str,
)
def test_it_errs_less_on_other_pictures(tiny_vit, changes):
    """The head is left in float: it is in no block, and its error may be as large as that of all blocks."""
    changes = {**changes, "overrides": {"classifier": {"skip": True}}}
    before = copy.deepcopy(tiny_vit.state_dict())
    plain, _ = quantize(tiny_vit, False, PICTURES, **changes)
    learned, report = quantize(tiny_vit, replace(FAST, epochs=20), PICTURES, **changes)
    assert compare_models(tiny_vit, learned, OTHERS)[0] < 0.5 * compare_models(tiny_vit, plain, OTHERS)[0]
    shares = [layer.reconstructed for layer in report.quantized if layer.block is not None]
    assert all(0 < share <= 1 for share in shares)
    assert min(shares) < 0.97
    assert any(not torch.equal(a, b) for a, b in zip(integers(plain), integers(learned), strict=True))
    assert all(torch.equal(before[key], x) for key, x in tiny_vit.state_dict().items())
    assert "error left" in report.table()


@pytest.mark.parametrize("execution", ["packed", pytest.param("emulated", marks=pytest.mark.matrix)])
def test_what_errs_more_on_pictures_held_back_is_taken_back(monkeypatch, tiny_vit, execution):
    plain, _ = quantize(tiny_vit, False, execution=execution)
    with monkeypatch.context() as patch:
        errors = iter([1.0, 2.0] * 100)  # the packed block errs more than it did
        real = Task.error

        def error(self, block, batches):
            learner = any(isinstance(m, LearnedLinear) for m in block.modules())
            return real(self, block, batches) if learner else next(errors)

        patch.setattr(Task, "error", error)
        back, report = quantize(tiny_vit, execution=execution)
    assert {layer.reconstructed for layer in report.quantized if layer.block is not None} == {1.0}
    assert same(plain, back)


@pytest.mark.parametrize(
    "rates", [{"integer_rate": 50.0, "bias_rate": 5.0}, {"scale_rate": 200.0}, {"bias_rate": 1e30}]
)
def test_what_diverges_changes_nothing(tiny_vit, rates):
    plain, _ = quantize(tiny_vit, False)
    wild, report = quantize(tiny_vit, Reconstruction(epochs=1, **rates))
    assert {layer.reconstructed for layer in report.quantized if layer.block is not None} == {1.0}
    assert same(plain, wild)


def test_where_a_first_attempt_hardly_helps_there_is_a_slower_second(monkeypatch, tiny_vit):
    tried, real = [], Learner.learn

    def learn(self, *arguments):
        tried.append(self.highest[0])
        return real(self, *arguments)

    monkeypatch.setattr(Learner, "learn", learn)
    _, report = quantize(tiny_vit)
    assert all(layer.reconstructed < 0.99 for layer in report.quantized if layer.block is not None)
    assert tried == [0.01, 0.01]  # one each
    tried.clear()
    monkeypatch.setattr(reconstructing, "SLOWER", 2e-4)
    _, report = quantize(tiny_vit, replace(FAST, integer_rate=50.0))
    assert tried == [50.0, 0.01, 50.0, 0.01]
    assert all(layer.reconstructed < 0.99 for layer in report.quantized if layer.block is not None)


def test_a_second_attempt_that_is_worse_is_not_taken(monkeypatch, tiny_vit):
    real = Learner.learn

    def learn(self, task, *arguments):
        first_attempt = self.highest[0] == 0.01
        real(self, task, *arguments)
        if not first_attempt:
            for twin in self.layers.values():
                torch.nn.init.zeros_(twin.latent)
        return task.error(self.block, task.held_back) if first_attempt else float("inf")

    monkeypatch.setattr(Learner, "learn", learn)
    monkeypatch.setattr(reconstructing, "WORTH", 0.0)  # so that there always is one
    expected, _ = quantize(tiny_vit)
    monkeypatch.undo()
    learned, _ = quantize(tiny_vit)
    assert same(expected, learned)


def test_what_is_left_behind(tiny_vit):
    called = []
    layer = next(m for m in tiny_vit.modules() if isinstance(m, nn.ModuleList))[0]
    next(m for m in layer.modules() if isinstance(m, nn.Linear)).register_forward_hook(lambda *_: called.append(1))
    packed, report = quantize(tiny_vit)
    again, _ = quantize(tiny_vit)
    emulated, _ = quantize(tiny_vit, execution="emulated")
    assert same(packed, again)
    called.clear()
    packed(OTHERS[:1])
    assert called == [1]
    for layer in emulated.modules():  # the range is that of the weight that is there
        if isinstance(layer, EmulatedLinear):
            assert not layer._lags()
            assert not torch.equal(layer.weight, layer.quantized_weight())  # where it was, within its integer
    norms = [[x for n, x in m.named_parameters() if "norm" in n] for m in (packed, tiny_vit)]
    assert any(not torch.equal(a, b) for a, b in zip(*norms, strict=True))
    for layer in report.quantized:  # of the integers that are there
        new = packed.get_submodule(layer.name)
        if layer.block is not None and isinstance(new, PackedLinear):
            weight = tiny_vit.get_submodule(layer.name).weight.detach()
            error = float((weight - new.dequantize()).square().sum() / weight.square().sum())
            assert layer.weight_sqnr == pytest.approx(-10 * torch.tensor(error).log10().item(), abs=0.02)


@pytest.mark.parametrize("execution", ["packed", "emulated"])
def test_a_static_range_is_learned(tiny_vit, execution):
    settings = {"activations": "static", "activation_bits": 8, "bits": 2, "execution": execution}
    plain, _ = quantize(tiny_vit, False, **settings)
    learned, report = quantize(tiny_vit, Reconstruction(epochs=12, batch_size=8, scale_rate=5e-3), **settings)
    static = [x.name for x in report.quantized if x.activations == "static" and (x.reconstructed or 1) < 1]
    assert static
    scales = [[m.get_submodule(name).input_scale for name in static] for m in (plain, learned)]
    assert all(not torch.equal(a, b) for a, b in zip(*scales, strict=True))


class _Stop(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_model(monkeypatch, tiny_vit, tmp_path):
    expected, report = quantize(tiny_vit)
    entered = []
    real = calibration.Calibration.enter

    def enter(self, stage):
        if len(entered) == 1:
            raise _Stop
        entered.append(stage)
        real(self, stage)

    with monkeypatch.context() as patch:
        patch.setattr(calibration.Calibration, "enter", enter)
        with pytest.raises(_Stop):
            quantize(tiny_vit, resume=tmp_path / "run")
    with pytest.raises(ValueError, match="reconstruction"):
        quantize(tiny_vit, Reconstruction(epochs=41), resume=tmp_path / "run")
    resumed, again = quantize(tiny_vit, resume=tmp_path / "run")
    assert same(expected, resumed)
    assert again == report


def test_minutes_become_epochs_that_fit(monkeypatch, tiny_vit, caplog):
    caplog.set_level("INFO")
    epochs = []

    def learn(self, task, count, generator):
        epochs.append(count)
        return task.error(self.block, task.held_back)  # as it was: with epochs there would be a second attempt

    monkeypatch.setattr(Learner, "learn", learn)
    ticks = iter(range(1000))  # each step takes a second
    monkeypatch.setattr(reconstructing.time, "perf_counter", lambda: next(ticks))
    quantize(tiny_vit, Reconstruction(minutes=1))  # 2 blocks, 2 steps an epoch
    quantize(tiny_vit, Reconstruction(minutes=0.01))
    assert epochs == [15, 15, 1, 1]
    said = caplog.text
    assert "2 blocks, 15 epochs each, about 60 s on this machine" in said
    assert "2 blocks, 1 epoch each" in said


@pytest.mark.parametrize("name", ["swin", "beit", "dinov2", "timm-vit"])
def test_other_families(name):
    model = build(name).eval()
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None) or model.patch_embed.img_size[0]
    pictures = torch.randn(24, 3, size, size, generator=torch.Generator().manual_seed(5))
    _, report = quantize(model, FAST, pictures)
    shares = [layer.reconstructed for layer in report.quantized if layer.component != "classifier"]
    assert None not in shares
    assert min(shares) < 0.95


def test_the_loss_counts_each_token_by_its_weight_and_leaves_pictures_out():
    inputs, outputs = Stored("inputs"), Storage("outputs")
    x, y = torch.randn(2, 20, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    for a, b in zip(x, y, strict=True):
        inputs.append(((a,), {}))
        outputs.append(b)
    weights = torch.rand(20 * 12, generator=torch.Generator().manual_seed(1))
    parts = token_weights(weights, outputs)
    task = Task(inputs, outputs, parts, nn.Linear(1, 1), half=False)
    expected = [((a - b).square().mean(-1).flatten() * w).mean() for a, b, w in zip(x, y, parts, strict=True)]
    assert [float(task.loss(nn.Identity(), i)) for i in range(20)] == pytest.approx(list(map(float, expected)))
    assert task.held_back == [7, 15]
    assert task.error(nn.Identity(), [7, 15]) == pytest.approx(float(expected[7] + expected[15]) / 2)
    epoch = [i for step in task.shuffled(8, torch.Generator().manual_seed(2)) for i in step]
    assert sorted(epoch) == [i for i in range(20) if i not in (7, 15)]
    assert epoch != sorted(epoch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activations", [None, "static"])
def test_other_dtypes(tiny_vit, dtype, activations):
    model = copy.deepcopy(tiny_vit).to(dtype)
    learned, report = quantize(model, activations=activations)
    assert min(layer.reconstructed for layer in report.quantized if layer.block is not None) < 1
    assert {p.dtype for p in learned.parameters()} == {dtype}
    assert torch.isfinite(learned(OTHERS[:2].to(dtype)).logits).all()


class _ByName(nn.Module):
    """Calls its blocks with their hidden states by name."""

    def __init__(self, vit):
        super().__init__()
        self.vit, self.config = vit.vit, vit.config

    def forward(self, pixel_values):
        hidden = self.vit.embeddings(pixel_values)
        for layer in next(m for m in self.vit.modules() if isinstance(m, nn.ModuleList)):
            hidden = first(layer(hidden_states=hidden))
        return hidden


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_blocks_that_are_called_by_name(tiny_vit):
    _, report = quantize(_ByName(tiny_vit), quantize_classifier=False)
    assert min(layer.reconstructed for layer in report.quantized if layer.block is not None) < 1


def test_views_of_a_picture_are_held_back_together():
    inputs, outputs = Stored("inputs"), Storage("outputs")
    for _ in range(31):  # 40 pictures of 3 views each, and one more
        inputs.append(((torch.zeros(4, 1),), {}))
        outputs.append(torch.zeros(4, 1))
    task = Task(inputs, outputs, None, nn.Linear(1, 1), False, views=3)
    assert task.held_back == [21, 22, 23]
    assert Task(inputs, outputs, None, nn.Linear(1, 1), False, views=32).held_back == [16, 17, 18, 19,
        20, 21, 22, 23]  # fmt: skip


def test_with_coarse_activations_what_learns_begins_without_corrections(monkeypatch, tiny_vit):
    """Corrections before it fit the pictures that it learns from, and then it finds nothing more there."""

    once = Reconstruction(epochs=1, batch_size=8)

    def roundings(reconstruct=once, **changes):
        report = quantize(tiny_vit, reconstruct, **changes)[1]
        return {layer.rounding for layer in report.quantized if layer.block}, report.layers[-1].rounding

    auto = {"rounding": "auto", "activations": "dynamic", "activation_bits": 4}
    assert roundings(**auto) == ({"coordinate"}, "coordinate")
    assert roundings(**auto, bits=4) == ({"coordinate"}, "coordinate")
    assert roundings(**auto, bits=5) == ({"gptq"}, "gptaq")
    assert roundings(False, **auto, bits=5) == ({"gptaq"}, "gptaq")
    chosen = {"overrides": {"*.0.*": {"rounding": "nearest"}}}
    assert roundings(**auto | chosen, bits=5)[0] == {"gptq", "nearest"}
    assert roundings(**auto | {"rounding": "gptaq"}) == ({"gptaq"}, "gptaq")
    corrected = []
    monkeypatch.setattr(coordinate, "drift_corrected", lambda weight, *rest: corrected.append(len(weight)) or weight)
    roundings(**auto)
    assert corrected == [tiny_vit.config.num_labels]  # the classifier, which is in no block
    roundings(**auto, overrides={"*.attention*q*": {"rounding": "gptaq"}})  # beside whom the others read the same
    assert corrected == 2 * [tiny_vit.config.num_labels]
    for more in ({}, {"activation_bits": 8}, {"activations": None, "activation_bits": 8}):
        corrected.clear()
        roundings(**({"reconstruct": False} if not more else {}), **auto | more)
        assert len(corrected) == 13


def test_a_layer_of_a_block_that_pictures_do_not_reach_is_rounded_without(tiny_vit):
    blocks = next(m for m in tiny_vit.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    spare = copy.deepcopy(next(m for m in blocks[0].modules() if isinstance(m, nn.Linear)))
    blocks[0].spare = nn.ModuleDict({"attention": nn.ModuleDict({"q_proj": spare})})
    coarse = {"activations": "dynamic", "activation_bits": 4}
    _, report = quantize(tiny_vit, replace(FAST, epochs=1), rounding="auto", bits=5, **coarse)
    roundings = {layer.name: layer.rounding for layer in report.quantized if layer.block}
    assert {rounding for name, rounding in roundings.items() if "spare" in name} == {"nearest"}
    assert {rounding for name, rounding in roundings.items() if "spare" not in name} == {"gptq"}


def test_blocks_that_share_parameters_are_left_and_said(tiny_vit):
    blocks = next(m for m in tiny_vit.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    norm = next(n for n, m in blocks[0].named_children() if isinstance(m, nn.LayerNorm))
    setattr(blocks[1], norm, getattr(blocks[0], norm))
    _, report = quantize(tiny_vit)
    notes = [layer.note for layer in report.quantized if layer.block is not None]
    assert all("shares parameters with another" in note for note in notes)
    assert all(layer.reconstructed is None for layer in report.quantized)
