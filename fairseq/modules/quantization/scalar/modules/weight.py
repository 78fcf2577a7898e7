"""IntLinear, IntConv2d and IntEmbedding: float weights, seen through n-bit integers, for training with Quant-Noise."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.modules.quantization.scalar import ops
from fairseq.modules.quantization.scalar.modules.replace import carry_hooks, moved, obstacle
from fairseq.modules.quantization.scalar.modules.straight_through import check_noise, fake_quantize, quant_noise


class QuantizedWeight(nn.Module):
    """What the three layers share: when the range of the weight is observed, and which elements are quantized.

    In training an element is quantized with probability ``p`` (Quant-Noise); in eval every one is, and the output is
    that of the float layer with :meth:`quantized_weight`. Gradients are straight-through. The range is observed at
    the first forward, in training every ``update_step`` forwards (one that gradient checkpointing repeats counts
    again), and when a layer that was trained goes to eval mode.

    ``scale`` (float32) and ``zero_point`` (int32), of shape (1,) or (out,), are buffers: None until observed. They
    keep their dtype in ``.half()``. Loading a state dict without them (a float layer's) forgets them.
    """

    weight: Tensor
    scale: Tensor | None
    zero_point: Tensor | None

    def _init_quantization(self, p: float, update_step: int, bits: int, method: str) -> None:
        check_noise(p, update_step)
        self.p, self.update_step = p, update_step
        self.bits, self.method = ops.check_bits(bits), ops.check_method(method)
        self.steps = 0  # training forwards so far; not saved, so a resumed run observes the range at once
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    @classmethod
    def from_float(cls, module: nn.Module, p: float, update_step: int, bits: int, method: str) -> QuantizedWeight:
        """The quantized layer with the settings of ``module`` and its very parameters; ``module`` is not changed.

        Raises:
            TypeError: ``module`` is not exactly an nn.Linear, nn.Conv2d or nn.Embedding.
            ValueError: its weight is computed (pruned, weight_norm) or moved by accelerate.
        """
        settings = _settings(module)
        if reason := obstacle(module):
            raise ValueError(f"a {type(module).__name__} cannot be replaced: {reason}")
        with torch.device("meta"):
            new = cls(**settings, p=p, update_step=update_step, bits=bits, method=method)
        for name, parameter in module.named_parameters(recurse=False):
            setattr(new, name, parameter)
        carry_hooks(module, new)
        return new.train(module.training)

    def train(self, mode: bool = True) -> Self:
        """As any module; leaving training for eval observes the weight, so that eval never uses an older range."""
        if self.training and not mode and self.steps > 0:
            self.observe_weight()
        return super().train(mode)

    def observe_weight(self) -> None:
        """Set ``scale`` and ``zero_point`` from the weight as it is now."""
        self.scale, self.zero_point = ops.observe(
            self.weight, self.bits, self.method, name=f"{type(self).__name__}.weight"
        )

    def quantized_weight(self) -> Tensor:
        """The weight, every element on the n-bit grid, with straight-through gradients: shape of ``weight``."""
        if self.scale is None or self.zero_point is None:
            self.observe_weight()
        assert self.scale is not None
        assert self.zero_point is not None
        return fake_quantize(self.weight, self.scale, self.zero_point, self.bits)

    def noisy_weight(self) -> Tensor:
        """The weight that this forward uses: all quantized in eval, a share ``p`` of the elements in training."""
        if not self.training:
            return self.quantized_weight()
        if self.steps % self.update_step == 0:
            self.observe_weight()
        self.steps += 1
        return self.weight if self.p == 0 else quant_noise(self.weight, self.quantized_weight(), self.p)

    def _scale_count(self) -> int:
        """Values in ``scale`` once the weight is observed."""
        return len(self.weight) if self.method == "channel" else 1

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedWeight:
        kept = self.scale
        super()._apply(fn, recurse)
        if kept is not None and self.scale is not None:
            self.scale = moved(kept, self.scale.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "weight_codes" in state_dict:
            raise ValueError(
                f"{prefix}weight_codes: this state dict is of a model quantized with execution='packed', which has no "
                "float weights; quantize with execution='packed' to load it"
            )
        scale, zero_point = state_dict.get(prefix + "scale"), state_dict.get(prefix + "zero_point")
        if (
            scale is not None
            and zero_point is not None
            and (scale.numel() != self._scale_count() or bool((zero_point >= 2**self.bits).any()))
        ):
            raise ValueError(
                f"{prefix}scale and {prefix}zero_point were saved by a layer with other settings than this one's "
                f"bits={self.bits}, method={self.method!r}"
            )
        for name in ("scale", "zero_point"):
            saved = state_dict.get(prefix + name)
            setattr(self, name, None if saved is None else torch.empty_like(saved, device=self.weight.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, method={self.method}, p={self.p}"


class IntLinear(QuantizedWeight, nn.Linear):
    """``nn.Linear`` whose weight is seen through ``bits`` wide integers. See :class:`QuantizedWeight`.

    Args:
        in_features, out_features, bias: as ``nn.Linear``.
        p: probability that an element is quantized in training, 0 to 1.
        update_step: training forwards between two observations of the range.
        bits: 2 to 8.
        method: "tensor", "channel" (one scale per output channel) or "histogram" (one scale, least squared error).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0,
        update_step: int = 3000,
        bits: int = 8,
        method: str = "histogram",
    ):
        nn.Linear.__init__(self, in_features, out_features, bias)
        self._init_quantization(p, update_step, bits, method)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.noisy_weight(), self.bias)


