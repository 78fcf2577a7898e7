"""LinearConfig: its defaults, and every refusal with what came and what is accepted."""

import dataclasses

import pytest

from fairseq.modules.quantization.packed.config import LinearConfig


def test_defaults():
    assert dataclasses.asdict(LinearConfig()) == {
        "bits": 8, "method": "tensor", "activations": "dynamic", "group_size": None, "symmetric": False,
        "weight_storage": "packed", "backend": "auto", "activation_bits": 8,
    }  # fmt: skip


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LinearConfig().bits = 4


def test_equal_settings_make_equal_configs():
    assert LinearConfig(4, "channel") == LinearConfig(bits=4, method="channel")
    assert hash(LinearConfig(4)) == hash(LinearConfig(4))
    assert LinearConfig(4) != LinearConfig(5)


@pytest.mark.parametrize(
    "settings",
    [
        *({"bits": bits} for bits in range(2, 9)),
        *({"method": method} for method in ("tensor", "channel", "histogram")),
        *({"method": method, "group_size": size} for method in ("channel", "histogram") for size in (32, 40, 128)),
        {"activations": None},
        {"activations": "static"},
        *({"activations": kind, "activation_bits": bits} for kind in ("dynamic", "static") for bits in range(2, 9)),
        {"symmetric": True},
        {"weight_storage": "unpacked"},
        *({"backend": backend} for backend in ("auto", "reference", "cpu", "floats", "cuda", "native")),
    ],
)
def test_accepted(settings):
    config = LinearConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


ONE_OF = r"{} must be one of {}; got {}$"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bits": 1}, ValueError, "bits must be from 2 to 8, got 1$"),
        ({"bits": 9}, ValueError, "bits must be from 2 to 8, got 9$"),
        ({"bits": 4.0}, TypeError, r"bits must be an int from 2 to 8, got 4.0 \(float\)$"),
        ({"bits": True}, TypeError, r"bits must be an int from 2 to 8, got True \(bool\)$"),
        ({"bits": "4"}, TypeError, r"bits must be an int from 2 to 8, got '4' \(str\)$"),
        ({"method": "row"}, ValueError, "method must be one of tensor, channel, histogram, got 'row'$"),
        ({"method": None}, ValueError, "method must be one of tensor, channel, histogram, got None$"),
        ({"group_size": 32}, ValueError, "'tensor' has one scale per layer and takes no group_size"),
        ({"method": "channel", "group_size": 24}, ValueError, "from 32 to 128 in steps of 8, got 24$"),
        ({"method": "channel", "group_size": 136}, ValueError, "from 32 to 128 in steps of 8, got 136$"),
        ({"method": "channel", "group_size": 33}, ValueError, "from 32 to 128 in steps of 8, got 33$"),
        ({"method": "channel", "group_size": 0}, ValueError, "from 32 to 128 in steps of 8, got 0$"),
        ({"method": "channel", "group_size": 32.0}, TypeError, "None or an int from 32 to 128, got 32.0$"),
        ({"method": "channel", "group_size": True}, TypeError, "None or an int from 32 to 128, got True$"),
        ({"activations": "int8"}, ValueError, ONE_OF.format("activations", "'dynamic', 'static', None", "'int8'")),
        ({"activations": 8}, ValueError, ONE_OF.format("activations", "'dynamic', 'static', None", "8")),
        ({"activation_bits": 1}, ValueError, "^activation_bits must be from 2 to 8, got 1$"),
        ({"activation_bits": 9}, ValueError, "^activation_bits must be from 2 to 8, got 9$"),
        ({"activation_bits": 4.0}, TypeError, r"^activation_bits must be an int from 2 to 8, got 4.0 \(float\)$"),
        ({"activation_bits": True}, TypeError, "^activation_bits must be an int from 2 to 8, got True"),
        (
            {"activations": None, "activation_bits": 4},
            ValueError,
            "activations=None rounds no activations and takes no activation_bits=4$",
        ),
        ({"activations": ["dynamic"]}, ValueError, r"activations must be .*; got \['dynamic'\]$"),
        ({"weight_storage": "float"}, ValueError, ONE_OF.format("weight_storage", "'packed', 'unpacked'", "'float'")),
        ({"weight_storage": None}, ValueError, ONE_OF.format("weight_storage", "'packed', 'unpacked'", "None")),
        (
            {"backend": "gpu"},
            ValueError,
            ONE_OF.format("backend", "'auto', 'reference', 'cpu', 'floats', 'cuda', 'triton', 'native'", "'gpu'"),
        ),
        ({"symmetric": 1}, TypeError, "symmetric must be True or False, got 1$"),
        ({"symmetric": None}, TypeError, "symmetric must be True or False, got None$"),
    ],
)
def test_refused(settings, error, message):
    with pytest.raises(error, match=message):
        LinearConfig(**settings)
