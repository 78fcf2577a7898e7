"""The fused engine: that a block gives what its layers give, and stays the model that it was."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from bounds import flips, rms, rounding_noise
from conftest import vit_config
from families import shortened
from known_blocks import count_native
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DeiTConfig, DeiTForImageClassification, ViTForImageClassification, ViTModel

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear, kernels
from fairseq.modules.quantization.packed.kernels import native, reference
from fairseq.quantization.engine.fuse import fuse, optimize, unfuse
from fairseq.quantization.engine.fused_block import FusedBlock

pytestmark = pytest.mark.skipif(
    not native.levels(), reason="no native kernels: there was no C++ compiler when the library was installed"
)


def blocks(model):
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


def logits(model, x, **keywords):
    with torch.no_grad():
        return model(x, **keywords).logits


def assert_close(fused, layers, x):
    """An activation on the edge between two integers may round to either, and so may all that follows from it.

    What a block computes, test_a_block_is_its_parts sees more closely.
    """
    assert rms(logits(fused, x) - logits(layers, x)) < flips(layers, x)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def block_by_hand(block, x):
    """What a fused block computes, from its layers on the reference kernels and attention in bfloat16."""
    layers = [block.get_submodule(path) for path in block.plan.layers]
    query, key, value, output, fc1, fc2 = (
        lambda rows, layer=layer: reference.integer(
            rows.flatten(0, 1) if layer.input_factor is None else rows.flatten(0, 1) * layer.input_factor,
            layer.weight_matrix, layer.bias, layer.input_grid,
        ).view(*rows.shape[:2], -1)
        for layer in layers
    )  # fmt: skip
    h = block.layernorm_before(x)
    parts = (f(h).bfloat16().float().unflatten(-1, (block.plan.heads, -1)).transpose(1, 2) for f in (query, key, value))
    q, k, v = parts
    scores = q @ k.transpose(2, 3) * block.plan.scaling
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    attended = weights.bfloat16().float() @ v / weights.sum(-1, keepdim=True)
    x = x + output(attended.transpose(1, 2).flatten(2))
    return x + fc2(nn.functional.gelu(fc1(block.layernorm_after(x))))


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 8}, {"bits": 4, "method": "channel"}, {"activations": "static"},
        {"bits": 4, "method": "channel", "group_size": 32, "activation_bits": 5},
        {"activations": "static", "activation_bits": 6},
    ],
    ids=str,
)  # fmt: skip
def test_a_block_is_its_parts(tiny_vit, pixels, settings):
    calibration = pixels if "activations" in settings else None
    quantizer = ViTQuantizer(**settings, rounding="nearest")
    assert_its_parts(quantizer.quantize_model(tiny_vit, calibration=calibration, engine="fused"))


def test_layers_of_different_groups_are_fused(tiny_vit):
    names = ("*mlp.fc1", "*intermediate.dense")
    groups = {glob: {"group_size": 32} for glob in names if _matches(tiny_vit, glob)}
    quantizer = ViTQuantizer(bits=8, method="channel", group_size=48, overrides=groups, rounding="nearest")
    assert_its_parts(quantizer.quantize_model(tiny_vit, engine="fused"))


def assert_its_parts(fused):
    exact = [m for m in ViTQuantizer.dequantize_model(fused).modules() if type(m).__name__ == "ViTLayer"]
    for block, floating in zip(blocks(fused), exact, strict=True):
        x = torch.randn(4, 17, 24)
        with torch.no_grad():
            got, expected, unrounded = block(x), block_by_hand(block, x), first(floating(x))
        # In a few tokens an integer rounds to its neighbour; in the others the GELU is good to 1e-5, and is multiplied.
        off = (got - expected).abs().amax(-1)
        assert float(off.quantile(0.25)) < 1e-5 * float(expected.abs().max())
        assert rms(got - expected) < 2 * rms(expected - unrounded)  # see bounds.flips


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 8}, {"bits": 8, "method": "channel"}, {"bits": 4, "method": "histogram"}, {"bits": 4},
        {"bits": 3, "method": "channel"}, {"bits": 8, "method": "channel", "symmetric": True},
        {"bits": 8, "method": "channel", "overrides": {"*.1.*": {"bits": 4}}},
        {"bits": 8, "method": "channel", "group_size": 32}, {"bits": 4, "method": "channel", "activation_bits": 4},
    ],
    ids=str,
)  # fmt: skip
def test_a_fused_model_gives_what_its_layers_give(tiny_vit, pixels, settings, monkeypatch):
    quantizer = ViTQuantizer(**settings)
    layers = quantizer.quantize_model(tiny_vit, engine="layers")
    assert quantizer.report.fused_blocks == 0
    assert not blocks(layers)
    fused = quantizer.quantize_model(tiny_vit)
    assert quantizer.report.fused_blocks == len(blocks(fused)) == 2
    assert "Fused 2 encoder blocks" in str(quantizer.report)
    assert quantizer.report.bytes_after == sum(t.nbytes for t in (*fused.parameters(), *fused.buffers()))
    calls = count_native(monkeypatch)
    assert_close(fused, layers, pixels)
    assert calls == [2]


def test_static_ranges_are_fused_too(tiny_vit, pixels, monkeypatch):
    quantizer = ViTQuantizer(bits=8, method="channel", activations="static", rounding="nearest")
    layers = quantizer.quantize_model(tiny_vit, calibration=pixels, engine="layers")
    fused = quantizer.optimize(layers)
    calls = count_native(monkeypatch)
    assert_close(fused, layers, pixels)
    assert calls == [2]


@pytest.mark.parametrize("settings", [{"activation_bits": 4}, {"activations": "static"}], ids=str)
def test_groups_of_inputs_are_fused(pixels, settings, monkeypatch):
    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config(hidden_size=80, num_attention_heads=2, intermediate_size=144)).eval()
    quantizer = ViTQuantizer(bits=4, method="channel", group_size=32, rounding="nearest", **settings)
    calibration = pixels if "activations" in settings else None
    layers = quantizer.quantize_model(model, calibration=calibration, engine="layers")
    fused = quantizer.optimize(layers)
    calls = count_native(monkeypatch)
    assert_close(fused, layers, pixels)
    assert calls == [2]
    compiled = torch.compile(copy.deepcopy(fused), backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled, pixels), logits(fused, pixels))


@pytest.mark.parametrize("width", [(32, 1), (48, 2), (40, 5), (30, 6)], ids=str)
def test_heads_of_any_size(pixels, width):
    torch.manual_seed(0)
    size, heads = width
    model = ViTForImageClassification(vit_config(hidden_size=size, num_attention_heads=heads)).eval()
    quantizer = ViTQuantizer(bits=8, method="channel")
    layers, fused = (quantizer.quantize_model(model, engine=engine) for engine in ("layers", "fused"))
    assert_close(fused, layers, pixels)


def test_deit_is_fused(pixels):
    torch.manual_seed(0)
    config = DeiTConfig(**{k: v for k, v in vit_config().to_dict().items() if k not in ("model_type", "architectures")})
    model = DeiTForImageClassification(config).eval()
    quantizer = ViTQuantizer(bits=8, method="channel")
    layers, fused = (quantizer.quantize_model(model, engine=engine) for engine in ("layers", "fused"))
    assert len(blocks(fused)) == 2
    assert_close(fused, layers, pixels)


def test_the_same_bits_whatever_the_batch_and_the_threads(tiny_vit, pixels):
    fused = ViTQuantizer(bits=4, method="channel").quantize_model(tiny_vit, engine="fused")
    expected, before = logits(fused, pixels), torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            hidden = torch.randn(3, 17, 24)
            block = blocks(fused)[0]
            with torch.no_grad():
                whole = block(hidden)
                assert torch.equal(torch.cat([block(image) for image in hidden.split(1)]), whole)
            assert torch.equal(logits(fused, pixels), expected)
    finally:
        torch.set_num_threads(before)


def test_state_dicts_are_those_of_layers(tiny_vit, pixels):
    quantizer = ViTQuantizer(bits=4, method="channel")
    fused, layers = (quantizer.quantize_model(tiny_vit, engine=engine) for engine in ("fused", "layers"))
    saved, expected = fused.state_dict(), layers.state_dict()
    assert list(saved) == list(expected)
    assert all(torch.equal(saved[key], expected[key]) for key in saved)
    assert type(fused.vit).__name__ == "ViTModel"
    torch.manual_seed(5)
    other = quantizer.quantize_model(ViTForImageClassification(vit_config()).eval(), engine="fused")
    before = logits(other, pixels)
    other.load_state_dict(torch.load(io.BytesIO(_bytes(expected)), weights_only=True))
    assert not torch.equal(logits(other, pixels), before)
    assert torch.equal(logits(other, pixels), logits(fused, pixels))
    layers.load_state_dict(saved)


def _bytes(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def test_copies_and_pickles(tiny_vit, pixels, tmp_path):
    fused = ViTQuantizer(bits=8, method="channel").quantize_model(tiny_vit, engine="fused")
    expected = logits(fused, pixels)
    torch.save(fused, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), loaded):
        assert len(blocks(other)) == 2
        assert torch.equal(logits(other, pixels), expected)
        with torch.no_grad():
            blocks(other)[0].layernorm_before.weight.add_(1)
            assert not torch.equal(logits(other, pixels), expected)
    assert torch.equal(logits(fused, pixels), expected)


def test_changes_are_seen(tiny_vit, pixels, monkeypatch):
    fused = ViTQuantizer(bits=8, method="channel").quantize_model(tiny_vit, engine="fused")
    calls = count_native(monkeypatch)
    seen = [logits(fused, pixels)]

    def changed():
        seen.append(logits(fused, pixels))
        return not any(torch.equal(seen[-1], one) for one in seen[:-1])

    block = blocks(fused)[0]
    first, last = (block.get_submodule(path) for path in (block.plan.layers[0], block.plan.layers[-1]))
    with torch.no_grad():
        block.layernorm_after.bias.add_(0.5)
        assert changed()
        block.layernorm_after.weight = nn.Parameter(block.layernorm_after.weight * 2)
        assert changed()
        last.bias.add_(torch.randn(24))  # not the same in all columns, which the next LayerNorm takes away
        assert changed()
        last.bias = last.bias * 2
        assert changed()
        first.scale.mul_(1.5)
        assert changed()
        state = {key: value.clone() for key, value in first.state_dict().items()}
        state["weight_codes"] += 7
        first.load_state_dict(state)
        assert changed()
        assert calls == [2 * len(seen)]
        block.set_submodule(block.plan.layers[0], nn.Linear(24, 24))
        assert changed()
        assert calls == [2 * len(seen) - 1]  # that block has a float layer, and is no longer fused


@pytest.mark.parametrize("change", ["norm", "attention", "activation", "eps", "scaling", "data", "shared memory"])
def test_changes_of_structure_are_seen(tiny_vit, pixels, change):
    quantizer = ViTQuantizer(bits=8, method="channel")
    fused, layers = (quantizer.quantize_model(tiny_vit, engine=engine) for engine in ("fused", "layers"))
    before = logits(fused, pixels)

    def apply(block):
        if change == "norm":
            block.layernorm_before = nn.LayerNorm(24)
        elif change == "attention":
            other = copy.deepcopy(block.attention)
            for module in other.modules():
                if isinstance(module, PackedLinear):
                    module.bias = -module.bias
            block.attention = other
        elif change == "activation":
            holder = next(m for m in block.modules() if {"activation_fn", "intermediate_act_fn"} & set(m._modules))
            setattr(holder, ({"activation_fn", "intermediate_act_fn"} & set(holder._modules)).pop(), nn.ReLU())
        elif change == "eps":
            block.layernorm_before.eps = 1.0
        elif change == "scaling":
            next(m for m in block.modules() if hasattr(m, "scaling")).scaling *= 3
        elif change == "data":
            for module in block.modules():
                if isinstance(module, PackedLinear | nn.LayerNorm):
                    module.bias.data = -module.bias.data
        else:
            block.share_memory()

    first = [next(m for m in model.modules() if type(m).__name__.endswith("ViTLayer")) for model in (fused, layers)]
    with torch.no_grad():
        for block in first:
            apply(block)
        assert torch.equal(logits(fused, pixels), before) == (change == "shared memory")
    assert_close(fused, layers, pixels)


def test_heads_wider_than_the_model(pixels):
    """The rows of one layer must not reach into those that another thread holds for the next one."""
    if "head_dim" not in inspect.getsource(ViTModel.__init__.__globals__["ViTAttention"]):
        pytest.skip("this transformers has heads of width / heads only")
    for head_dim in (64, 8):
        torch.manual_seed(0)
        config = vit_config(hidden_size=48, num_attention_heads=3, head_dim=head_dim)
        fused = ViTQuantizer(bits=8, method="channel").quantize_model(
            ViTForImageClassification(config).eval(), engine="fused"
        )
        hidden, before = torch.randn(1, 61, 48), torch.get_num_threads()
        with torch.no_grad():
            expected = blocks(fused)[0](hidden)
            try:
                torch.set_num_threads(2)
                assert all(torch.equal(blocks(fused)[0](hidden), expected) for _ in range(60))
            finally:
                torch.set_num_threads(before)


def test_a_forward_that_was_replaced_is_called(tiny_vit, pixels, monkeypatch):
    fused = ViTQuantizer(bits=8, method="channel").quantize_model(tiny_vit, engine="fused")
    bound, calls, norm = flips(fused, pixels), count_native(monkeypatch), blocks(fused)[0].layernorm_before
    expected = logits(fused, pixels)
    norm.forward = norm.forward  # the method itself
    assert torch.equal(logits(fused, pixels), expected)
    assert calls == [4]
    norm.forward = lambda x: 0 * x
    assert rms(logits(fused, pixels) - expected) > bound
    assert calls == [5]


def test_dropout_in_training_mode_alone(tiny_vit, pixels, monkeypatch):
    fused = ViTQuantizer(bits=8, method="channel").quantize_model(tiny_vit, engine="fused")
    calls = count_native(monkeypatch)
    for module in blocks(fused)[0].modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(logits(fused, pixels), logits(fused, pixels))
    assert calls == [2]  # the other block, twice


def test_hooks_of_all_modules_see_the_layers(tiny_vit, pixels, monkeypatch):
    fused = ViTQuantizer(bits=8, method="channel").quantize_model(tiny_vit, engine="fused")
    calls, seen = count_native(monkeypatch), []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module))):
        logits(fused, pixels)
    assert calls == [0]
    assert seen.count(PackedLinear) == 13


def test_who_looks_into_a_block_sees_its_layers(tiny_vit, pixels, monkeypatch):
    quantizer = ViTQuantizer(bits=8, method="channel")
    fused, layers = (quantizer.quantize_model(tiny_vit, engine=engine) for engine in ("fused", "layers"))
    calls, seen = count_native(monkeypatch), []
    handle = blocks(fused)[1].layernorm_after.register_forward_hook(lambda *args: seen.append(args[2]))
    logits(fused, pixels)
    assert len(seen) == 1
    assert calls == [1]  # the other block
    handle.remove()
    logits(fused, pixels)
    assert calls == [3]
    blocks(fused)[1].layernorm_after.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    assert rms(logits(fused, pixels) - logits(layers, pixels)) > flips(layers, pixels)


def test_attentions_and_hidden_states(tiny_vit, pixels, monkeypatch):
    tiny_vit.config._attn_implementation = "eager"
    quantizer = ViTQuantizer(bits=8, method="channel")
    fused, layers = (quantizer.quantize_model(tiny_vit, engine=engine) for engine in ("fused", "layers"))
    calls = count_native(monkeypatch)
    expected = logits(fused, pixels)
    assert calls == [2]
    with torch.no_grad():
        output, reference = (m(pixels, output_attentions=True) for m in (fused, layers))
        assert calls == [2]
        assert len(output.attentions) == 2
        exact = ViTQuantizer.dequantize_model(layers)(pixels, output_attentions=True)
        for got, wanted, unrounded in zip(*((*o.attentions, o.logits) for o in (output, reference, exact))):
            assert rms(got - wanted) < 2 * rms(wanted - unrounded)  # see bounds.flips
        assert torch.equal(logits(fused, pixels), expected)  # the hooks that collected them are still there
        assert calls == [4]
        output = fused(pixels, output_hidden_states=True)
        assert calls == [6]
        assert len(output.hidden_states) == 3
        assert torch.equal(output.logits, expected)


def test_training_mode_runs_the_layers(tiny_vit, pixels, monkeypatch):
    fused = ViTQuantizer(bits=8, method="channel").quantize_model(tiny_vit, engine="fused")
    calls = count_native(monkeypatch)
    torch.manual_seed(0)
    one, other = logits(fused.train(), pixels), logits(fused, pixels)
    assert not torch.equal(one, other)  # dropout
    assert calls == [0]
    logits(fused.eval(), pixels)
    assert calls == [2]


def test_gradients_are_those_of_the_layers(tiny_vit, pixels, monkeypatch):
    """Norms, the class token and a float head are tuned through fused blocks, whose forward stays a native call."""
    quantizer = ViTQuantizer(bits=8, method="channel", quantize_classifier=False)
    layers = quantizer.quantize_model(tiny_vit, engine="layers")
    fused = quantizer.optimize(layers)
    calls = count_native(monkeypatch)
    found = []
    for model in (fused, layers):
        output = model(pixels).logits
        (output * torch.linspace(-1, 1, 7)).sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert calls == [2]
    assert torch.equal(fused(pixels).logits.detach(), logits(fused, pixels))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient is not None, name
        # the layers of the backward pass see what the layers before them gave in the forward pass: fused, or not
        error = torch.linalg.vector_norm(gradient - found[1][name]) / torch.linalg.vector_norm(found[1][name])
        assert error < 0.1, name


@pytest.mark.parametrize("tuned", ["layernorm", "classifier", "cls_token"])
def test_what_is_tuned_alone_gets_its_gradient(tiny_vit, pixels, tuned, monkeypatch):
    fused = ViTQuantizer(bits=8, method="channel", quantize_classifier=False).quantize_model(tiny_vit, engine="fused")
    for name, parameter in fused.named_parameters():
        parameter.requires_grad_(tuned in name)
    calls = count_native(monkeypatch)
    fused(pixels).logits.square().sum().backward()
    assert calls == [2]
    for name, parameter in fused.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (tuned in name), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(tiny_vit, pixels, dtype, monkeypatch):
    fused = ViTQuantizer(bits=8, method="channel").quantize_model(tiny_vit, engine="fused")
    expected, bound, calls = logits(fused, pixels), flips(fused, pixels), count_native(monkeypatch)
    half = copy.deepcopy(fused).to(dtype)
    got = logits(half, pixels.to(dtype))
    assert got.dtype == dtype
    assert calls == [2]
    roundings = 20 * torch.finfo(dtype).eps / 2 * float(expected.abs().max())  # of hidden states, ten a block
    assert rms(got.float() - expected) < bound + roundings
    with torch.no_grad():
        blocks(half)[0].layernorm_before.weight.mul_(2)  # of which there is a copy in float32
        assert not torch.equal(logits(half, pixels.to(dtype)), got)
    double = copy.deepcopy(fused).to(torch.float64)
    assert logits(double, pixels.double()).dtype == torch.float64
    assert calls == [4]


def test_nothing_in_nothing_out(tiny_vit):
    fused = ViTQuantizer(bits=8, method="channel").quantize_model(tiny_vit, engine="fused")
    with torch.no_grad():
        assert blocks(fused)[0](torch.empty(0, 17, 24)).shape == (0, 17, 24)
        assert blocks(fused)[0](torch.randn(2, 1, 24)).shape == (2, 1, 24)
        strided = torch.randn(24, 17, 2).permute(2, 1, 0)
        assert torch.equal(blocks(fused)[0](strided), blocks(fused)[0](strided.contiguous()))


def test_optimize_and_back(tiny_vit, pixels):
    layers = ViTQuantizer(bits=4, method="channel").quantize_model(tiny_vit, engine="layers")
    expected = logits(layers, pixels)
    fused = ViTQuantizer.optimize(layers)
    assert len(blocks(fused)) == 2
    assert not blocks(layers)
    assert torch.equal(logits(layers, pixels), expected)
    again = optimize(optimize(fused))
    assert len(blocks(again)) == 2
    assert torch.equal(logits(again, pixels), logits(fused, pixels))
    back = ViTQuantizer.optimize(fused, engine="layers")
    assert not blocks(back)
    assert all(m.panels is None for m in back.modules() if isinstance(m, PackedLinear))
    assert torch.equal(logits(back, pixels), expected)
    unfuse(fused)
    assert torch.equal(logits(fused, pixels), expected)


def test_dequantizing_a_fused_model(tiny_vit, pixels):
    quantizer = ViTQuantizer(bits=4, method="channel")
    one, other = (quantizer.dequantize_model(quantizer.quantize_model(tiny_vit, engine=e)) for e in ("fused", "layers"))
    assert not blocks(one)
    assert torch.equal(logits(one, pixels), logits(other, pixels))


def test_shared_weights_stay_shared(tiny_vit):
    first, second = (block.get_submodule("mlp.fc1" if hasattr(block, "mlp") else "intermediate.dense")
                     for block in tiny_vit.modules() if type(block).__name__ == "ViTLayer")  # fmt: skip
    second.weight = first.weight
    fused = ViTQuantizer(bits=4, equalize=False).quantize_model(tiny_vit, engine="fused")
    one, other = (block.get_submodule(block.plan.layers[4]) for block in blocks(fused))
    assert one.panels is other.panels
    plain = ViTQuantizer.dequantize_model(fused)
    weights = [m.weight for name, m in plain.named_modules() if name.endswith(("fc1", "intermediate.dense"))]
    assert weights[0] is weights[1]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "channel", "overrides": {"*.k*": {"activation_bits": 4}}},
         "its query, key and value layers round their input differently"),
        ({"method": "channel", "overrides": {"*.k*": {"group_size": 32}}},
         "its query, key and value layers have groups of different sizes"),
        ({"method": "channel", "quantize_mlp": False}, "its fc1 layer is not packed"),
        ({"method": "channel", "overrides": {"*attention.q*": {"skip": True}}}, "its query layer is not packed"),
        ({"method": "channel", "backend": "reference"}, "its query layer: backend='reference'"),
        ({"method": "channel", "group_size": 40}, "its query layer: group_size=40, which is no multiple of 16"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_fused_is_said(tiny_vit, pixels, settings, reason):
    quantizer = ViTQuantizer(bits=8, **settings)
    automatic = quantizer.quantize_model(tiny_vit)
    assert quantizer.report.fused_blocks == 0
    assert not blocks(automatic)
    assert logits(automatic, pixels).isfinite().all()
    with pytest.raises(ValueError, match=r"^engine='fused': no encoder block can be fused; vit\..*\.0: " + reason):
        quantizer.quantize_model(tiny_vit, engine="fused")


def test_some_blocks_are_fused(tiny_vit, pixels):
    names = {"*.1.*fc1": {"skip": True}, "*.1.intermediate.dense": {"skip": True}}
    names = {glob: value for glob, value in names.items() if _matches(tiny_vit, glob)}
    quantizer = ViTQuantizer(bits=8, method="channel", overrides=names)
    fused = quantizer.quantize_model(tiny_vit, engine="fused")
    assert quantizer.report.fused_blocks == 1
    assert list(fuse(fused).values()) == [None, "its fc1 layer is not packed"]
    assert logits(fused, pixels).isfinite().all()


def _matches(model, glob):
    from fnmatch import fnmatchcase

    return any(fnmatchcase(name, glob) for name, _ in model.named_modules())


@pytest.mark.parametrize("activation", ["gelu_python", "gelu_new", "quick_gelu", "silu", "relu"])
def test_activations_are_known_by_what_they_compute(activation, pixels):
    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config(hidden_act=activation)).eval()
    fused = ViTQuantizer(method="channel").quantize_model(model, engine="fused")
    assert len(blocks(fused)) == 2
    assert_close(fused, ViTQuantizer.optimize(fused, "layers"), pixels)


def test_another_activation_is_not_fused():
    model = ViTForImageClassification(vit_config(hidden_act="mish")).eval()
    with pytest.raises(ValueError, match="its activation is none of gelu, gelu_tanh"):
        ViTQuantizer().quantize_model(model, engine="fused")


def test_errors_of_the_arguments(tiny_vit):
    with pytest.raises(ValueError, match="engine must be one of 'auto', 'fused', 'layers'; got 'fast'"):
        ViTQuantizer().quantize_model(tiny_vit, engine="fast")
    with pytest.raises(ValueError, match="engine='fused' runs packed integers; execution='emulated' holds none"):
        ViTQuantizer(execution="emulated").quantize_model(tiny_vit, engine="fused")
    with pytest.raises(ValueError, match="nothing in the model is packed"):
        ViTQuantizer.optimize(tiny_vit)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        ViTQuantizer.optimize("model")
    plain = ViTQuantizer(method="channel").quantize_model(tiny_vit, engine="layers")
    renamed = nn.Sequential(*(m for m in plain.modules() if isinstance(m, PackedLinear)))
    with pytest.raises(ValueError, match="there is none in it"):
        optimize(renamed)


def test_without_the_library(tiny_vit, pixels, monkeypatch):
    monkeypatch.setattr(native, "levels", lambda: ())
    quantizer = ViTQuantizer(bits=4, method="channel")
    automatic = quantizer.quantize_model(tiny_vit)
    assert not blocks(automatic)
    best = kernels.choose(torch.device("cpu")).name  # "reference" where products of bytes are not exact
    assert {m.backend for m in automatic.modules() if isinstance(m, PackedLinear)} == {best}
    with pytest.raises(RuntimeError, match="engine='fused' needs the native kernels: they were not built; install a"):
        quantizer.quantize_model(tiny_vit, engine="fused")
    assert torch.equal(logits(automatic, pixels), logits(automatic, pixels))


def test_the_environment_forbids_it(tiny_vit, pixels, monkeypatch):
    quantizer = ViTQuantizer(bits=8, method="channel")
    layers, fused = (quantizer.quantize_model(tiny_vit, engine=engine) for engine in ("layers", "fused"))
    calls = count_native(monkeypatch)
    monkeypatch.setenv("FAIRSEQ_QUANTIZATION_BACKEND", "reference")  # which every processor can
    assert torch.equal(logits(fused, pixels), logits(layers, pixels))
    assert calls == [0]
    assert not blocks(quantizer.quantize_model(tiny_vit))


def test_compile_sees_one_operator_per_block(tiny_vit, pixels):
    fused = ViTQuantizer(bits=4, method="channel").quantize_model(shortened(tiny_vit), engine="fused")
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(pixels).logits, logits(fused, pixels))
        assert graphs[0].count("native_block") >= 1
        assert torch.equal(compiled(pixels[:2]).logits, logits(fused, pixels[:2]))


def test_compiled_it_trains_what_is_left_in_float(tiny_vit, pixels):
    """As in eager mode, where hidden states are those of native blocks; without a gradient, or with another's, by 1."""
    fused = ViTQuantizer(bits=8, method="channel", exclude=["classifier"]).quantize_model(shortened(tiny_vit))
    assert blocks(fused)
    torch.compiler.reset()
    found = []
    for call in (fused, torch.compile(fused, fullgraph=True, backend="aot_eager")):
        fused.zero_grad()
        given = pixels.clone().requires_grad_()
        call(given).logits[:, 0].sum().backward()
        found.append({name: parameter.grad for name, parameter in fused.named_parameters()} | {"pixels": given.grad})
    eager, compiled = found
    assert not [name for name, gradient in compiled.items() if gradient is None]
    for name, gradient in compiled.items():
        assert (gradient - eager[name]).norm() < 0.1 * eager[name].norm(), name


