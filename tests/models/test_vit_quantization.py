"""The front door: settings, report, log, and a quantized model that saves, loads, traces and exports."""

import copy
import logging
import pickle
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from bounds import EXACT, flips, rms, sum_error
from families import shortened
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from fairseq.models.vit_quantization import BitAssignment, ViTQuantizer, compare_models
from fairseq.modules.quantization.scalar.ops import METHODS

SETTINGS = [
    (8, "tensor", 1.0), pytest.param(4, "tensor", 1.0, marks=pytest.mark.matrix), (4, "channel", 1.0),
    (4, "histogram", 1.0), (4, "channel", 0.5),
]  # fmt: skip
TWO = [{"bits": 8}, pytest.param({"bits": 4, "activations": None}, marks=pytest.mark.matrix)]


def quantize(model, bits, method, p, engine="auto"):
    return ViTQuantizer(bits=bits, method=method, p=p).quantize_model(model, engine=engine)


def fresh(model):
    """A model of the same architecture with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.3)
    return other


def test_defaults_are_documented_ones():
    config = ViTQuantizer().config
    assert (config.bits, config.method, config.p, config.seed) == (8, "tensor", 1.0, 0)
    assert config.quantize_attention
    assert config.quantize_mlp
    assert config.quantize_classifier
    assert "bits=8" in repr(ViTQuantizer())


def test_positional_arguments_and_keyword_only_ones():
    config = ViTQuantizer(4, "channel", 0.5, False, True, False, seed=3, overrides={"*": {"bits": 8}}).config
    assert (config.bits, config.method, config.p) == (4, "channel", 0.5)
    assert (config.quantize_attention, config.quantize_mlp, config.quantize_classifier) == (False, True, False)
    with pytest.raises(TypeError):
        ViTQuantizer(4, "channel", 0.5, False, True, False, 3)


def test_excluded_layers_stay_in_float_and_the_report_says_why(tiny_vit):
    quantizer = ViTQuantizer(4, "channel", exclude=["*classifier", "*.0.*"], overrides={"*": {"bits": 6}})
    quantized = quantizer.quantize_model(tiny_vit)
    reasons = {layer.name: layer.skipped for layer in quantizer.report.skipped}
    assert len(reasons) == 7
    assert reasons.pop("classifier") == "excluded by '*classifier'"
    assert set(reasons.values()) == {"excluded by '*.0.*'"}
    assert all(".0." in name for name in reasons)
    assert type(quantized.classifier) is torch.nn.Linear
    assert {layer.bits for layer in quantizer.report.quantized} == {6}
    with pytest.raises(ValueError, match=r"exclude '\*head' matches no selected layer; there are .*classifier|vit"):
        ViTQuantizer(exclude=["*head"]).quantize_model(tiny_vit)
    with pytest.raises(ValueError, match="exclude 'classifier' matches no selected layer"):
        ViTQuantizer(exclude=["classifier"], quantize_classifier=False).quantize_model(tiny_vit)


def test_excluded_embeddings_stay_in_float(tiny_vit):
    quantizer = ViTQuantizer(method="channel", quantize_embeddings=True, exclude=["*position_embeddings"])
    quantizer.quantize_model(tiny_vit)
    reasons = {layer.name: layer.skipped for layer in quantizer.report.skipped}
    assert reasons["vit.embeddings.position_embeddings"] == "excluded by '*position_embeddings'"


def test_weight_storage_by_its_former_name():
    with pytest.warns(DeprecationWarning, match="resident is called weight_storage") as warned:
        assert ViTQuantizer(bits=4, resident="unpacked").config.weight_storage == "unpacked"
    with pytest.raises(ValueError, match="two names of one setting"):
        ViTQuantizer(weight_storage="unpacked", resident="unpacked")
    assert warned[0].filename == __file__


def test_it_says_what_it_did(tiny_vit, caplog):
    quantizer = ViTQuantizer(bits=4)
    assert quantizer.report is None
    with caplog.at_level(logging.INFO, logger="fairseq"):
        quantizer.quantize_model(tiny_vit)
    assert "Quantized 13 linear layers: 13 4-bit tensor (8 attention, 4 mlp, 1 classifier)" in caplog.text
    assert str(quantizer.report) in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_more_bits_are_closer(tiny_vit, pixels, method):
    """Each bit more is half the step and a quarter of the squared error: six are 1 / 4096, within a factor of ten."""
    model = shortened(tiny_vit)
    errors = [compare_models(model, quantize(model, bits, method, 1.0), pixels).mse_loss for bits in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 10 / 4**6 * errors[0]


def test_finer_methods_are_closer_in_weight(tiny_vit):
    def error(method):
        other = dict(ViTQuantizer.dequantize_model(quantize(tiny_vit, 4, method, 1.0)).named_parameters())
        return sum(float((p - other[n]).detach().square().sum()) for n, p in tiny_vit.named_parameters())

    assert error("histogram") < error("channel") < error("tensor")


@pytest.mark.parametrize(("bits", "method", "p"), SETTINGS)
def test_state_dict_loads_into_a_freshly_quantized_model(tiny_vit, pixels, tmp_path, bits, method, p, device):
    quantized = quantize(tiny_vit.to(device), bits, method, p)
    torch.save(quantized.state_dict(), tmp_path / "vit.pt")
    other = quantize(fresh(tiny_vit), bits, method, p)
    x = pixels.to(device)
    with torch.no_grad():
        expected = quantized(pixel_values=x).logits
        assert not torch.equal(other(pixel_values=x).logits, expected)
        result = other.load_state_dict(torch.load(tmp_path / "vit.pt"))
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert torch.equal(other(pixel_values=x).logits, expected)


def test_copies_pickles_and_whole_model_files(tiny_vit, pixels, tmp_path):
    quantized = quantize(tiny_vit, 4, "channel", 1.0)
    torch.save(quantized, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    with torch.no_grad():
        expected = quantized(pixel_values=pixels).logits
        for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), whole):
            assert torch.equal(other(pixel_values=pixels).logits, expected)


def test_state_dicts_of_the_other_execution_are_refused(tiny_vit):
    quantizers = [ViTQuantizer(method="channel", execution=execution) for execution in ("packed", "emulated")]
    packed, emulated = (quantizer.quantize_model(tiny_vit) for quantizer in quantizers)
    with pytest.raises(ValueError, match="of one quantized with execution='emulated'"):
        packed.load_state_dict(emulated.state_dict())
    with pytest.raises(ValueError, match="quantize with execution='packed' to load it"):
        emulated.load_state_dict(packed.state_dict())
    with pytest.raises(ValueError, match=r"was saved with 4 bits, 24 inputs.*has 8 bits"):
        packed.load_state_dict(quantize(tiny_vit, 4, "channel", 1.0).state_dict())


def test_file_is_as_small_as_the_integers(tmp_path):
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768,
                                                num_hidden_layers=4)).eval()  # fmt: skip
    torch.save(model.state_dict(), tmp_path / "float.pt")
    for bits, share in ((8, 0.35), (4, 0.25)):
        quantizer = ViTQuantizer(bits=bits, method="channel")
        torch.save(quantizer.quantize_model(model).state_dict(), tmp_path / "q.pt")
        size = (tmp_path / "q.pt").stat().st_size
        assert size < share * (tmp_path / "float.pt").stat().st_size
        assert size < quantizer.report.bytes_after + 500 * len(quantizer.report.layers) * 5  # names and alignment


def test_moves_and_casts(tiny_vit, pixels, device):
    quantized = quantize(tiny_vit, 4, "channel", 1.0)
    with torch.no_grad():
        expected = quantized(pixel_values=pixels).logits
        moved = quantized.to(device)
        bound = flips(quantized, pixels.to(device))
        assert rms(moved(pixel_values=pixels.to(device)).logits.cpu() - expected) < bound
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            other = copy.deepcopy(moved).to(dtype)
            logits = other(pixel_values=pixels.to(device, dtype)).logits
            assert logits.dtype == dtype
            roundings = 20 * torch.finfo(dtype).eps / 2 * float(expected.abs().max())  # of hidden states, ten a block
            assert rms(logits.cpu() - expected) < bound + roundings
            assert other.classifier.scale.dtype == torch.float32


@pytest.mark.parametrize("settings", TWO, ids=str)
def test_compile_and_export_take_the_whole_model(tiny_vit, pixels, settings):
    """Exported to the bit; compiled, whose norms have sums of their own, to what falls on the other side of an edge.

    Without rounded activations, to the rounding of float64. Exported for any batch; compiled for one, as each is anew.
    """
    quantized = ViTQuantizer(**settings).quantize_model(shortened(tiny_vit), engine="layers")
    rounds = "activations" not in settings
    if not rounds:
        quantized, pixels = quantized.double(), pixels.double()
    batch = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(quantized, (), {"pixel_values": pixels}, dynamic_shapes=batch).module()
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for x in (pixels, pixels[:2]):
            expected = quantized(pixel_values=x).logits
            recorded = exported(pixel_values=x).logits
            if rounds:
                assert torch.equal(recorded, expected)
            else:
                torch.testing.assert_close(recorded, expected, **EXACT)
        got = compiled(pixel_values=x).logits
        if rounds:
            assert rms(got - expected) < flips(quantized, x)
        else:
            torch.testing.assert_close(got, expected, **EXACT)


def test_threads_calling_one_model_at_once(tiny_vit):
    quantized = quantize(tiny_vit, 4, "channel", 1.0)
    batches = [torch.randn(n, 3, 16, 16) for n in (1, 2, 3, 4, 5, 6, 7, 8)]

    def run(x):
        with torch.inference_mode():
            return [quantized(pixel_values=x).logits for _ in range(4)]

    expected = [run(x)[0] for x in batches]
    with ThreadPoolExecutor(8) as pool:
        for got, alone in zip(pool.map(run, batches), expected, strict=True):
            assert all(torch.equal(one, alone) for one in got)


def test_nan_in_one_picture_stays_in_that_picture(tiny_vit, pixels):
    quantized = quantize(tiny_vit, 8, "channel", 1.0)
    broken = pixels.clone()
    broken[2, 0, 3, 3] = float("nan")
    with torch.no_grad():
        got, expected = quantized(pixel_values=broken).logits, quantized(pixel_values=pixels).logits
    assert got[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(got[others], expected[others])


def test_call_signature_is_the_same(tiny_vit, pixels):
    quantized = quantize(tiny_vit, 8, "channel", 1.0)
    output = quantized(pixels, labels=torch.arange(5), output_hidden_states=True)
    assert type(output) is type(tiny_vit(pixels))
    assert output.loss.ndim == 0
    assert len(output.hidden_states) == 3
    assert isinstance(quantized(pixels, return_dict=False), tuple)


@pytest.mark.slow
def test_torchscript_runs_in_a_process_without_fairseq(tiny_vit, pixels, tmp_path):
    quantized = quantize(tiny_vit, 4, "channel", 1.0, engine="layers")
    traced = torch.jit.trace(quantized, pixels)
    traced.save(str(tmp_path / "vit.pt"))
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    code = (
        "import sys, numpy as np, torch\n"
        "model = torch.jit.load('vit.pt')\n"
        "out = model(torch.from_numpy(np.load('pixels.npy')))[0]\n"
        "np.save('logits.npy', out.detach().numpy())\n"
        "assert 'fairseq' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = quantized(pixel_values=pixels).logits
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "logits.npy")), expected)


@pytest.mark.parametrize(
    ("settings", "nodes"),
    [
        pytest.param({"bits": 8, "method": "histogram"}, {"MatMulInteger": 7}, marks=pytest.mark.matrix),
        pytest.param({"bits": 4}, {"MatMulInteger": 7, "BitShift": 14}, marks=pytest.mark.matrix),
        pytest.param(
            {"bits": 4, "method": "channel", "activations": None},
            {"DequantizeLinear": 7, "BitShift": 14},
            marks=pytest.mark.matrix,
        ),
        (
            {"bits": 4, "method": "channel", "overrides": {"*.0.[mo]*[2e]": {"activations": None}}},  # fc2, by any name
            {"MatMulInteger": 6, "DequantizeLinear": 1, "BitShift": 14},
        ),
    ],
    ids=str,
)
def test_onnx_holds_integers_and_gives_the_same_logits(tmp_path, settings, nodes):
    import onnx
    import onnxruntime

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, num_hidden_layers=1, num_labels=512,
        image_size=32, patch_size=8,
    )).eval()  # fmt: skip
    quantizer = ViTQuantizer(**settings)
    quantized, x = quantizer.quantize_model(model, engine="layers"), torch.randn(3, 3, 32, 32)
    path = tmp_path / "vit_int4_model.onnx"
    torch.onnx.export(quantized, x, str(path), input_names=["pixel_values"], output_names=["logits"], verbose=False)
    graph = onnx.load(path).graph
    size = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer)
    assert size < 1.02 * quantizer.report.bytes_after
    # The graph itself is text and names, 25 to 60 kB per layer whatever its size.
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < size + 600_000
    counts = Counter(node.op_type for node in graph.node)
    assert {name: counts[name] for name in nodes} == nodes
    session = onnxruntime.InferenceSession(str(path))
    assert [i.name for i in session.get_inputs()] == ["pixel_values"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    (got,) = session.run(None, {"pixel_values": x.numpy()})
    with torch.no_grad():
        expected = quantized(pixel_values=x).logits
    chain = 10 * sum_error(768, rms(expected))  # some ten sums, of at most 768 terms, one after the other
    bound = chain if "activations" in settings else flips(quantized, x)
    assert rms(torch.from_numpy(got) - expected) < bound


@pytest.mark.parametrize("settings", TWO, ids=str)
def test_the_reference_kernels_can_be_recorded(tiny_vit, pixels, tmp_path, settings):
    """Processors without exact products of bytes, as with AVX2 alone, run them, and trace and export all the same.

    Of attention, whose layers are no others, nothing is packed.
    """
    import onnxruntime

    settings = {**settings, "method": "channel", "quantize_attention": False}
    quantized = ViTQuantizer(**settings, backend="reference").quantize_model(shortened(tiny_vit))
    traced = torch.jit.trace(quantized, pixels)
    torch.onnx.export(quantized, pixels, str(tmp_path / "vit.onnx"), input_names=["x"], verbose=False)
    (there,) = onnxruntime.InferenceSession(str(tmp_path / "vit.onnx")).run(None, {"x": pixels.numpy()})
    with torch.no_grad():
        expected = quantized(pixels).logits
        chain = 20 * sum_error(40, rms(expected))  # some twenty sums, of at most 40 terms, one after the other
        bound = chain if "activations" in settings else flips(quantized, pixels)
        for got in (traced(pixels)[0], torch.from_numpy(there)):
            assert rms(got - expected) < bound
        if "activations" not in settings:
            usual = ViTQuantizer(**settings, backend="cpu").quantize_model(tiny_vit)
            assert torch.equal(traced(pixels)[0], expected)
            assert torch.equal(usual(pixels).logits, expected)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bits": 16}, ValueError, "bits must be from 2 to 8, got 16"),
        ({"method": "foo"}, ValueError, "one of tensor, channel, histogram, got 'foo'"),
        ({"p": 1.5}, ValueError, "from 0 to 1; got 1.5"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        ViTQuantizer(**settings)


def test_a_failed_call_keeps_the_last_report(tiny_vit):
    quantizer = ViTQuantizer(method="channel")
    quantizer.quantize_model(tiny_vit)
    report = quantizer.report
    with pytest.raises(ValueError, match="no Linear layer"):
        quantizer.quantize_model(nn.ReLU())
    assert quantizer.report is report


def test_neighbours_in_the_batch_do_not_matter(tiny_vit, pixels):
    quantized = quantize(tiny_vit, 8, "histogram", 1.0)
    loud = torch.cat([pixels[:1], 1e4 * pixels[1:]])
    with torch.no_grad():
        alone, together, next_to_loud = (quantized(pixel_values=x).logits[:1] for x in (pixels[:1], pixels, loud))
    for got in (together, next_to_loud):  # sums of another batch size may have another order
        assert rms(got - alone) < flips(quantized, pixels[:1])


# Calibration images and mixed widths.


@pytest.fixture
def images():
    """As few as there can be without a warning."""
    return torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(6))


@pytest.mark.filterwarnings("error")
def test_calibration_takes_what_users_have(tiny_vit, images):
    model, quantizer = shortened(tiny_vit), ViTQuantizer(bits=4, method="channel")
    models = [quantizer.quantize_model(model, calibration=data) for data in (images, list(images))]
    one, other = (made.state_dict() for made in models)
    assert all(torch.equal(one[key], other[key]) for key in one)
    plain = quantizer.quantize_model(model)
    errors = [compare_models(model, made, images).mse_loss for made in (models[0], plain)]
    assert errors[0] < errors[1]


def test_a_processor_without_images_is_refused(tiny_vit):
    with pytest.raises(ValueError, match="no pictures; pass calibration=images"):
        ViTQuantizer().quantize_model(tiny_vit, processor=lambda **keywords: keywords)


def test_a_static_model_survives_pickle(tiny_vit, images):
    quantizer = ViTQuantizer(method="channel", activations="static", rounding="nearest")
    quantized = quantizer.quantize_model(tiny_vit, images)
    assert compare_models(quantized, pickle.loads(pickle.dumps(quantized)), images) == (0, 0, 1)


def test_few_images_are_used_with_a_warning_and_none_are_refused(tiny_vit, images):
    with pytest.warns(UserWarning, match="128"):
        ViTQuantizer(bits=4, method="channel").quantize_model(tiny_vit, calibration=images[:4])
    with pytest.raises(ValueError, match="pictures, not"):
        ViTQuantizer(bits=4).quantize_model(tiny_vit, calibration=["cat", "dog"])


def test_a_calibrated_state_dict_loads_into_a_model_that_was_not(tiny_vit, images):
    quantizer = ViTQuantizer(bits=4, method="channel")
    calibrated = quantizer.quantize_model(shortened(tiny_vit), calibration=images)
    other = quantizer.quantize_model(fresh(tiny_vit))
    other.load_state_dict(calibrated.state_dict())
    assert compare_models(calibrated, other, images) == (0, 0, 1)


def test_bits_are_assigned_within_the_budget(tiny_vit, images):
    quantizer = ViTQuantizer(method="channel", activations=None)
    assignment = quantizer.assign_bits(tiny_vit, images, average_bits=4.5)
    assert assignment.average_bits <= 4.5
    mixed = ViTQuantizer(method="channel", activations=None, overrides=assignment.overrides)
    uniform = ViTQuantizer(bits=4, method="channel", activations=None)
    errors = [compare_models(tiny_vit, q.quantize_model(tiny_vit), images).mse_loss for q in (mixed, uniform)]
    assert errors[0] < errors[1]
    assert {layer.bits for layer in mixed.report.quantized} == set(assignment.bits.values())


USERS = {
    "classifier": {"skip": True}, "*fc1": {"group_size": 32}, "*intermediate.dense": {"group_size": 32},
    "*.0.attention*": {"bits": 8, "symmetric": True}, "*patch_embeddings*": {"symmetric": True},
}  # fmt: skip


@pytest.mark.parametrize(
    "limit", [{"average_bits": 4.5}, pytest.param({"max_accuracy_drop": 60}, marks=pytest.mark.matrix)], ids=str
)
def test_assigned_bits_carry_on_the_users_overrides(tiny_vit, images, limit, tmp_path):
    overrides = {glob: own for glob, own in USERS.items() if any(fnmatch(n, glob) for n, _ in tiny_vit.named_modules())}
    quantizer = ViTQuantizer(method="channel", overrides=overrides, quantize_embeddings=True)
    assignment = quantizer.assign_bits(tiny_vit, images, **limit)
    assert "classifier" not in assignment.bits
    eights = {name for name, bits in assignment.bits.items() if ".0.attention" in name and bits == 8}
    assert len(eights) == 4
    assert assignment.average_bits <= limit.get("average_bits", 7)
    assignment.save(tmp_path / "bits.json")
    chosen = BitAssignment.load(tmp_path / "bits.json").overrides
    again = ViTQuantizer(method="channel", overrides=chosen, quantize_embeddings=True)
    layers = {name: m for name, m in again.quantize_model(tiny_vit, images).named_modules() if hasattr(m, "config")}
    assert isinstance(layers.get("classifier"), torch.nn.Linear | None)
    for name, bits in assignment.bits.items():
        config = layers[name].config
        assert config.bits == bits
        assert config.symmetric == (name in eights)
        assert config.group_size == (32 if name.endswith(("fc1", "intermediate.dense")) else None)


def test_bits_are_assigned_within_a_drop_of_accuracy(tiny_vit, images):
    model = shortened(tiny_vit)
    settings = {"method": "channel", "rounding": "nearest"}
    quantizer = ViTQuantizer(**settings, overrides={"*classifier": {"activations": None}})
    assignment = quantizer.assign_bits(model, images, max_accuracy_drop=10)
    assert assignment.average_bits < 8
    mixed = ViTQuantizer(**settings, overrides=assignment.overrides).quantize_model(model, images)
    assert compare_models(model, mixed, images).top_k_match >= 0.8


@pytest.mark.parametrize(
    "limits", [{}, {"average_bits": 4, "max_accuracy_drop": 1}, {"max_accuracy_drop": -1}], ids=str
)
def test_a_budget_is_one_of_two(tiny_vit, images, limits):
    with pytest.raises(ValueError, match=r"exactly one of|from 0 to 100"):
        ViTQuantizer().assign_bits(tiny_vit, images, **limits)
