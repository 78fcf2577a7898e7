"""Random small configurations of every family, and ways to quantize and to take them away, for hypothesis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import timm
import torch
import transformers
from families import with_weights
from torch import Tensor, nn

from fairseq.quantization.export.export import FORMATS

ACTIVATIONS = ["gelu", "gelu_new", "quick_gelu", "gelu_pytorch_tanh", "relu", "silu"]
DTYPES = ["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class RandomModel:
    """What makes one model, and what is done with it: its repr is all that it takes to make it again.

    Attributes:
        model: a class of transformers, or a model of timm.
        config: the class of its configuration; None of timm.
        settings: of the configuration, or of timm's model.
        size: of a picture, (channels, height, width).
        attention: "eager" or "sdpa"; of transformers.
        dtype: of weights and pictures, by name.
        seed: of weights and pictures.
        batch: number of pictures.
        quantizer: arguments of ViTQuantizer.
        calibration: the number of pictures that calibrate it; 0 for none.
        saved: as a "file" or a "folder".
        export: one of its formats, or None.
    """

    model: str
    config: str | None
    settings: dict[str, Any]
    size: tuple[int, int, int]
    attention: str
    dtype: str
    seed: int
    batch: int
    quantizer: dict[str, Any]
    calibration: int
    saved: str
    export: str | None

    def build(self) -> nn.Module:
        """The float model, in eval mode."""
        torch.manual_seed(self.seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self.dtype))  # as from_pretrained does: buffers have dtypes of their own
        try:
            if self.config is None:
                return with_weights(timm.create_model(self.model, pretrained=False, **self.settings))
            config = getattr(transformers, self.config)(**self.settings)
            config._attn_implementation = self.attention
            return with_weights(getattr(transformers, self.model)(config))
        finally:
            torch.set_default_dtype(before)

    def pictures(self, count: int, seed: int = 0) -> Tensor:
        """(count, channels, height, width)."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        return torch.randn(count, *self.size, generator=generator).to(getattr(torch, self.dtype))


@st.composite
def random_models(draw: st.DrawFn) -> RandomModel:
    """Any model of a known family, as it may be configured, quantized in any way that its family takes."""
    model, config, settings, size = draw(st.one_of(_plain(), _beit(), _dinov3(), _swin(), _clip(), _timm()))
    towers = "text_config" in settings
    return RandomModel(
        model=model,
        config=config,
        settings=settings,
        size=size,
        attention="eager" if config in ("SwinConfig", "Swinv2Config") else draw(st.sampled_from(["sdpa", "eager"])),
        dtype=draw(st.sampled_from([*DTYPES[:1] * 3, *DTYPES])),
        seed=draw(st.integers(0, 1000)),
        batch=draw(st.integers(1, 4)),
        saved="file" if config is None else draw(st.sampled_from(["file", "folder"])),
        export=None if towers or draw(st.integers(0, 19)) else draw(st.sampled_from(sorted(set(FORMATS) - {"c"}))),
        **draw(_quantizers()),
    )


@st.composite
def _quantizers(draw: st.DrawFn) -> dict[str, Any]:
    flag, bits = st.booleans(), st.integers(2, 8)
    calibration = draw(st.sampled_from([0, 0, 3]))
    activations = draw(st.sampled_from(["dynamic", None, "static"] if calibration else ["dynamic", "dynamic", None]))
    quantizer: dict[str, Any] = {
        "bits": draw(bits),
        "method": draw(st.sampled_from(["channel", "tensor", "histogram"])),
        "activations": activations,
        "activation_bits": 8 if activations is None else draw(st.sampled_from([8, 8, 8, 4, 3])),
        "symmetric": draw(flag),
        "equalize": draw(flag),
        "quantize_embeddings": draw(flag),
        "weight_storage": draw(st.sampled_from(["packed", "unpacked"])),
        "p": draw(st.sampled_from([1.0, 1.0, 0.5])),
        "rounding": draw(st.sampled_from(["auto", "gptq", "gptaq", "coordinate"] if calibration else ["auto"])),
        "bias_correction": draw(st.sampled_from([False, True, "add"])) if calibration else False,
    }
    if quantizer["method"] != "tensor":
        quantizer["group_size"] = draw(st.sampled_from([None, None, 32, 40]))
    if draw(flag):
        quantizer["overrides"] = {"*.0.*": {"bits": draw(bits)}}
    return {"quantizer": quantizer, "calibration": calibration}


