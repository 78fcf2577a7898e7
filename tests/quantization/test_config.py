"""QuantizationConfig: validation, overrides, the seeded share."""

import pytest

from fairseq.quantization.config import LayerConfig, QuantizationConfig, merge_bits

NAMES = [f"vit.layers.{i}.{n}" for i in range(12) for n in ("q_proj", "k_proj", "fc1")] + ["classifier"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bits": 16}, ValueError, "bits must be from 2 to 8, got 16"),
        ({"bits": "4"}, TypeError, "bits must be an int from 2 to 8, got '4'"),
        ({"method": "foo"}, ValueError, "method must be one of tensor, channel, histogram, got 'foo'"),
        ({"p": 1.5}, ValueError, "from 0 to 1; got 1.5"),
        ({"p": float("nan")}, ValueError, "from 0 to 1; got nan"),
        ({"p": "half"}, TypeError, "p must be a number"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
        ({"quantize_mlp": "yes"}, TypeError, "quantize_mlp must be True or False"),
        (
            {"quantize_attention": False, "quantize_mlp": False, "quantize_classifier": False},
            ValueError,
            "nothing is selected",
        ),
        ({"overrides": ["*"]}, TypeError, "overrides must map"),
        ({"overrides": {"*": {"bit": 4}}}, ValueError, "activation_bits, activations, .*, skip.*got '\\*': {'bit': 4}"),
        ({"execution": "emulated", "backend": "cpu"}, ValueError, "backend='cpu' are settings of execution='packed'"),
        (
            {"execution": "emulated", "overrides": {"*fc1": {"weight_storage": "unpacked"}}},
            ValueError,
            r"override '\*fc1': weight_storage='unpacked'",
        ),
        ({"execution": "fast"}, ValueError, "execution must be one of 'packed', 'emulated'; got 'fast'"),
        ({"activations": "token"}, ValueError, "activations must be one of 'dynamic', 'static', None; got 'token'"),
        (
            {"rounding": "best"},
            ValueError,
            "rounding must be one of 'auto', 'nearest', 'gptq', 'gptaq', .*; got 'best'",
        ),
        ({"equalize": "auto"}, TypeError, "equalize must be True or False, got 'auto'"),
        ({"bias_correction": 1.5}, ValueError, "bias_correction must be True, False or 'add'; got 1.5"),
        ({"overrides": {"*": {"rounding": "up"}}}, ValueError, "override '\\*': rounding must be one of"),
        ({"group_size": 64}, ValueError, "method 'tensor' has one scale per layer and takes no group_size"),
        (
            {"overrides": {"*fc1": {"group_size": 7}}},
            ValueError,
            "override '\\*fc1': group_size must be from 32 to 128",
        ),
        ({"overrides": {"*": 4}}, ValueError, "an override maps a glob"),
        ({"overrides": {"*fc1": {"bits": 1}}}, ValueError, "override '\\*fc1': bits must be from 2 to 8, got 1"),
        ({"overrides": {"*": {"skip": 1}}}, TypeError, "skip must be True or False"),
        ({"exclude": "*classifier"}, TypeError, r"exclude must be a list of globs, such as .*; got '\*classifier'"),
        ({"exclude": ["a", 3]}, TypeError, r"exclude must be a list of globs, such as .*; got \['a', 3\]"),
        ({"exclude": {"*": {"bits": 8}}}, TypeError, "exclude must be a list of globs"),
    ],
)
def test_errors(settings, error, message):
    with pytest.raises(error, match=message):
        QuantizationConfig(**settings)


def test_first_matching_override_wins():
    config = QuantizationConfig(
        bits=4,
        method="channel",
        overrides={"*.0.*": {"bits": 8}, "*fc1": {"method": "tensor"}, "clas*": {"skip": True}},
    )
    assert config.for_layer("vit.layers.0.fc1") == LayerConfig(8, "channel")
    assert config.for_layer("vit.layers.1.fc1") == LayerConfig(4, "tensor")
    assert config.for_layer("vit.layers.1.q_proj") == LayerConfig(4, "channel")
    assert config.for_layer("classifier").skip
    assert config.unmatched_overrides(["vit.layers.0.fc1"]) == ["clas*"]


