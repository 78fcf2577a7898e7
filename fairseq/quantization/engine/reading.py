"""read: the BlockSpec of an encoder block, as its parts are now, or which part no BlockSpec expresses."""

from __future__ import annotations

import math
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.architectures.blocks import BlockClass, layer_paths
from fairseq.quantization.engine.reference_block import activate
from fairseq.quantization.engine.spec import ACTIVATIONS, BlockSpec, Norm

NORM_CLASSES: dict[tuple[str, str], str] = {
    ("torch.nn.modules.normalization", "LayerNorm"): "layer",
    ("torch.nn.modules.normalization", "RMSNorm"): "rms",
    ("open_clip.transformer", "LayerNorm"): "layer",
    ("timm.layers.norm", "LayerNorm"): "layer",
    ("timm.layers.norm", "LayerNormFp32"): "layer",
    ("timm.layers.norm", "RmsNorm"): "rms",
    ("torch.nn.modules.linear", "Identity"): "none",
}
"""File and name of each class of norms -> one of ``KINDS``."""
COSINE_EPSILON = 1e-12
"""Of torch.nn.functional.normalize, which SwinV2 calls for queries and keys."""
LARGEST_LOGIT_SCALE = math.log(1 / 0.01)
"""To which SwinV2 clamps it."""
ACTIVATION_NAMES = ("activation_fn", "intermediate_act_fn", "activation", "act_fn", "act")


class Inexpressible(Exception):
    """A part of a block that no BlockSpec expresses; the message says which."""


def read(block: nn.Module, kind: BlockClass) -> BlockSpec | str:
    """What a block of class ``kind`` computes; or, in one sentence, which part of it cannot be expressed.

    Whatever the layers are: Linear, or packed. Activations and scales are known by what they compute.
    """
    try:
        with plain_context():
            return _read(block, kind)
    except Inexpressible as reason:
        return str(reason)


def attention_of(block: nn.Module) -> Any:
    """The module of a block that holds its query layer; None if there is none."""
    paths = layer_paths(block)
    return block.get_submodule((paths.get("query") or paths["qkv"]).rpartition(".")[0]) if paths else None