def test_compiled_blocks_call_hooks(tiny_vit, pixels):
    fused = ViTQuantizer(bits=8, method="channel").quantize_model(shortened(tiny_vit), engine="fused")
    seen = []
    blocks(fused)[0].layernorm_after.register_forward_hook(lambda *args: seen.append(1))
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(fused, backend="eager")(pixels)
    assert seen


def test_export_takes_a_fused_model(tiny_vit, pixels):
    fused = ViTQuantizer(bits=8, method="channel").quantize_model(tiny_vit, engine="fused")
    batch = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(fused, (), {"pixel_values": pixels}, dynamic_shapes=batch).module()
    with torch.no_grad():
        assert rms(exported(pixel_values=pixels).logits - logits(fused, pixels)) < flips(fused, pixels)


def test_tracing_and_onnx_take_a_fused_model(tiny_vit, pixels, tmp_path):
    """They record the layers, as PyTorch's own operations."""
    import onnxruntime

    quantizer, model = ViTQuantizer(bits=4, method="channel"), shortened(tiny_vit)
    layers, fused = (quantizer.quantize_model(model, engine=engine) for engine in ("layers", "fused"))
    traced = torch.jit.trace(fused, pixels)
    assert "fairseq::" not in str(traced.inlined_graph)
    expected, bound = logits(layers, pixels), flips(layers, pixels)
    with torch.no_grad():
        assert rms(traced(pixels)[0] - expected) < bound
    torch.onnx.export(fused, (pixels,), str(tmp_path / "vit.onnx"), input_names=["x"], verbose=False)
    (got,) = onnxruntime.InferenceSession(tmp_path / "vit.onnx").run(None, {"x": pixels.numpy()})
    assert rms(torch.from_numpy(got) - expected) < bound
    assert logits(fused, pixels).shape == (5, 7)