def test_sample_is_the_same_every_time_and_grows():
    samples = {p: QuantizationConfig(p=p).sample(NAMES) for p in (0, 0.01, 0.25, 0.5, 1)}
    assert {p: len(s) for p, s in samples.items()} == {0: 0, 0.01: 1, 0.25: 9, 0.5: 18, 1: 37}
    assert samples[0.01] < samples[0.25] < samples[0.5] < samples[1] == set(NAMES)
    old_names = [name.replace("layers", "encoder.layer") for name in NAMES]  # another version of transformers
    assert [n in samples[0.5] for n in NAMES] == [n in QuantizationConfig(p=0.5).sample(old_names) for n in old_names]
    assert QuantizationConfig(p=0.5, seed=1).sample(NAMES) != samples[0.5]
    # Fixed for good: a checkpoint of today must load into the same layers tomorrow.
    assert sorted(QuantizationConfig(p=0.1).sample(NAMES)) == [
        "classifier",
        "vit.layers.5.q_proj",
        "vit.layers.6.fc1",
        "vit.layers.8.k_proj",
    ]


def test_merge_bits_keeps_what_the_user_said():
    overrides = {
        "*.0.*": {"group_size": 32, "method": "channel"},
        "*fc1": {"skip": True},
        "*k_proj": {"bits": 8},
        "classifier": {"symmetric": True},  # glob.escape leaves this name as it is
        "other": {"bits": 3},
    }
    names = [
        "vit.layers.0.fc1",
        "vit.layers.1.fc1",
        "vit.layers.1.k_proj",
        "vit.layers.1.q_proj",
        "blocks[0]",
        "classifier",
    ]
    merged = merge_bits(overrides, dict.fromkeys(names, 2))
    assert merged == {
        "vit.layers.0.fc1": {"group_size": 32, "method": "channel", "bits": 2},
        "vit.layers.1.q_proj": {"bits": 2},
        "blocks[[]0]": {"bits": 2},
        "classifier": {"symmetric": True, "bits": 2},
        **{glob: settings for glob, settings in overrides.items() if glob != "classifier"},
    }
    assert list(merged)[:4] == ["vit.layers.0.fc1", "vit.layers.1.q_proj", "blocks[[]0]", "classifier"]  # they win
    config = QuantizationConfig(bits=5, overrides=merged)
    assert config.for_layer("vit.layers.0.fc1") == LayerConfig(2, "channel", group_size=32)
    assert config.for_layer("vit.layers.1.fc1").skip
    assert [config.for_layer(name).bits for name in (*names[2:], "other", "neither")] == [8, 2, 2, 2, 3, 5]
    assert config.for_layer("classifier").symmetric


def test_merge_bits_is_idempotent_and_changes_nothing_it_got():
    overrides = {"*": {"method": "channel"}, "a": {"bits": 3}}
    once = merge_bits(overrides, {"a": 4, "b": 2})
    assert overrides == {"*": {"method": "channel"}, "a": {"bits": 3}}
    assert once == {
        "a": {"method": "channel", "bits": 4},
        "b": {"method": "channel", "bits": 2},
        "*": {"method": "channel"},
    }
    assert merge_bits(once, {"a": 4, "b": 2}) == once


def test_exclude_wins_over_overrides():
    config = QuantizationConfig(
        bits=4, exclude=["*k_proj", "clas*"], overrides={"*": {"bits": 8}, "*fc1": {"skip": True}}
    )
    assert config.exclude == ("*k_proj", "clas*")
    assert config.for_layer("vit.layers.0.k_proj") == LayerConfig(8, skip=True)
    assert config.for_layer("vit.layers.0.q_proj") == LayerConfig(8)
    assert config.left_out("vit.layers.0.k_proj") == "excluded by '*k_proj'"
    assert config.left_out("vit.layers.0.q_proj") is None
    only = QuantizationConfig(exclude=("a",), overrides={"[ab]": {"skip": True}})
    assert [only.left_out(name) for name in "abc"] == ["excluded by 'a'", "skipped by an override", None]
    assert config.unmatched_exclude(["vit.layers.0.k_proj", "fc1"]) == ["clas*"]


def test_the_former_name_of_weight_storage():
    with pytest.warns(DeprecationWarning, match="resident is called weight_storage"):
        config = QuantizationConfig(overrides={"*fc1": {"resident": "unpacked"}})
    assert config.overrides == {"*fc1": {"weight_storage": "unpacked"}}  # it is said once
    assert config.for_layer("a.fc1") == LayerConfig(weight_storage="unpacked")
    with pytest.raises(ValueError, match="weight_storage and resident"):
        QuantizationConfig(overrides={"*fc1": {"resident": "unpacked", "weight_storage": "packed"}})
