"""What a model does, not what its layers are called, decides what is calibrated and rescaled together."""

import copy

import pytest
import torch
import transformers
from families import build
from torch import nn

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.architectures.layers import linear_layers
from fairseq.quantization.conversion import quantize_stage

pytestmark = pytest.mark.filterwarnings("ignore:calibrating on", "ignore:.*is of no known family")


def noise(count, size=16, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def unit(model):
    """Weights that keep the size of what goes through."""
    torch.manual_seed(1)
    for layer in linear_layers(model).values():
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return model.eval()


def detr():
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"], layer_type="basic"
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, num_queries=5, num_labels=4,
    )  # fmt: skip
    return unit(transformers.DetrForObjectDetection(config))


def segformer():
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[2, 1], sr_ratios=[4, 2], hidden_sizes=[16, 32], num_attention_heads=[2, 4],
        patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2],
    )  # fmt: skip
    return unit(transformers.SegformerForImageClassification(config))


def pvt():
    config = transformers.PvtConfig(
        image_size=32, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2]
    )
    return unit(transformers.PvtForImageClassification(config))


@pytest.mark.parametrize("make", [detr, segformer, pvt], ids=lambda make: make.__name__)
def test_each_layer_is_rounded_by_what_it_reads(make, monkeypatch):
    """The statistics of every layer are those of its own input, whatever query, key and value are called."""
    model, images = make(), noise(4, 32)
    moments = {}
    rounding = quantize_stage.quantize_layer

    def recording(weight, bias, statistics, settings, name, rounded):
        moments[name] = statistics.second_moment
        return rounding(weight, bias, statistics, settings, name, rounded)

    monkeypatch.setattr(quantize_stage, "quantize_layer", recording)
    monkeypatch.setattr("fairseq.quantization.calibration.token_weights.UNIFORM_SHARE", 1.0)
    ViTQuantizer(bits=8, method="channel", rounding="gptq").quantize_model(model, calibration=images)
    inputs = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, name=name: inputs.update({name: a[0].detach().flatten(0, -2)})
        )
        for name in moments
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    assert len(moments) > 8
    for name, moment in moments.items():
        x = inputs[name].double()
        expected = x.T @ x / len(x)
        # 8 bits before it: 1e-2 of the input is off; the moments of another tensor are off by their own size
        assert torch.linalg.vector_norm(moment - expected) <= 0.1 * torch.linalg.vector_norm(expected), name


def test_a_layer_that_pictures_do_not_reach_is_rounded_without_them(tiny_vit):
    tiny_vit.vit.pooler = None
    tiny_vit.extra = nn.ModuleList([nn.Linear(24, 24)])
    tiny_vit.classifier = nn.Sequential(nn.Linear(24, 7))
    spare = copy.deepcopy(tiny_vit.get_submodule(next(iter(linear_layers(tiny_vit)))))
    (tiny_vit.vit.encoder.layer if hasattr(tiny_vit.vit, "encoder") else tiny_vit.vit.layers)[0].spare = nn.ModuleDict(
        {"attention": nn.ModuleDict({"q_proj": spare})}
    )
    quantizer = ViTQuantizer(bits=4, method="channel", quantize_classifier=False)
    quantizer.quantize_model(tiny_vit, calibration=noise(8))
    notes = {layer.name: (layer.rounding, layer.note) for layer in quantizer.report.quantized}
    missed = [name for name, (_, note) in notes.items() if note == "not calibrated: pictures do not reach it"]
    assert len(missed) == 1
    assert "spare" in missed[0]
    assert notes[missed[0]][0] == "nearest"
    assert {rounding for name, (rounding, _) in notes.items() if name not in missed} == {"coordinate"}


def with_adapters(model):
    torch.manual_seed(2)
    holder = model.vit.encoder.layer if hasattr(model.vit, "encoder") else model.vit.layers
    for block in holder:
        name = "mlp" if hasattr(block, "mlp") else "intermediate"
        inner = getattr(block, name)
        first = inner.fc1 if hasattr(inner, "fc1") else inner.dense
        branch = nn.Linear(24, first.out_features if name == "intermediate" else 24)

        def add(module, args, output, branch=branch):
            return output + branch(args[0])

        block.branch = branch
        inner.register_forward_hook(add)
    return model


@pytest.mark.parametrize("settings", [{"method": "tensor"}, {"method": "channel", "activations": "static"}], ids=str)
def test_a_norm_with_another_reader_is_not_rescaled(tiny_vit, settings):
    """The adapter goes on reading what it read; the layers that would have gained multiply their input themselves."""
    model, images = with_adapters(tiny_vit), noise(8)
    quantized = ViTQuantizer(bits=8, **settings).quantize_model(model, calibration=images)
    before, after = model.state_dict(), quantized.state_dict()
    norms = [name for name in before if "layernorm_after" in name or "layernorm_before" in name]
    assert len(norms) == 8
    assert all(torch.equal(before[name], after[name]) for name in norms)
    own = [n for n, m in quantized.named_modules() if isinstance(m, PackedLinear) and m.input_factor is not None]
    assert any(name.endswith(("fc1", "intermediate.dense")) for name in own)
    with torch.no_grad():
        expected, got = model(images).logits, quantized(images).logits
    assert (got - expected).square().mean() < 1e-3 * expected.square().mean()


def test_a_norm_that_two_blocks_share_is_not_rescaled():
    model = build("vit")
    blocks = model.vit.encoder.layer if hasattr(model.vit, "encoder") else model.vit.layers
    blocks[1].layernorm_after = blocks[0].layernorm_after
    quantized = ViTQuantizer(bits=8, method="tensor").quantize_model(model)
    name = f"{'vit.encoder.layer' if hasattr(model.vit, 'encoder') else 'vit.layers'}.0.layernorm_after.weight"
    assert torch.equal(quantized.state_dict()[name], model.state_dict()[name])
    with torch.no_grad():
        expected, got = model(noise(6)).logits, quantized(noise(6)).logits
    assert (got - expected).square().mean() < 1e-2 * expected.square().mean()