def test_a_bare_model(pixels):
    torch.manual_seed(0)
    model = ViTModel(vit_config()).eval()
    fused = ViTQuantizer(bits=8, method="channel").quantize_model(model, engine="fused")
    with torch.no_grad():
        got, expected = fused(pixels).pooler_output, model(pixels).pooler_output
    assert rms(got - expected) ** 2 < rounding_noise(2 * 13) * rms(expected) ** 2


def test_moving_to_another_device_and_back(tiny_vit, pixels, device):
    fused = ViTQuantizer(bits=4, method="channel").quantize_model(tiny_vit, engine="fused")
    expected = logits(fused, pixels)
    there = copy.deepcopy(fused).to(device)
    moved = logits(there, pixels.to(device)).cpu()
    assert rms(moved - expected) < flips(fused, pixels)
    assert torch.equal(logits(there.to("cpu"), pixels), expected)
    meta = copy.deepcopy(fused).to("meta")
    assert all(m.panels is None for m in meta.modules() if isinstance(m, PackedLinear))


def test_fake_tensors_and_modes_get_the_layers(tiny_vit, pixels, monkeypatch):
    """Nothing reads the memory of a fake tensor, which has none; what a mode sees and records is the layers."""
    quantizer = ViTQuantizer(bits=8, method="channel")
    fused, layers = (quantizer.quantize_model(tiny_vit, engine=engine) for engine in ("fused", "layers"))
    expected = logits(fused, pixels)
    calls = count_native(monkeypatch)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = mode.from_tensor(pixels)
            assert fused(fake).logits.shape == (5, 7)
        with FakeCopyMode(mode):
            other = copy.deepcopy(fused)
        assert isinstance(other(fake).logits, FakeTensor)
        graph = make_fx(lambda x: fused(x).logits)(pixels)
        assert torch.equal(graph(pixels), logits(layers, pixels))
    assert calls == [0]
    assert torch.equal(logits(fused, pixels), expected)
    assert calls == [2]


