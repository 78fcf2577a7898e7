"""Blocks of every family as native ones: what is passed in, and comes out."""

import copy

import families
import pytest
import torch
from bounds import rms
from known_blocks import inputs, known_blocks, run
from torch import nn

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed.kernels import native
from fairseq.quantization.engine import check, native_block
from fairseq.quantization.engine.fused_block import FusedBlock

pytestmark = pytest.mark.skipif(not native.levels(), reason=native.NOT_BUILT)


@pytest.fixture
def calls(monkeypatch):
    """The calls that reach the native block."""
    seen, run_native = [], native_block.NativeBlock.run

    def record(self, x, call):
        seen.append(call)
        return run_native(self, x, call)

    monkeypatch.setattr(native_block.NativeBlock, "run", record)
    monkeypatch.setattr(check, "_checked", {})
    return seen


def quantized(name, **settings):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model, quantizer = families.build(name), ViTQuantizer(bits=8, method="channel", towers="all", **settings)
    layers = quantizer.quantize_model(model, engine="layers")
    return layers, quantizer.optimize(layers)


def items(output):
    return output if isinstance(output, tuple) else (output,)


def assert_alike(got, expected, x):
    """The same structure; and as near as the reference of a block is to it, but for a few roundings to the other side."""
    assert type(got) is type(expected)
    assert [item is None for item in items(got)] == [item is None for item in items(expected)]
    assert items(got)[0].dtype == items(expected)[0].dtype
    assert rms(items(got)[0] - items(expected)[0]) < 0.02 * rms(items(expected)[0] - x)


@pytest.mark.parametrize("name", families.NAMES)
def test_every_known_block_is_fused(name, calls):
    layers, fused = quantized(name)
    known = known_blocks(layers)
    assert {name for name, module in fused.named_modules() if isinstance(module, FusedBlock)} == set(known)
    calls.clear()
    given = inputs(layers, name)
    seen, expected = run(fused, **given), run(layers, **given)
    assert len(calls) == len(expected) == len(known)
    for (name, block, args, kwargs, output), (_, plain, _, _, _) in zip(seen, expected, strict=True):
        with torch.no_grad():
            assert_alike(output, plain(*args, **kwargs), args[0])


@pytest.mark.parametrize("name", ["beit", "swin", "swinv2", "dinov2", "dinov3", "timm-beit", "timm-eva"])
def test_whatever_changes_in_place_is_seen(name, calls):
    """A tensor that a table or a copy was made of, or that is read where it is."""
    layers, fused = quantized(name)
    given = inputs(layers, name)
    block, plain = (run(model, **given)[1] for model in (fused, layers))
    args, kwargs = block[2:4]
    paths = [path for path, _ in block[1].named_parameters()]
    assert paths
    for path in paths:
        with torch.no_grad():
            before = items(block[1](*args, **kwargs))[0]
            for owner in (block[1], plain[1]):
                parameter = owner.get_parameter(path)
                parameter.copy_(parameter * 1.5 + torch.linspace(0.2, 0.9, parameter.numel()).view_as(parameter))
            calls.clear()
            got, expected = block[1](*args, **kwargs), plain[1](*args, **kwargs)
        assert len(calls) == 1, path
        assert not torch.equal(items(got)[0], before), path
        assert_alike(got, expected, args[0])


def test_tables_are_made_once(calls, monkeypatch):
    for name in ("beit", "swin", "swinv2", "timm-beit", "timm-eva"):
        layers, fused = quantized(name)
        given = inputs(layers, name, 2)
        run(fused, **given)
        calls.clear()
        run(fused, **given)
        run(fused, **given)
        first, second = calls[: len(calls) // 2], calls[len(calls) // 2 :]
        tables = [(call.rows, call.bias, call.mask) for call in first]
        if name != "timm-eva":
            assert any(table is not None for table in tables[0])
            for kept, other in zip(tables, second, strict=True):
                for a, b in zip(kept, (other.rows, other.bias, other.mask)):
                    assert (a is None and b is None) or a.data_ptr() == b.data_ptr()
        else:
            assert len({call.cos.data_ptr() for call in calls}) == 1  # of all blocks and calls


@pytest.mark.parametrize("name", ["beit-shared-bias", "dinov3", "swin"])
def test_gradients_are_those_of_the_layers(name, calls):
    layers, fused = quantized(name, quantize_classifier=False)
    given, found = inputs(layers, name), []
    for model in (fused, layers):
        for parameter in model.parameters():
            parameter.grad = None
        output = model(**given)
        (getattr(output, "logits", None) if hasattr(output, "logits") else output.last_hidden_state).sum().backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        assert torch.linalg.vector_norm(gradient - found[1][key]) <= 0.05 * torch.linalg.vector_norm(found[1][key]), key


def test_copies_keep_their_own(calls):
    layers, fused = quantized("swin")
    given = inputs(layers, "swin")
    expected = [items(output)[0] for *_, output in run(fused, **given)]
    other = copy.deepcopy(fused)
    assert all(torch.equal(items(a[-1])[0], b) for a, b in zip(run(other, **given), expected, strict=True))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "bias_table" in name:
                parameter.add_(torch.randn_like(parameter))
    assert not torch.equal(items(run(other, **given)[0][-1])[0], expected[0])
    assert all(torch.equal(items(a[-1])[0], b) for a, b in zip(run(fused, **given), expected, strict=True))


def test_what_the_native_block_does_not_know_runs_by_layers(calls):
    layers, fused = quantized("dinov3")
    seen = run(fused, **inputs(layers, "dinov3"))
    _, block, (x, *_), kwargs, output = seen[0]
    names = [name for name in kwargs if name != "position_embeddings"]
    rest = {name: kwargs[name] for name in names}
    cos, sin = kwargs["position_embeddings"]
    calls.clear()
    with torch.no_grad():
        again = block(x, position_embeddings=(cos[None, None], sin[None, None]), **rest)  # the same, in four dimensions
    assert not calls
    assert rms(again - output) < 0.02 * rms(output - x)
    nn.init.zeros_(block.layer_scale1.lambda1)
    with torch.no_grad():
        block(x, **kwargs)
    assert len(calls) == 1
