"""Packed models in one file: equal to the bit, and every damaged file refused."""

import json
import random
import struct

import pytest
import torch
from families import build, each
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.saving import contents
from fairseq.quantization.saving.contents import FORMAT, inspect, write
from fairseq.quantization.saving.names import names_on_disk

MUTATIONS = 600


def equal(model, other):
    state, others = model.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(state.values(), others.values())
    )


@pytest.fixture
def saved(tiny_vit, tmp_path):
    quantized = ViTQuantizer(bits=4, method="channel").quantize_model(tiny_vit)
    path = tmp_path / "vit.safetensors"
    ViTQuantizer.save(quantized, path, {"note": "a test"})
    return tiny_vit, quantized, path


SETTINGS = [
    {"bits": 8}, {"bits": 3, "method": "channel", "group_size": 32},
    {"bits": 8, "method": "channel", "symmetric": True},
    {"bits": 4, "method": "histogram", "activations": None}, {"bits": 5, "method": "channel", "activation_bits": 6},
    {"bits": 4, "method": "channel", "weight_storage": "unpacked", "backend": "reference"},
    {"bits": 6, "method": "channel", "quantize_embeddings": True},
    {"bits": 8, "method": "channel", "quantize_embeddings": True, "overrides": {"*classifier": {"bits": 2}}},
    {"bits": 4, "method": "channel", "p": 0.4},
]  # fmt: skip


def test_files_call_settings_as_earlier_versions_do(tiny_vit, tmp_path):
    quantized = ViTQuantizer(
        4, "tensor", equalize=False, weight_storage="unpacked", exclude=["classifier"]
    ).quantize_model(tiny_vit)
    quantized.save_pretrained(tmp_path)
    description = inspect([tmp_path / "model.safetensors"]).description
    assert {tuple(part.items()) for part in description["layers"].values()} >= {(("bits", 4), ("resident", "unpacked"))}
    assert set().union(*description["layers"].values()) <= {"bits", "resident", "input_factor", "bias", "double"}
    assert "weight_storage" not in (tmp_path / "config.json").read_text()
    loaded = type(tiny_vit).from_pretrained(tmp_path)
    storages = {m.config.weight_storage for m in loaded.modules() if isinstance(m, PackedLinear)}
    assert storages == {"unpacked"}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_file_gives_the_same_model_to_the_bit(tiny_vit, pixels, tmp_path, settings):
    quantized = ViTQuantizer(**settings).quantize_model(tiny_vit)
    before = {name: tensor.clone() for name, tensor in tiny_vit.state_dict().items()}
    ViTQuantizer.save(quantized, tmp_path / "vit.safetensors")
    other = type(tiny_vit)(tiny_vit.config).eval()  # other weights
    loaded = ViTQuantizer.load(tmp_path / "vit.safetensors", other)
    assert equal(quantized, loaded)
    if "backend" not in settings:  # which kernels run is not saved
        assert torch.equal(quantized(pixels).logits, loaded(pixels).logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_vit.state_dict().items())
    with pytest.raises(AssertionError):
        assert equal(loaded, ViTQuantizer(**settings).quantize_model(other))  # its weights came from the file


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_files_hold_as_many_bits_as_there_are(tiny_vit, tmp_path, bits):
    quantized = ViTQuantizer(bits=bits, method="channel").quantize_model(tiny_vit)
    ViTQuantizer.save(quantized, tmp_path / "vit.safetensors")
    loaded = ViTQuantizer.load(tmp_path / "vit.safetensors", tiny_vit)
    assert equal(quantized, loaded)
    codes = {k: v for k, v in load_file(tmp_path / "vit.safetensors").items() if k.endswith("weight_codes")}
    layers = [m for m in loaded.modules() if isinstance(m, PackedLinear)]
    assert len(codes) == len(layers) == 13
    assert sum(map(torch.Tensor.numel, codes.values())) == sum(m.integers().numel() for m in layers) * bits // 8


def test_bytes_of_six_bits_are_no_longer_read(tiny_vit, tmp_path):
    """Earlier files had them: they are neither loaded unchecked nor taken for a head of another size."""
    quantized = ViTQuantizer(bits=6, method="channel").quantize_model(tiny_vit)
    layers = {n: m for n, m in quantized.named_modules() if isinstance(m, PackedLinear)}
    state = quantized.state_dict() | {f"{name}.weight_codes": m.integers() for name, m in layers.items()}
    with pytest.raises(ValueError, match="integers of 6 bits in a byte each, as no longer"):
        quantized.load_state_dict(state)
    quantized.save_pretrained(tmp_path)
    old = {f"{names_on_disk(quantized, [name])[name]}.weight_codes": m.integers() for name, m in layers.items()}
    resealed(tmp_path / "model.safetensors", lambda tensors, _: tensors.update(old))
    for also in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match="integers of 6 bits in a byte each, as no longer"):
            type(tiny_vit).from_pretrained(tmp_path, **also)
    with pytest.raises(ValueError, match="integers of 6 bits in a byte each, as no longer"):
        ViTQuantizer.load(tmp_path / "model.safetensors", tiny_vit)