def _block(draw: st.DrawFn, head_dims: tuple[int, ...] = (2, 4, 5, 6, 8, 12, 16)) -> dict[str, Any]:
    """Of any width: odd ones, one head, one channel of an MLP."""
    heads = draw(st.integers(1, 4))
    return {
        "num_attention_heads": heads,
        "hidden_size": heads * draw(st.sampled_from(head_dims)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "intermediate_size": draw(st.integers(1, 70)),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-6, 1e-3])),
    }


def _picture(draw: st.DrawFn, square: bool = False) -> tuple[dict[str, Any], tuple[int, int, int]]:
    patch, channels = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    height, width = patch * height, patch * (height if square else width)
    side = height if height == width else (height, width)
    return {"image_size": side, "patch_size": patch, "num_channels": channels}, (channels, height, width)


@st.composite
def _plain(draw: st.DrawFn) -> tuple[str, str, dict[str, Any], tuple[int, int, int]]:
    """ViT, DeiT, ViT-MSN, ViT-MAE, DINOv2: tokens of a grid, a class token, blocks."""
    model, config = draw(
        st.sampled_from([
            ("ViTForImageClassification", "ViTConfig"),
            ("ViTModel", "ViTConfig"),
            ("DeiTForImageClassification", "DeiTConfig"),
            ("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
            ("ViTMSNForImageClassification", "ViTMSNConfig"),
            ("ViTMAEModel", "ViTMAEConfig"),
            ("Dinov2ForImageClassification", "Dinov2Config"),
            ("Dinov2Model", "Dinov2Config"),
            ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"),
        ])
    )  # fmt: skip
    picture, size = _picture(draw, square=config.startswith(("ViTMAE", "Dinov2")))
    settings = {**_block(draw), **picture, "qkv_bias": draw(st.booleans()), "num_labels": draw(st.integers(1, 9))}
    if config == "ViTMAEConfig":
        settings["mask_ratio"] = 0.0
    if config.startswith("Dinov2"):
        del settings["intermediate_size"]
        settings |= {
            "mlp_ratio": draw(st.integers(1, 4)),
            "use_swiglu_ffn": draw(st.booleans()),
            "layerscale_value": draw(st.sampled_from([1.0, 0.1])),
        }
    if config == "Dinov2WithRegistersConfig":
        settings["num_register_tokens"] = draw(st.integers(1, 4))
    return model, config, settings, size


@st.composite
def _beit(draw: st.DrawFn) -> tuple[str, str, dict[str, Any], tuple[int, int, int]]:
    picture, size = _picture(draw, square=True)
    bias = draw(st.sampled_from(["use_relative_position_bias", "use_shared_relative_position_bias", "neither"]))
    settings = {
        **_block(draw),
        **picture,
        "num_labels": draw(st.integers(1, 9)),
        "vocab_size": 30,
        "use_absolute_position_embeddings": draw(st.booleans()),
        "use_mean_pooling": draw(st.booleans()),
        "layer_scale_init_value": draw(st.sampled_from([0.0, 0.1])),
    }
    if bias != "neither":
        settings[bias] = True
    return draw(st.sampled_from(["BeitForImageClassification", "BeitModel"])), "BeitConfig", settings, size


@st.composite
def _dinov3(draw: st.DrawFn) -> tuple[str, str, dict[str, Any], tuple[int, int, int]]:
    picture, size = _picture(draw, square=True)
    settings = {
        **_block(draw, head_dims=(4, 8, 12, 16)),  # turned in fours
        **picture,
        "num_register_tokens": draw(st.integers(0, 4)),
        **{name: draw(st.booleans()) for name in ("use_gated_mlp", "query_bias", "key_bias", "value_bias", "mlp_bias")},
        "layerscale_value": draw(st.sampled_from([1.0, 0.1])),
    }
    return "DINOv3ViTModel", "DINOv3ViTConfig", settings, size


@st.composite
def _swin(draw: st.DrawFn) -> tuple[str, str, dict[str, Any], tuple[int, int, int]]:
    """Stages, of windows that the picture need not be divisible by: they are padded."""
    name, stages, width = draw(st.sampled_from(["Swin", "Swinv2"])), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    window = draw(st.integers(2, 4))
    patch, side, channels = (
        draw(st.integers(1, 3)),
        draw(st.integers(2 ** (stages - 1) * window, 9)),
        draw(st.integers(1, 4)),
    )
    settings = {
        "image_size": patch * side,
        "patch_size": patch,
        "num_channels": channels,
        "embed_dim": 4 * width,
        "depths": [draw(st.integers(1, 2)) for _ in range(stages)],
        "num_heads": [draw(st.sampled_from([1, 2])) * 2**stage for stage in range(stages)],
        "window_size": window,
        "mlp_ratio": draw(st.sampled_from([1.0, 2.0, 4.0])),
        "qkv_bias": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "num_labels": draw(st.integers(1, 9)),
    }
    model = draw(st.sampled_from([f"{name}ForImageClassification", f"{name}Model"]))
    return model, f"{name}Config", settings, (channels, patch * side, patch * side)


@st.composite
def _clip(draw: st.DrawFn) -> tuple[str, str, dict[str, Any], tuple[int, int, int]]:
    """CLIP and SigLIP, one tower or both behind a classifier."""
    model, config = draw(
        st.sampled_from([
            ("CLIPVisionModel", "CLIPVisionConfig"),
            ("CLIPVisionModelWithProjection", "CLIPVisionConfig"),
            ("SiglipVisionModel", "SiglipVisionConfig"),
            ("CLIPForImageClassification", "CLIPConfig"),
            ("SiglipForImageClassification", "SiglipConfig"),
        ])
    )  # fmt: skip
    picture, size = _picture(draw, square=True)
    settings = {**_block(draw), **picture}
    if config == "CLIPVisionConfig":
        settings["projection_dim"] = draw(st.integers(1, 20))
    if not config.endswith("VisionConfig"):
        text = {**_block(draw), "vocab_size": 20, "max_position_embeddings": 6, "projection_size": 8}
        settings = {"vision_config": settings, "text_config": text, "num_labels": draw(st.integers(1, 9))}
    return model, config, settings, size


@st.composite
def _timm(draw: st.DrawFn) -> tuple[str, None, dict[str, Any], tuple[int, int, int]]:
    name = draw(st.sampled_from(["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224"]))
    picture, size = _picture(draw)
    heads = draw(st.integers(1, 4))
    settings: dict[str, Any] = {
        "img_size": picture["image_size"],
        "patch_size": picture["patch_size"],
        "in_chans": picture["num_channels"],
        "num_heads": heads,
        "embed_dim": heads * draw(st.sampled_from([2, 4, 5, 8, 16])),
        "depth": draw(st.integers(1, 2)),
        "mlp_ratio": draw(st.sampled_from([1, 2, 4])),
        "qkv_bias": draw(st.booleans()),
        "num_classes": draw(st.integers(0, 9)),
        "init_values": draw(st.sampled_from([None, 0.1])),
    }
    if name.startswith("vit"):
        settings |= {
            "qk_norm": draw(st.booleans()),
            "reg_tokens": draw(st.integers(0, 3)),
            "global_pool": draw(st.sampled_from(["token", "avg"])),
            "no_embed_class": draw(st.booleans()),
            "pre_norm": draw(st.booleans()),
        }
    return name, None, settings, size
