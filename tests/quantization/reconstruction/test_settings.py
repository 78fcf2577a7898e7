"""What a Reconstruction accepts, and what reconstruct= means."""

from types import SimpleNamespace

import pytest

from fairseq.models.vit_quantization import Reconstruction, ViTQuantizer
from fairseq.quantization.reconstruction import reconstruct as reconstructing
from fairseq.quantization.reconstruction.learner import Learner
from fairseq.quantization.reconstruction.settings import COARSE, FINE, resolve_reconstruction


def test_what_reconstruct_means():
    own = Reconstruction(epochs=3)
    assert resolve_reconstruction(False) is None
    assert resolve_reconstruction(True) == Reconstruction()
    assert resolve_reconstruction(own) is own


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs of a Reconstruction must be at least 1, got 0"),
        ({"epochs": 2.5}, TypeError, "epochs of a Reconstruction must be an int of at least 1, got 2.5"),
        (
            {"batch_size": True},
            TypeError,
            "batch_size of a Reconstruction must be an int of at least 1, or None, got True",
        ),
        ({"batch_size": 6}, ValueError, "batch_size of a Reconstruction must be a multiple of 4, got 6"),
        ({"minutes": 0}, ValueError, "minutes of a Reconstruction must be more than 0 and finite, got 0"),
        ({"minutes": "5"}, TypeError, "minutes of a Reconstruction must be a number, or None, got '5'"),
        ({"integer_rate": 0.0}, ValueError, "integer_rate of a Reconstruction must be more than 0"),
        ({"scale_rate": -1e-3}, ValueError, "scale_rate of a Reconstruction must be at least 0"),
        (
            {"bias_rate": float("nan")},
            ValueError,
            "bias_rate of a Reconstruction must be at least 0 and finite, got nan",
        ),
    ],
)
def test_what_is_no_setting_is_said(settings, kind, message):
    with pytest.raises(kind, match=message):
        Reconstruction(**settings)


@pytest.mark.parametrize(
    ("quantizer", "call", "kind", "message"),
    [
        ({}, {"reconstruct": 3}, TypeError, "reconstruct must be True, False or a Reconstruction"),
        ({}, {"reconstruct": True, "calibration": None}, ValueError, "learns from images"),
        ({}, {"reconstruct": True, "images": 12}, ValueError, "needs at least 16; got 12"),
        ({}, {"reconstruct": True, "images": 15, "augment": 2}, ValueError, "needs at least 16; got 15"),
        ({}, {"calibration": None, "augment": 2}, ValueError, "augment=2 was given but no pictures"),
        ({}, {"reconstruct": Reconstruction(minutes=1), "resume": "run"}, ValueError, "of so many epochs"),
        ({"arithmetic": "integer"}, {"reconstruct": True}, ValueError, "needs arithmetic='float'"),
    ],
)
@pytest.mark.filterwarnings("ignore:calibrating on 12 pictures")
def test_where_nothing_can_be_learned_is_said(tiny_vit, pixels, quantizer, call, kind, message):
    pictures = pixels.repeat(20, 1, 1, 1)[:20] + 0.1 * (0.5 + pixels.new_tensor(range(20))).view(-1, 1, 1, 1)
    with pytest.raises(kind, match=message):
        ViTQuantizer(bits=4, **quantizer).quantize_model(tiny_vit, **{"calibration": pictures, **call})


@pytest.mark.parametrize(
    ("quantizer", "expected"),
    [
        ({}, [FINE, FINE]),
        ({"activations": None}, [FINE, FINE]),
        ({"activation_bits": 7}, [COARSE, COARSE]),
        ({"overrides": {"*.1.*": {"activation_bits": 4}, "classifier": {"activation_bits": 2}}}, [FINE, COARSE]),
    ],
    ids=str,
)
def test_a_block_learns_as_its_activations_ask(monkeypatch, tiny_vit, pixels, quantizer, expected):
    seen = []

    class Seen(Learner):
        def __init__(self, block, name, layers, done, rates):
            super().__init__(block, name, layers, done, rates)
            self.given = rates

        def learn(self, task, epochs, generator):
            assert (self.batch_size, *self.highest) == self.given
            seen.append(self.given)
            return 0.0  # so that there is no second attempt

    monkeypatch.setattr(reconstructing, "Learner", Seen)
    pictures = pixels.repeat(20, 1, 1, 1)[:20] + 0.1 * pixels.new_tensor(range(20)).view(-1, 1, 1, 1)
    many = [rates if rates is FINE else (4, *(225 / 4000 * rate for rate in COARSE[1:])) for rates in expected]
    given = [rates._replace(batch_size=8, scale_rate=0.5) for rates in expected]
    for settings, rates in (
        (Reconstruction(), expected),
        (Reconstruction(epochs=1000), many),  # of four steps each
        (Reconstruction(batch_size=8, scale_rate=0.5), given),
    ):
        seen.clear()
        chosen = ViTQuantizer(bits=4, **quantizer)
        with pytest.warns(UserWarning, match="20 pictures"):
            chosen.quantize_model(tiny_vit, calibration=pictures, reconstruct=settings)
        assert seen == rates


def test_with_many_steps_coarse_weights_go_as_far():
    layers = [SimpleNamespace(settings=SimpleNamespace(activation_bits=bits)) for bits in (8, 3)]
    half = [rate / 2 for rate in COARSE[1:]]
    steps = {4: 90, 8: 45}.get
    assert Reconstruction().rates(layers, 2, steps) == COARSE
    assert Reconstruction().rates(layers, 5, steps) == (4, *half)
    assert Reconstruction(batch_size=8).rates(layers, 10, steps) == (8, *half)
    assert Reconstruction(bias_rate=0).rates(layers, 5, steps) == (4, *half[:2], 0)
    assert Reconstruction(bias_rate=0).rates(layers[:1], 500, steps) == FINE._replace(bias_rate=0)