def test_static_activations_and_biases_that_calibration_added(tiny_vit, pixels, tmp_path):
    quantizer = ViTQuantizer(bits=4, method="channel", activations="static", bias_correction="add")
    with pytest.warns(UserWarning, match="5 pictures"):
        quantized = quantizer.quantize_model(tiny_vit, calibration=pixels)
    ViTQuantizer.save(quantized, tmp_path / "vit.safetensors")
    loaded = ViTQuantizer.load(tmp_path / "vit.safetensors", tiny_vit)
    assert equal(quantized, loaded)
    assert torch.equal(quantized(pixels).logits, loaded(pixels).logits)
    assert loaded.vit.layernorm.weight.requires_grad


@pytest.mark.parametrize("name", each())
def test_every_family(name, tmp_path):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model = build(name)
    quantized = ViTQuantizer(bits=4, method="channel").quantize_model(model)
    ViTQuantizer.save(quantized, tmp_path / "model.safetensors")
    assert equal(quantized, ViTQuantizer.load(tmp_path / "model.safetensors", model))


def test_dtypes_of_the_model_that_is_loaded_into_hold(saved, tiny_vit):
    _, quantized, path = saved
    loaded = ViTQuantizer.load(path, tiny_vit.to(torch.bfloat16))
    assert loaded.classifier.bias.dtype == torch.bfloat16
    assert loaded.classifier.scale.dtype == torch.float32
    assert torch.equal(loaded.classifier.integers(), quantized.classifier.integers())


def test_a_float64_model_keeps_its_scales(tiny_vit, tmp_path):
    quantized = ViTQuantizer(bits=4, method="channel").quantize_model(tiny_vit.double())
    ViTQuantizer.save(quantized, tmp_path / "vit.safetensors")
    assert equal(quantized, ViTQuantizer.load(tmp_path / "vit.safetensors", tiny_vit))


def test_layers_that_share_their_integers_are_saved_apart(tiny_vit, tmp_path):
    tiny_vit.classifier.weight = nn.Parameter(torch.randn(24, 24))
    tiny_vit.classifier.bias = nn.Parameter(torch.randn(24))
    tiny_vit.classifier.out_features = 24
    layers = [m for n, m in tiny_vit.named_modules() if n.endswith((".query", ".q_proj"))]
    layers[0].weight = layers[1].weight
    quantized = ViTQuantizer(bits=4, method="channel").quantize_model(tiny_vit, engine="layers")
    ViTQuantizer.save(quantized, tmp_path / "vit.safetensors")
    assert equal(quantized, ViTQuantizer.load(tmp_path / "vit.safetensors", tiny_vit))


def test_the_file_says_what_it_holds(saved):
    _, _, path = saved
    contents = inspect([path])
    assert contents.description["information"] == {"note": "a test"}
    assert contents.description["format_version"] == 1
    assert contents.parts["classifier"] == {"bits": 4, "method": "channel"}
    assert len(contents.parts) == 13
    assert contents.tensors["classifier.weight_codes"].shape == (7, 12)
    # the names on disk are those of transformers 4.57, whichever version this is
    assert "vit.encoder.layer.0.attention.attention.query.weight_codes" in contents.tensors
    assert sum(t.numel() for t in load_file(path).values()) > 0


def rewritten(path, tensors=None, **changes):
    """The file with some of its metadata changed, its checksums as they were."""
    with safe_open(path, "pt") as opened:
        content = json.loads(opened.metadata()[FORMAT])
    content = {**content, **changes}
    save_file(load_file(path) if tensors is None else tensors, path, {FORMAT: json.dumps(content)})


def resealed(path, change):
    """The file with a changed description or tensors, all checksums right: what an attacker or a bug would write."""
    tensors = load_file(path)
    description = inspect([path]).description
    change(tensors, description)
    write(tensors, path, description)


