"""QuantizedWeight: a float weight, seen through n-bit integers over a range that belongs to this very weight."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.scalar import ops
from fairseq.modules.quantization.scalar.modules.fingerprint import fingerprint, in_backward, readable
from fairseq.modules.quantization.scalar.modules.learned import become_parameter, positive, scales_kept
from fairseq.modules.quantization.scalar.modules.replace import carry_hooks, reason_not_quantizable
from fairseq.modules.quantization.scalar.modules.straight_through import check_noise, fake_quantize_ste, quant_noise


class QuantizedWeight(nn.Module):
    """What the three layers share: when the range of the weight is observed, and which elements are quantized.

    In training an element is quantized with probability ``p`` (Quant-Noise); in eval every one is, and the output is
    that of the float layer with :meth:`quantized_weight`. Gradients are straight-through.

    A range belongs to one weight. Eval compares the weight with the one that the range was observed from, and observes
    anew where it is another, whoever changed it and how: an optimizer, an average, a merged adapter, ``.data``. In
    training the range may lag behind: it is looked at in the first forward after eval, and from there every
    ``update_step`` forwards; those that gradient checkpointing repeats neither look nor count. A recorded graph
    (traced, exported, compiled) has no look in it.

    ``scale`` (float32) and ``zero_point`` (int32), of shape (1,) or (out,), are buffers: None until observed, so that
    ``AveragedModel``, which pairs buffers by their order, is to be made after the first forward. They keep their dtype
    in ``.half()``, and what they are is kept with the weight that is saved, copied or moved with them.
    Loading a state dict without them (a float layer's) forgets them.

    After :meth:`learn_scale` the scale is a parameter of the same name, which an optimizer moves: nothing observes the
    weight any more, and a state dict has the same entries as before.
    """

    weight: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    _range_of: str | None = None
    """The fingerprint of the weight that the range belongs to; None: the one that is there when it is looked at."""

    def _init_quantization(self, p: float, update_step: int, bits: int, method: str) -> None:
        check_noise(p, update_step)
        self.p, self.update_step = p, update_step
        self.bits, self.method = ops.check_bits(bits), ops.check_method(method)
        self.steps = 0  # training forwards since eval; not saved, so a resumed run looks at the weight at once
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    @classmethod
    def from_float(cls, module: nn.Module, p: float, update_step: int, bits: int, method: str, **more: Any) -> Self:
        """The quantized layer with the settings of ``module`` and its very parameters; ``module`` is not changed.

        ``more`` are further arguments of the constructor.

        Raises:
            TypeError: ``module`` is not exactly an nn.Linear, nn.Conv2d or nn.Embedding.
            ValueError: its weight is computed (pruned, weight_norm) or moved by accelerate.
        """
        settings = _settings(module)
        if reason := reason_not_quantizable(module):
            raise ValueError(f"a {type(module).__name__} cannot be replaced: {reason}")
        with torch.device("meta"):
            new = cls(**settings, p=p, update_step=update_step, bits=bits, method=method, **more)
        for name, parameter in module.named_parameters(recurse=False):
            setattr(new, name, parameter)
        carry_hooks(module, new)
        return new.train(module.training)

    def train(self, mode: bool = True) -> Self:
        """As any module; between training and eval the range catches up with the weight."""
        if mode and not self.training:
            self.steps = 0
        elif self.training and not mode and self.steps > 0:
            self.update_range()
        return super().train(mode)

    def observe_weight(self) -> None:
        """Set ``scale`` and ``zero_point`` from the weight as it is now."""
        self.set_range(*self._observed())

    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Use this grid for as long as the weight is the one that is there now, as calibrated rounding asks for.

        Raises:
            ValueError: not as many scales and zero points as ``method`` has.
        """
        if not scale.numel() == zero_point.numel() == self._scale_count():
            count = "one scale" if self._scale_count() == 1 else f"{self._scale_count()} scales"
            raise ValueError(
                f"a {type(self).__name__} has {count} and zero point for method={self.method!r}, got "
                f"{tuple(scale.shape)} and {tuple(zero_point.shape)}"
            )
        if self.learns_scale:
            with torch.no_grad():
                self.scale.copy_(scale)  # type: ignore[union-attr]
        else:
            self.scale = scale
        self.zero_point = zero_point
        self._range_of = fingerprint(self.weight) if readable(self.weight) else None

    @property
    def learns_scale(self) -> bool:
        """Whether the scale is a parameter."""
        return "scale" in self._parameters

    def learn_scale(self) -> None:
        """Make a parameter of ``scale``, from the grid of the weight as it is now; the zero point stays as it is.

        The grid does not follow the weight from now on: the gradient moves it, see :func:`~.straight_through
        .fake_quantize_ste`. A scale that an optimizer takes to 0 or below counts as the smallest positive number.
        """
        self.update_range()
        become_parameter(self, "scale")

    def update_range(self) -> None:
        """Observe the weight, unless it is the one that the range belongs to, or its scale is learned."""
        if self.learns_scale:
            return
        if self.scale is None or self.zero_point is None or self._lags():
            self.observe_weight()

    def quantized_weight(self) -> Tensor:
        """The weight, every element on the n-bit grid, with straight-through gradients: shape of ``weight``."""
        return fake_quantize_ste(self.weight, *self._grid(), self.bits)

    def noisy_weight(self) -> Tensor:
        """The weight that this forward uses: all quantized in eval, a share ``p`` of the elements in training."""
        if not self.training:
            return self.quantized_weight()
        if not in_backward():
            if self.steps % self.update_step == 0:
                self.update_range()
            self.steps += 1
        return self.weight if self.p == 0 else quant_noise(self.weight, self.quantized_weight(), self.p)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point: in eval those of the weight that is there, in training those it has."""
        if self.scale is None or not self.training:
            self.update_range()
        assert self.scale is not None
        assert self.zero_point is not None
        return positive(self.scale) if self.learns_scale else self.scale, self.zero_point

    def _observed(self) -> ops.QParams:
        """The scale and zero point of the weight as it is now."""
        with plain_context():
            return ops.observe(self.weight, self.bits, self.method, name=f"{type(self).__name__}.weight")

    def _lags(self) -> bool:
        """Whether the range was that of another weight than the one that is there."""
        if self.scale is None or self.learns_scale or in_backward() or not readable(self.weight):
            return False
        now = fingerprint(self.weight)
        if self._range_of is None:
            self._range_of = now
        return self._range_of != now

    def _scale_count(self) -> int:
        """Values in ``scale`` once the weight is observed."""
        return len(self.weight) if self.method == "channel" else 1

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedWeight:
        lags = self._lags()
        with scales_kept(self, "scale"):
            super()._apply(fn, recurse)
        if not lags:  # a weight that is moved or rounded to another dtype stays the one that the range belongs to
            self._range_of = fingerprint(self.weight) if readable(self.weight) else None
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._lags() and bool(
            torch.isfinite(self.weight).all()
        ):  # in the midst of training, which goes on as it was
            destination[prefix + "scale"], destination[prefix + "zero_point"] = self._observed()

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
        if not self.learns_scale and any(prefix + name in state_dict for name in ("weight", "scale", "zero_point")):
            for name in ("scale", "zero_point"):
                saved = state_dict.get(prefix + name)
                setattr(self, name, None if saved is None else torch.empty_like(saved, device=self.weight.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if scale is not None:
            self._range_of = fingerprint(self.weight) if readable(self.weight) else None

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
