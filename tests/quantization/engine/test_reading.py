"""What is read of a block: every option of its class, or the part that cannot be expressed."""

import families
import pytest
import torch
import transformers
from known_blocks import by_reference, first, known, known_blocks, run
from torch import nn

from fairseq.quantization.engine.reading import read

timm = pytest.importorskip("timm")
from timm.layers import GluMlp, RmsNorm, SwiGLU, SwiGLUPacked  # noqa: E402
from timm.models import beit, eva, vision_transformer  # noqa: E402

ROUNDINGS = {"rtol": 1e-11, "atol": 1e-11}  # as in test_reference_block
TOKENS, WIDTH, HEADS = 17, 24, 3
ROPE = {"rope": torch.randn(TOKENS - 1, 2 * WIDTH // HEADS, dtype=torch.float64)}


def filled(block):
    """With parameters that matter, in float64."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.5))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return block.double().eval()


TIMM = {
    "norms of queries and keys": (vision_transformer.Block, {"qk_norm": True, "qkv_bias": True}, {}),
    "LayerScale": (vision_transformer.Block, {"init_values": 0.1, "drop_path": 0.3}, {}),
    "norms within": (vision_transformer.Block, {"scale_attn_norm": True, "scale_mlp_norm": True}, {}),
    "RMSNorm": (vision_transformer.Block, {"norm_layer": RmsNorm, "qk_norm": True}, {}),
    "SiLU": (vision_transformer.Block, {"act_layer": nn.SiLU, "proj_bias": False}, {}),
    "gate in a layer": (vision_transformer.Block, {"mlp_layer": SwiGLU, "scale_mlp_norm": True}, {}),
    "halves": (vision_transformer.Block, {"mlp_layer": SwiGLUPacked}, {}),
    "mask": (vision_transformer.Block, {}, {"attn_mask": torch.ones(1, 1, TOKENS, TOKENS).tril().bool()}),
    "own bias": (beit.Block, {"window_size": (4, 4), "qkv_bias": True, "init_values": 0.1}, {}),
    "shared bias": (beit.Block, {"qkv_bias": True},
                    {"shared_rel_pos_bias": torch.randn(1, HEADS, TOKENS, TOKENS, dtype=torch.float64)}),
    "both": (beit.Block, {"window_size": (4, 4), "swiglu_mlp": True, "scale_mlp": True},
             {"shared_rel_pos_bias": torch.randn(1, HEADS, TOKENS, TOKENS, dtype=torch.float64)}),
    "EVA": (eva.EvaBlock, {"swiglu_mlp": True}, ROPE),
    "EVA-02": (eva.EvaBlock, {"swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "qkv_fused": False},
               ROPE),
    "EVA by halves": (eva.EvaBlock, {"rotate_half": True, "init_values": 0.1, "qk_norm": True}, ROPE),
    "EVA without positions": (eva.EvaBlock, {"attn_only_layer_scale": True, "init_values": 0.1}, {}),
    "EVA, other attention": (eva.EvaBlock, {"attn_type": "rope", "qkv_bias": True, "num_prefix_tokens": 1}, ROPE),
}  # fmt: skip


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", TIMM)
def test_options_of_timm(name, fused):
    kind, settings, given = TIMM[name]
    block = filled(kind(WIDTH, num_heads=HEADS, **settings))
    block.attn.fused_attn = fused
    block.attn.scale *= 2  # which PyTorch's own function is not told
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x, **given)
    torch.testing.assert_close(by_reference(block, (x,), given), expected, **ROUNDINGS)


def test_a_token_that_may_attend_to_nothing_is_for_the_layers():
    """What a softmax of nothing is, each function decides for itself."""
    block, x = filled(vision_transformer.Block(WIDTH, num_heads=HEADS)), torch.randn(2, TOKENS, WIDTH).double()
    for mask in (torch.ones(1, 1, TOKENS, TOKENS).bool(), torch.zeros(2, 1, TOKENS, TOKENS)):
        assert by_reference(block, (x,), {"attn_mask": mask}) is not None
        mask[-1, 0, 3] = False if mask.dtype == torch.bool else -torch.inf
        assert by_reference(block, (x,), {"attn_mask": mask}) is None


class Attention(nn.Module):
    """Someone's, which is handed in."""

    def __init__(self, dim, num_heads, **_):
        super().__init__()
        self.num_heads, self.scale = num_heads, 1.0
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.gate = nn.Linear(dim, dim)


REFUSED = {
    "gate of attention": (eva.EvaBlock, {"gated_attn": True}, "its attention has a gate"),
    "fewer keys": (eva.EvaBlock, {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1},
                   r"its key layer is of 24 x 8, not 24 x 24"),
    "the second half": (vision_transformer.Block, {"mlp_layer": GluMlp}, "its MLP multiplies the first half"),
    "activation": (vision_transformer.Block, {"act_layer": nn.Mish}, "its activation is none of gelu, gelu_tanh"),
    "norm": (vision_transformer.Block, {"norm_layer": lambda dim, **_: nn.BatchNorm1d(dim)},
             "its norm1 is a BatchNorm1d"),
    "attention": (vision_transformer.Block, {"attn_layer": Attention}, "its attention has a gate"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_said(name):
    kind, settings, reason = REFUSED[name]
    block = kind(WIDTH, num_heads=HEADS, **settings).eval()
    found = read(block, known(block))
    assert isinstance(found, str)
    assert found.startswith(reason)


def _transformers(model, config, **settings):
    picture = {"vocab_size": 30} if model.startswith("Beit") else {}
    return getattr(transformers, model)(getattr(transformers, config)(**{**families.VIT, **picture, **settings}))


SWIN = families.SWIN
OPTIONS = {
    "two biases": lambda: _transformers("BeitModel", "BeitConfig", use_relative_position_bias=True,
                                        use_shared_relative_position_bias=True, drop_path_rate=0.2),
    "Data2Vec": lambda: _transformers("Data2VecVisionModel", "Data2VecVisionConfig", use_relative_position_bias=True),
    "no biases": lambda: _transformers("ViTModel", "ViTConfig", qkv_bias=False, hidden_act="quick_gelu"),
    "drop path": lambda: _transformers("Dinov2Model", "Dinov2Config", mlp_ratio=2, drop_path_rate=0.3,
                                        hidden_act="relu"),
    "giant with registers": lambda: _transformers("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2,
                                                  use_swiglu_ffn=True),
    "tanh": lambda: _transformers("CLIPVisionModel", "CLIPVisionConfig", hidden_act="gelu_pytorch_tanh"),
    "Swin": lambda: transformers.SwinModel(transformers.SwinConfig(**{**SWIN, "qkv_bias": False, "window_size": 3})),
    "SwinV2": lambda: transformers.Swinv2Model(transformers.Swinv2Config(
        **{**SWIN, "window_size": 5, "pretrained_window_sizes": [3, 3], "qkv_bias": False})),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_transformers(name):
    model = filled(OPTIONS[name]())
    calls = run(model, pixel_values=families.pictures(2).double())
    assert len(calls) == len(known_blocks(model)) > 0
    for _, block, args, kwargs, output in calls:
        torch.testing.assert_close(by_reference(block, args, kwargs), first(output), **ROUNDINGS)


class Squared(nn.Module):
    """Not a LayerScale, though it has the parameter of one."""

    def __init__(self, scale):
        super().__init__()
        self.lambda1 = scale.lambda1

    def forward(self, x):
        return x * self.lambda1 * self.lambda1


def test_a_scale_is_known_by_what_it_computes():
    model = _transformers("Dinov2Model", "Dinov2Config", mlp_ratio=2, layerscale_value=0.7)
    block = next(iter(known_blocks(model).values()))
    assert read(block, known(block)).scale1 is block.layer_scale1.lambda1
    block.layer_scale1 = Squared(block.layer_scale1)
    assert read(block, known(block)) == "its layer_scale1 does not multiply by its parameter"
