"""QuantizedWeight: a float weight, seen through n-bit integers over a range that belongs to this very weight."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

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