def test_transforms_of_functions_get_the_layers(tiny_vit, pixels, monkeypatch):
    """vmap, grad and jvp of torch.func over pixels, and grad over what is not packed."""
    tiny_vit.config._attn_implementation = "eager"  # PyTorch's function of attention has no derivative forwards
    quantizer = ViTQuantizer(bits=8, method="channel")
    models = [quantizer.quantize_model(tiny_vit, engine=engine).eval() for engine in ("fused", "layers")]
    expected, calls = logits(models[0], pixels), count_native(monkeypatch)
    parameters = {name: tensor.detach() for name, tensor in models[0].named_parameters()}
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(3))

    def results(model):
        def run(x):
            return model(x).logits

        def loss(x):
            return run(x).square().sum()

        def loss_of(parameters):
            return torch.func.functional_call(model, parameters, (pixels,)).logits.square().sum()

        yield torch.func.vmap(lambda x: run(x[None])[0])(pixels)
        yield from torch.func.jvp(run, (pixels,), (direction,))
        yield torch.func.vmap(torch.func.grad(lambda x: loss(x[None])))(pixels)
        yield from torch.func.grad(loss_of)(parameters).values()

    for got, wanted in zip(*map(list, map(results, models)), strict=True):
        assert torch.equal(got, wanted)
    assert calls == [0]
    leaf = pixels.clone().requires_grad_()
    models[1](leaf).logits.square().sum().backward()
    derivative = torch.func.grad(lambda x: models[0](x).logits.square().sum())(pixels)
    assert rms(derivative.detach() - leaf.grad) < 1e-5 * rms(leaf.grad)
    assert torch.equal(logits(models[0], pixels), expected)
