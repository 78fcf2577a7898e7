"""Tiny models with random weights of what is no classifier by itself: depth, segmentation, detection, key points,
feature maps, language models that see, and ViTs of other libraries; and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from families import BLOCK
from torch import Tensor, nn

VIT = {**BLOCK, "image_size": 32, "patch_size": 8}
NECK = {"neck_hidden_sizes": [8, 8], "fusion_hidden_size": 8}
TEXT = {
    **BLOCK,
    "num_key_value_heads": 3,
    "vocab_size": 120,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SWIN = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 12,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 3, 4, 4],
    "window_size": 2,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "out_features": ["stage4"]}
DETECTOR = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_queries": 5,
    "num_labels": 4,
}
IMAGE_TOKEN = 100
WORDS = 4
"""Behind the pictures of a prompt."""


def _dpt() -> nn.Module:
    return hf.DPTForDepthEstimation(
        hf.DPTConfig(**VIT, backbone_out_indices=[0, 1], reassemble_factors=[2, 1], head_in_index=-1, **NECK)
    )


def _depth_anything() -> nn.Module:
    backbone = hf.Dinov2Config(
        **VIT, mlp_ratio=2, out_indices=[1, 2], apply_layernorm=True, reshape_hidden_states=False
    )
    return hf.DepthAnythingForDepthEstimation(
        hf.DepthAnythingConfig(
            backbone_config=backbone,
            patch_size=8,
            reassemble_hidden_size=24,
            reassemble_factors=[2, 1],
            head_hidden_size=8,
            **NECK,
        )
    )


def _segformer() -> nn.Module:
    return hf.SegformerForSemanticSegmentation(
        hf.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 2],
            hidden_sizes=[8, 24],
            num_attention_heads=[1, 3],
            sr_ratios=[2, 1],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            num_labels=5,
        )
    )


def _beit() -> nn.Module:
    config = {**VIT, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "use_relative_position_bias": True}
    return hf.BeitForSemanticSegmentation(hf.BeitConfig(**config, num_labels=5, pool_scales=[1, 2]))


def _upernet() -> nn.Module:
    backbone = hf.SwinConfig(**{**SWIN, "image_size": 32, "patch_size": 2})
    return hf.UperNetForSemanticSegmentation(
        hf.UperNetConfig(
            backbone_config=backbone, hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=48, num_labels=5
        )
    )


def _mask2former() -> nn.Module:
    return hf.Mask2FormerForUniversalSegmentation(
        hf.Mask2FormerConfig(
            backbone_config=hf.SwinConfig(**SWIN),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=24,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            dim_feedforward=24,
            num_queries=5,
            num_labels=4,
        )
    )


def _sam() -> nn.Module:
    picture = {"image_size": 32, "patch_size": 8}
    vision = {
        **BLOCK,
        **picture,
        "output_channels": 16,
        "mlp_dim": 40,
        "window_size": 2,
        "global_attn_indexes": [1],
        "num_pos_feats": 8,
    }
    prompt = {"hidden_size": 16, **picture, "mask_input_channels": 8}
    decoder = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 24, "iou_head_hidden_dim": 16}
    return hf.SamModel(hf.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))


def _detr() -> nn.Module:
    return hf.DetrForObjectDetection(
        hf.DetrConfig(
            **DETECTOR,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=hf.ResNetConfig(**RESNET),
        )
    )


def _rt_detr() -> nn.Module:
    backbone = hf.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return hf.RTDetrForObjectDetection(
        hf.RTDetrConfig(
            backbone_config=backbone,
            encoder_hidden_dim=16,
            encoder_in_channels=[16, 24, 32],
            encoder_ffn_dim=24,
            encoder_attention_heads=2,
            d_model=16,
            decoder_in_channels=[16, 16, 16],
            decoder_ffn_dim=24,
            decoder_attention_heads=2,
            decoder_layers=2,
            num_queries=5,
            num_labels=4,
            num_denoising=0,
        )
    )


def _owl_vit() -> nn.Module:
    text = {**BLOCK, "vocab_size": 120, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 119}
    return hf.OwlViTForObjectDetection(hf.OwlViTConfig(text_config=text, vision_config=VIT, projection_dim=24))


def _backbone(config: Any) -> Callable[[], nn.Module]:
    return lambda: hf.AutoBackbone.from_config(config)


def _vit_pose() -> nn.Module:
    backbone = hf.VitPoseBackboneConfig(
        **{**BLOCK, "image_size": [32, 32], "patch_size": [8, 8], "mlp_ratio": 2, "out_indices": [2]}
    )
    return hf.VitPoseForPoseEstimation(hf.VitPoseConfig(backbone_config=backbone, num_labels=4))


def _torchvision(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(**settings, num_classes=7)

    return make


def _open_clip() -> nn.Module:
    import open_clip

    return open_clip.CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8, "mlp_ratio": 2},
        text_cfg={"context_length": 16, "vocab_size": 120, "width": 24, "heads": 3, "layers": 2},
    )


def _llava() -> nn.Module:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VIT),
            text_config=hf.LlamaConfig(**TEXT),
            image_token_id=IMAGE_TOKEN,
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-1,
        )
    )


def _pali_gemma() -> nn.Module:
    vision = hf.SiglipVisionConfig(**VIT, projection_dim=24, vision_use_head=False)
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            vision_config=vision,
            text_config=hf.GemmaConfig(**TEXT, head_dim=8),
            image_token_id=IMAGE_TOKEN,
            image_token_index=IMAGE_TOKEN,
            projection_dim=24,
            hidden_size=24,
        )
    )


def _smol_vlm() -> nn.Module:
    return hf.SmolVLMForConditionalGeneration(
        hf.SmolVLMConfig(
            vision_config=VIT,
            text_config=hf.LlamaConfig(**TEXT),
            image_token_id=IMAGE_TOKEN,
            scale_factor=2,
            pad_token_id=0,
        )
    )


def _intern_vl() -> nn.Module:
    vision = hf.InternVLVisionConfig(
        **{**VIT, "image_size": [32, 32], "patch_size": [8, 8], "layer_scale_init_value": 0.7}
    )
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE_TOKEN, downsample_ratio=0.5
        )
    )


def _qwen_vl(name: str, **vision: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(hf, f"{name}Config")(
            vision_config={
                "depth": 2,
                "hidden_size": 24,
                "num_heads": 3,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                **vision,
            },
            text_config={**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            image_token_id=IMAGE_TOKEN,
            video_token_id=101,
            vision_start_token_id=102,
            vision_end_token_id=103,
        )
        return getattr(hf, f"{name}ForConditionalGeneration")(config)

    return make


class Kind(NamedTuple):
    """One architecture.

    Attributes:
        make: builds it.
        vision: pattern of the layers that are quantized.
        side: of its pictures.
        fused: how many blocks run as one native call.
        image_tokens: of a language model, how many stand for one picture.
    """

    make: Callable[[], nn.Module]
    vision: str
    side: int = 32
    fused: int = 0
    image_tokens: int = 0


ENCODER = r"encoder\.layers?\.\d+\.|\.layers?\.\d+\.|^layers\.\d+\."
TOWER = r"vision_tower\.(vision_model\.)?encoder\.layers?\.\d+\.|multi_modal_projector"
KINDS: dict[str, Kind] = {
    "dpt": Kind(_dpt, r"^dpt\.", fused=2),
    "depth-anything": Kind(_depth_anything, r"^backbone\.", fused=2),
    "segformer": Kind(_segformer, r"^segformer\.|^decode_head\.", 64),
    "beit-segmentation": Kind(_beit, r"^beit\.", fused=4),
    "upernet": Kind(_upernet, r"^backbone\.", fused=4),
    "mask2former": Kind(_mask2former, r"^model\.pixel_level_module\.encoder\.", 64, fused=4),
    "sam": Kind(_sam, r"^vision_encoder\."),
    "yolos": Kind(
        lambda: hf.YolosForObjectDetection(
            hf.YolosConfig(**{**VIT, "image_size": [32, 32]}, num_detection_tokens=6, num_labels=4)
        ),
        r"^vit\.|^class_labels_classifier\.|^bbox_predictor\.",
        fused=2,
    ),
    "detr": Kind(_detr, r"^model\.(en|de)coder\.|^class_labels_classifier|^bbox_predictor\.", 64),
    "rt-detr": Kind(_rt_detr, r"^model\.decoder\.", 64),
    "owl-vit": Kind(_owl_vit, r"^owlvit\.vision_model\.|^owlvit\.visual_projection|^(class|box)_head\.", fused=2),
    "backbone-dinov2": Kind(_backbone(hf.Dinov2Config(**VIT, mlp_ratio=2, out_indices=[1, 2])), ENCODER, fused=2),
    "backbone-vitdet": Kind(
        _backbone(
            hf.VitDetConfig(
                **{**VIT, "patch_size": 4},
                mlp_ratio=2,
                pretrain_image_size=32,
                window_size=4,
                window_block_indices=[0],
                use_relative_position_embeddings=True,
                out_indices=[1, 2],
            )
        ),
        ENCODER,
    ),
    "vitpose": Kind(_vit_pose, r"^backbone\.", fused=2),
    "torchvision-vit": Kind(
        _torchvision(
            "VisionTransformer", image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=40
        ),
        r"^encoder\.layers\.|^heads\.head$",
        fused=2,
    ),
    "torchvision-swin": Kind(
        _torchvision(
            "SwinTransformer", patch_size=[4, 4], embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=[2, 2]
        ),
        r"\.mlp\.|\.reduction$|^head$",
    ),
    "open-clip": Kind(_open_clip, r"^visual\.", fused=2),
    "llava": Kind(_llava, TOWER, fused=2, image_tokens=16),
    "paligemma": Kind(_pali_gemma, TOWER, fused=2, image_tokens=16),
    "internvl": Kind(_intern_vl, TOWER, fused=2, image_tokens=4),
    "smolvlm": Kind(_smol_vlm, r"^model\.(vision_model\.encoder|connector)\.", fused=2, image_tokens=4),
    "qwen2-vl": Kind(
        _qwen_vl("Qwen2VL", embed_dim=24, mlp_ratio=2), r"^model\.visual\.(blocks|merger)\.", image_tokens=16
    ),
    "qwen2.5-vl": Kind(
        _qwen_vl("Qwen2_5_VL", out_hidden_size=24, intermediate_size=40, window_size=16, fullatt_block_indexes=[1]),
        r"^model\.visual\.(blocks|merger)\.",
        image_tokens=16,
    ),
}
NAMES = list(KINDS)
SPEAKING = [name for name, kind in KINDS.items() if kind.image_tokens]


def pictures(name: str, count: int = 3, seed: int = 1) -> Tensor:
    """(count, 3, side, side)."""
    side = KINDS[name].side
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def prompts(name: str, count: int = 3) -> dict[str, Tensor]:
    """Of a language model: for each picture as many tokens as stand for it, and a few words."""
    tokens = KINDS[name].image_tokens
    words = torch.randint(3, 90, (count, WORDS), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([torch.full((count, tokens), IMAGE_TOKEN), words], 1)
    if name.startswith("qwen"):
        ids = torch.cat([torch.full((count, 1), 102), ids[:, :tokens], torch.full((count, 1), 103), words], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.startswith("qwen") and int(hf.__version__.partition(".")[0]) > 4:
        given["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    return given


def build(name: str) -> nn.Module:
    """The model of that name: weights large enough to matter, biases that are not zero; in eval mode."""
    torch.manual_seed(0)
    model = KINDS[name].make()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.ndim == 2 and "position" not in key:
                parameter.normal_(std=0.15)
            elif parameter.ndim == 4:
                parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5)
    return model.eval()
