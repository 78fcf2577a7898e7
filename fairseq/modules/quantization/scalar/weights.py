"""A Linear weight to integers and back: per tensor, per output channel, or per group of input channels.

The one place where the trainable and the packed layer get their integers from, so that both hold the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq.modules.quantization.scalar import ops
from fairseq.modules.quantization.scalar.grid import QParams

MIN_GROUP, MAX_GROUP, GROUP_STEP = 32, 128, 8


def check_group_size(group_size: int | None, method: str) -> int | None:
    """Return ``group_size`` if it is None, or 32 to 128 in steps of 8 with a method that is not "tensor".

    Raises:
        TypeError, ValueError: what came and what is accepted.
    """
    if group_size is None:
        return None
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size must be None or an int from {MIN_GROUP} to {MAX_GROUP}, got {group_size!r}")
    if not MIN_GROUP <= group_size <= MAX_GROUP or group_size % GROUP_STEP:
        raise ValueError(f"group_size must be from {MIN_GROUP} to {MAX_GROUP} in steps of 8, got {group_size}")
    if method == "tensor":
        raise ValueError("method 'tensor' has one scale per layer and takes no group_size; use channel or histogram")
    return group_size


def observe_weight(
    w: Tensor, bits: int, method: str, group_size: int | None = None, symmetric: bool = False, name: str = "weight"
) -> QParams:
    """The scale and zero point of a Linear weight.

    Args:
        w: (out, in), finite, floating.
        bits: 2 to 8.
        method: "tensor" (one scale, the clip with the smallest squared error), "channel" (one per output channel, from
            its minimum and maximum) or "histogram" (one per output channel, the clip with the smallest squared error).
        group_size: input channels that share a scale, within each output channel; None for all of them. The last
            group may be shorter.
        symmetric: the zero point is 2**(bits - 1).
        name: how errors call the tensor.

    Returns:
        scale (float32; float64 for a float64 weight) and zero_point (int32): shape (1,) for "tensor", (out,), or
        (out, groups) with a ``group_size``.
    """
    ops.check_tensor(w, name)
    rows = w.detach() if check_group_size(group_size, method) is None else split_groups(w.detach(), group_size)
    axis = None if method == "tensor" else 0
    searched = "histogram" if method == "tensor" else method  # one range for a layer is never its minimum and maximum
    scale, zero_point = ops.observe(rows, bits, searched, axis, name=name, symmetric=symmetric)
    shape = (len(w), -1) if group_size is not None else (-1,)
    return scale.reshape(shape), zero_point.reshape(shape)


def weight_to_int(w: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """The integers of a weight, uint8 of shape (out, in), for what :func:`observe_weight` returned."""
    if group_size is None:
        return ops.quantize_to_int(w.detach(), scale, zero_point, bits)
    q = ops.quantize_to_int(split_groups(w.detach(), group_size), scale.flatten(), zero_point.flatten(), bits)
    return join_groups(q, w.shape)


def weight_to_real(
    q: Tensor, scale: Tensor, zero_point: Tensor, group_size: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """scale * (q - zero_point), (out, in), as ``dtype``; the inverse of :func:`weight_to_int` up to rounding."""
    if group_size is None:
        return ops.dequantize(q, scale, zero_point, dtype=dtype)
    rows = ops.dequantize(split_groups(q, group_size), scale.flatten(), zero_point.flatten(), dtype=dtype)
    return join_groups(rows, q.shape)


def settings_tensor(bits: int, in_features: int, group_size: int | None, symmetric: bool) -> Tensor:
    """What a state dict says of the integers in it: int32 (bits, in_features, group_size or 0, 1 if symmetric).

    On the CPU whatever the default device is, so that there are values to compare.
    """
    return torch.tensor([bits, in_features, group_size or 0, int(symmetric)], dtype=torch.int32, device="cpu")


def check_settings(saved: Tensor | None, own: Tensor, name: str) -> None:
    """ValueError if a state dict was saved by a layer with other settings than those of the layer ``name``."""

    def text(settings: Tensor) -> str:
        bits, inputs, group, symmetric = settings.tolist()
        kind = "symmetric" if symmetric else "affine"
        return f"{bits} bits, {inputs} inputs, {f'groups of {group}' if group else 'no groups'}, {kind}"

    if saved is None or saved.is_meta or own.is_meta:  # nothing to compare: on the meta device there are no values
        return
    if saved.shape == own.shape and not torch.equal(saved.cpu(), own.cpu()):
        raise ValueError(f"{name} was saved with {text(saved)}, but this layer has {text(own)}")


def split_groups(w: Tensor, group_size: int | None) -> Tensor:
    """(out, in) -> (out * groups, group_size), the last group of each row filled up with zeros."""
    assert group_size is not None
    return F.pad(w, (0, -w.shape[1] % group_size)).reshape(-1, group_size)


def join_groups(rows: Tensor, shape: torch.Size) -> Tensor:
    """Back to ``shape`` = (out, in), without what :func:`split_groups` filled in."""
    return rows.reshape(shape[0], -1)[:, : shape[1]].contiguous()