def refused(path, model, *parts):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"\S") as caught:
        ViTQuantizer.load(path, model)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message.strip()
    for part in parts:
        assert part in message
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_changed_number_is_found(saved):
    model, _, path = saved
    tensors = load_file(path)
    tensors["vit.layernorm.weight"][3] += 1
    rewritten(path, tensors)
    refused(path, model, "vit.layernorm.weight", "checksum")


def test_a_changed_setting_is_found(saved):
    model, _, path = saved
    description = inspect([path]).description
    description["layers"]["classifier"]["activation_bits"] = 6
    rewritten(path, description=description)
    refused(path, model, "description", "checksum")


def test_a_later_version_is_refused(saved):
    model, _, path = saved
    resealed(path, lambda tensors, description: description.update(format_version=3))
    refused(path, model, "format_version 3", "later than 2")


@pytest.mark.parametrize(
    ("key", "tensor", "part"),
    [
        ("classifier.weight_codes", torch.zeros(7, 13, dtype=torch.uint8), "shape (7, 12)"),
        ("classifier.weight_codes", torch.zeros(7, 12, dtype=torch.int8), "U8"),
        ("classifier.scale", torch.full((7,), torch.nan), "positive and finite"),
        ("classifier.scale", torch.zeros(7), "positive and finite"),
        ("classifier.scale", torch.ones(7, dtype=torch.float16), "F32"),
        ("classifier.zero_point", torch.full((7,), 16, dtype=torch.uint8), "0 to 15"),
        ("classifier.settings", torch.tensor([8, 24, 0, 0], dtype=torch.int32), "bits"),
        ("classifier.bias", torch.zeros(8), "shape (7,)"),
        ("vit.layernorm.weight", torch.zeros(25), "shape (24,)"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_refused_although_their_checksums_do(saved, key, tensor, part):
    model, _, path = saved
    resealed(path, lambda tensors, description: tensors.update({key: tensor}))
    refused(path, model, key if "shape" in part else "classifier" if "classifier" in key else key, part)


def test_zero_points_and_inputs_out_of_range_are_refused(tiny_vit, pixels, tmp_path):
    path = tmp_path / "vit.safetensors"
    with pytest.warns(UserWarning, match="5 pictures"):
        quantized = ViTQuantizer(5, "tensor", activations="static", rounding="nearest", equalize=False).quantize_model(
            tiny_vit, pixels
        )
    static = next(n for n, m in quantized.named_modules() if getattr(m, "input_scale", None) is not None)
    on_disk = names_on_disk(quantized, [static])[static]
    for key, value in (("zero_point", 32), ("input_zero_point", 128), ("input_scale", -1)):
        ViTQuantizer.save(quantized, path)
        resealed(path, lambda tensors, _, key=key, value=value: tensors[f"{on_disk}.{key}"].fill_(value))
        refused(path, tiny_vit, static, "must be")


def test_a_packed_model_is_none_to_load_into(saved):
    _, quantized, path = saved
    refused(path, quantized, "load it into a float model")


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"bits": 9, "method": "channel"}, "9"),
        ({"bits": 4, "method": "channel", "speed": 2}, "'speed'"),
        ({"bits": 4, "method": "channel", "bias": 1}, "bias must be true or false"),
        ({"bits": 4, "method": "tensor"}, "classifier.scale must be"),
        ({"bits": 4, "method": "channel", "bias": False}, "has no classifier.bias"),
        ({"bits": 4, "method": "channel", "activations": "static"}, "classifier.input_scale is missing"),
        ({"bits": 4, "method": "channel", "group_size": 10**9}, "group_size"),
        ([4], "layers must map"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(saved, entry, part):
    model, _, path = saved
    resealed(path, lambda tensors, description: description["layers"].update(classifier=entry))
    refused(path, model, part)


def test_files_of_other_models_are_refused(saved, tmp_path):
    model, _, path = saved
    resealed(path, lambda tensors, description: tensors.pop("vit.embeddings.cls_token"))
    refused(path, model, "vit.embeddings.cls_token is missing")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"vit\.safetensors: no such file"):
        ViTQuantizer.load(path, model)
    ViTQuantizer.save(ViTQuantizer(method="channel").quantize_model(build("swin")), path)
    refused(path, model, "has no such layer")
    save_file({"a": torch.zeros(2)}, path)
    refused(path, model, "no packed model")
    torch.save(model.state_dict(), path)
    refused(path, model, "not a whole safetensors file")
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    with pytest.raises(ValueError, match=r"from \.safetensors files only"):
        ViTQuantizer.load(tmp_path / "vit.pt", model)


def test_files_that_were_not_saved_together_are_refused(saved, tiny_vit, tmp_path):
    _, _, path = saved
    other = tmp_path / "other.safetensors"
    ViTQuantizer.save(ViTQuantizer(bits=8, method="channel").quantize_model(tiny_vit), other)
    with pytest.raises(ValueError, match="is in"):
        inspect([path, other])
    resealed(other, lambda tensors, description: [tensors.pop(name) for name in list(tensors)[:-1]])
    resealed(path, lambda tensors, description: tensors.pop(next(iter(load_file(other)))))
    with pytest.raises(ValueError, match="not saved together"):
        inspect([path, other])


def test_what_cannot_be_saved(tiny_vit, tmp_path):
    with pytest.raises(ValueError, match="nothing in the model is packed"):
        ViTQuantizer.save(tiny_vit, tmp_path / "vit.safetensors")
    with pytest.raises(TypeError, match="model must be"):
        ViTQuantizer.save("model", tmp_path / "vit.safetensors")
    quantized = ViTQuantizer(method="channel").quantize_model(tiny_vit)
    with pytest.raises(ValueError, match=r"saved as \.safetensors"):
        ViTQuantizer.save(quantized, tmp_path / "vit.pt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ViTQuantizer.save(quantized, tmp_path / "none" / "vit.safetensors")
    with pytest.raises(ValueError, match="engine"):
        ViTQuantizer.load(tmp_path / "vit.safetensors", tiny_vit, engine="warp")
    assert not list(tmp_path.iterdir())


def test_what_json_has_no_word_for_is_not_saved(saved, tmp_path):
    with pytest.raises(ValueError, match="information: JSON has only finite numbers, and loss is inf"):
        ViTQuantizer.save(saved[1], tmp_path / "a.safetensors", {"images": 3, "loss": float("inf")})
    assert list(tmp_path.iterdir()) == [saved[2]]


def test_a_save_that_is_stopped_leaves_the_old_file(saved, tiny_vit, monkeypatch):
    _, quantized, path = saved
    before = path.read_bytes()

    def stopped(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(contents, "save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        ViTQuantizer.save(quantized, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def mutated(data, rng):
    """One way in which a file goes wrong, in transit, on disk or by intent."""
    data, size = bytearray(data), len(data)
    head = 8 + struct.unpack("<Q", data[:8])[0]
    place = rng.randrange(head if rng.random() < 0.5 else size)
    length = rng.choice([1, 2, 8, 64, 1000])
    kind = rng.randrange(9)
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        del data[place : place + length]
    elif kind == 3:
        data[place:place] = rng.randbytes(length)
    elif kind == 4:
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif kind == 5:
        data[place : place + length] = rng.randbytes(len(data[place : place + length]))
    elif kind == 6:  # two pieces change places
        other = rng.randrange(size)
        a, b = bytes(data[place : place + length]), bytes(data[other : other + length])
        data[place : place + length], data[other : other + length] = b, a
        data = data[:size]
    elif kind == 7:  # a digit of the header: a shape, an offset, a setting, a checksum
        digits = [i for i in range(8, head) if chr(data[i]).isdigit()]
        data[rng.choice(digits)] = ord(rng.choice("0123456789"))
    else:  # the header is another one of the same tensors
        header = json.loads(data[8:head])
        names = [name for name in header if name != "__metadata__"]
        a, b = rng.sample(names, 2)
        change = rng.randrange(4)
        if change == 0:
            header[a], header[b] = header[b], header[a]
        elif change == 1:
            header[a]["shape"] = [2**40, *header[a]["shape"]]
        elif change == 2:
            header[a]["dtype"] = rng.choice(["I8", "F32", "BF16", "U8"])
        else:
            header[f"{a}x"] = header.pop(a)
        text = json.dumps(header).encode()
        data[:head] = struct.pack("<Q", len(text)) + text
    return bytes(data)


def test_no_mutation_of_a_file_crashes_or_loads_other_numbers(saved):
    model, quantized, path = saved
    good = path.read_bytes()
    rng, refusals, harmless = random.Random(0), 0, 0
    for number in range(MUTATIONS):
        bad = mutated(good, rng)
        path.write_bytes(bad)
        try:
            loaded = ViTQuantizer.load(path, model)
        except ValueError as error:
            refusals += str(path) in str(error)  # one that does not name the file is not counted
        else:
            assert equal(loaded, quantized), f"mutation {number} loads other numbers"
            harmless += 1
    assert refusals + harmless == MUTATIONS
    assert harmless < 0.1 * MUTATIONS