class IntConv2d(QuantizedWeight, nn.Conv2d):
    """``nn.Conv2d`` whose weight is seen through ``bits`` wide integers; "channel" is one scale per output channel.

    Args: those of ``nn.Conv2d`` up to ``padding_mode``, then as :class:`IntLinear`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        p: float = 0,
        bits: int = 8,
        method: str = "histogram",
        update_step: int = 1000,
    ):
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )  # fmt: skip
        self._init_quantization(p, update_step, bits, method)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.noisy_weight(), self.bias)


class IntEmbedding(QuantizedWeight, nn.Embedding):
    """``nn.Embedding`` whose table is seen through ``bits`` wide integers; "channel" is one scale per row.

    Args: those of ``nn.Embedding`` (``sparse`` gradients are not supported: ValueError), then as :class:`IntLinear`.
    ``max_norm`` renormalizes the float table, before it is quantized.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        p: float = 0,
        update_step: int = 1000,
        bits: int = 8,
        method: str = "histogram",
    ):
        if sparse:
            raise ValueError(
                "IntEmbedding has no sparse gradients, since the whole table is quantized; use sparse=False"
            )
        nn.Embedding.__init__(
            self, num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight
        )  # fmt: skip
        self._init_quantization(p, update_step, bits, method)

    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is not None:
            with torch.no_grad():
                torch.embedding_renorm_(self.weight, input.contiguous(), self.max_norm, self.norm_type)
        return F.embedding(
            input, self.noisy_weight(), self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        )  # fmt: skip


SETTINGS: dict[type[nn.Module], str] = {
    nn.Linear: "in_features out_features",
    nn.Conv2d: "in_channels out_channels kernel_size stride padding dilation groups padding_mode",
    nn.Embedding: "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse",
}


def _settings(module: nn.Module) -> dict[str, Any]:
    """The constructor arguments that ``module`` was built with."""
    if type(module) not in SETTINGS:
        raise TypeError(f"from_float takes an nn.Linear, nn.Conv2d or nn.Embedding, got {type(module).__name__}")
    settings = {name: getattr(module, name) for name in SETTINGS[type(module)].split()}
    if not isinstance(module, nn.Embedding):
        settings["bias"] = module.bias is not None
    return settings