def heads_and_scaling(attention: Any, columns: int) -> tuple[int, float]:
    """Number of heads, and what products of queries, of ``columns`` channels, and keys are multiplied by."""
    heads = next(
        (getattr(attention, name) for name in ("num_attention_heads", "num_heads") if hasattr(attention, name)), 0
    )
    if not heads or columns % heads:
        raise Inexpressible(f"its {columns} columns do not divide into {heads} heads")
    usual = (columns // heads) ** -0.5
    if getattr(attention, "fused_attn", False):  # timm's, which asks PyTorch's function for no other
        return heads, usual
    scaling = next((getattr(attention, name) for name in ("scaling", "scale") if hasattr(attention, name)), usual)
    if not scaling > 0:
        raise Inexpressible(f"its scaling is {scaling}")
    return heads, float(scaling)


def _read(block: nn.Module, kind: BlockClass) -> BlockSpec:
    paths = layer_paths(block)
    if paths is None:
        raise Inexpressible("it lacks a layer of attention or of the MLP")
    layers: dict[str, Any] = {role: block.get_submodule(path) for role, path in paths.items()}
    if "qkv" in layers:
        layers = {"query": layers.pop("qkv"), **layers}
    attention = attention_of(block)
    columns = layers["query"].out_features // (1 if "key" in layers else 3)
    heads, scaling = heads_and_scaling(attention, columns)
    if getattr(attention, "is_causal", False):
        raise Inexpressible("its attention is causal")
    if getattr(attention, "gate", None) is not None:
        raise Inexpressible("its attention has a gate")
    head_scale = _head_scale(attention)
    width, mlp = layers["query"].in_features, layers["fc2"].in_features
    gating = _gating(block, layers)
    spec = BlockSpec(
        layers=layers,
        norms=_norms(block, kind, attention, columns // heads, cosine=head_scale is not None),
        activation=_activation(block.get_submodule(paths["fc1"].rpartition(".")[0]), gating),
        gating=gating,
        width=width,
        heads=heads,
        head_size=columns // heads,
        mlp=mlp,
        scaling=scaling if head_scale is None else 1.0,
        head_scale=head_scale,
        scale1=_scale(block, kind, 0, width),
        scale2=_scale(block, kind, 1, width),
        query_bias=_query_bias(attention),
    )
    _check_sizes(spec, columns)
    return spec


def _norms(block: nn.Module, kind: BlockClass, attention: Any, size: int, cosine: bool) -> dict[str, Norm]:
    first, second = ("post1", "post2") if kind.post_norm else ("norm1", "norm2")
    found = {
        first: _norm(getattr(block, kind.norms[0], None), kind.norms[0]),
        second: _norm(getattr(block, kind.norms[1], None), kind.norms[1]),
        "query_norm": _norm(getattr(attention, "q_norm", None), "q_norm"),
        "key_norm": _norm(getattr(attention, "k_norm", None), "k_norm"),
        "attended_norm": _norm(getattr(attention, "norm", None), "norm of attention"),
        "hidden_norm": _norm(getattr(getattr(block, "mlp", None), "norm", None), "norm of the MLP"),
    }
    if cosine:
        found |= dict.fromkeys(("query_norm", "key_norm"), Norm("l2", epsilon=COSINE_EPSILON))
    return {role: norm for role, norm in found.items() if norm.kind != "none"}


def _norm(part: Any, name: str) -> Norm:
    if part is None:
        return Norm()
    own = type(part)
    kind = NORM_CLASSES.get((own.__module__, own.__qualname__))
    if kind is None or getattr(sys.modules.get(own.__module__), own.__qualname__, None) is not own:
        raise Inexpressible(f"its {name} is a {own.__qualname__}, not a LayerNorm or RMSNorm")
    if kind == "none":
        return Norm()
    if len(part.normalized_shape) != 1 or part.eps is None:
        raise Inexpressible(f"its {name} is over {len(part.normalized_shape)} dimensions with epsilon {part.eps}")
    return Norm(kind, part.weight, getattr(part, "bias", None), part.eps)


def _scale(block: nn.Module, kind: BlockClass, branch: int, width: int) -> Tensor | None:
    """What multiplies a branch: the parameter itself where there is one, so that it is followed."""
    part = None if kind.scales is None else getattr(block, kind.scales[branch], None)
    if part is None or isinstance(part, nn.Identity):
        return None
    if isinstance(part, int | float):
        return None if part == 1 else torch.full((width,), float(part))
    parameters = [part] if isinstance(part, Tensor) else list(part.parameters())
    if len(parameters) != 1 or parameters[0].shape != (width,):
        raise Inexpressible(f"its {kind.scales and kind.scales[branch]} is not {width} factors")
    (scale,) = parameters
    if not isinstance(part, Tensor) and not scale.is_meta:
        ones = torch.ones(1, width, dtype=scale.dtype, device=scale.device)
        if not torch.equal(cast(nn.Module, part)(3 * ones), 3 * scale[None]):
            raise Inexpressible(f"its {kind.scales and kind.scales[branch]} does not multiply by its parameter")
    return scale


def _gating(block: nn.Module, layers: dict[str, Any]) -> str:
    if "gate" in layers:
        return "layer"
    if layers["fc1"].out_features == layers["fc2"].in_features:
        return "none"
    if getattr(getattr(block, "mlp", None), "gate_last", False):
        raise Inexpressible("its MLP multiplies the first half by the activation of the second")
    return "halves"


def _activation(mlp: nn.Module, gating: str) -> str:
    """By what it computes, whatever its class."""
    found = [getattr(mlp, name) for name in ACTIVATION_NAMES if hasattr(mlp, name)]
    if isinstance(mlp, nn.Sequential):  # of torchvision and OpenCLIP
        found = [part for part in mlp if not isinstance(part, nn.Linear | PackedLinear | nn.Dropout)]
    if not found and gating == "halves":  # DINOv2's calls the function of PyTorch
        return "silu"
    if len(found) != 1:
        raise Inexpressible(f"it has {len(found)} activations where one is expected")
    x = torch.linspace(-6, 6, 97)
    y = found[0](x.clone())
    same = (name for name in ACTIVATIONS if y.shape == x.shape and torch.allclose(y, activate(name, x), 0, 1e-6))
    name = next(same, None)
    if name is None:
        raise Inexpressible(f"its activation is none of {', '.join(ACTIVATIONS)}")
    return name


def _head_scale(attention: Any) -> Tensor | None:
    """Of SwinV2, whose attention is of cosines."""
    scale = getattr(attention, "logit_scale", None)
    return None if scale is None else scale.detach().clamp(max=LARGEST_LOGIT_SCALE).exp().flatten()


def _query_bias(attention: Any) -> Tensor | None:
    """timm's for BEiT and EVA, which has no bias in the layer and three parts of one beside it."""
    parts = [getattr(attention, name, None) for name in ("q_bias", "k_bias", "v_bias")]
    return None if parts[0] is None else torch.cat([cast(Tensor, part).detach() for part in parts])


def _check_sizes(spec: BlockSpec, columns: int) -> None:
    """That the layers fit together, as those of other blocks with these names may not."""
    projected = [columns] * 3 if spec.projections == 3 else [3 * columns]
    hidden = 2 * spec.mlp if spec.gating == "halves" else spec.mlp
    expected = dict(zip(("query", "key", "value"), ((spec.width, out) for out in projected)))
    expected |= {"output": (columns, spec.width), "fc1": (spec.width, hidden), "fc2": (spec.mlp, spec.width)}
    if spec.gating == "layer":
        expected["gate"] = (spec.width, spec.mlp)
    for role, sizes in expected.items():
        layer: Any = spec.layers[role]
        found = layer.in_features, layer.out_features
        if found != sizes:
            raise Inexpressible(f"its {role} layer is of {found[0]} x {found[1]}, not {sizes[0]} x {sizes[1]}")
