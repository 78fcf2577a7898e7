"""PackedState: the tensors of a packed layer, and what may be done to them: laid out, moved, copied, saved, loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.packed.input_grid import InputGrid, correction
from fairseq.modules.quantization.packed.kernels import arguments, native
from fairseq.modules.quantization.packed.layout import Layout, earlier, takes_a_byte
from fairseq.modules.quantization.packed.weight import PackedWeight
from fairseq.modules.quantization.scalar.modules.replace import moved
from fairseq.modules.quantization.scalar.tokens import check_static_state, static_qparams
from fairseq.modules.quantization.scalar.weights import check_settings, settings_tensor

MAX_IN_FEATURES = 2**16
"""Above it a sum of products may not fit int32: 2**16 * 128 * 255 < 2**31."""


class PackedState(nn.Module):
    """The buffers of a :class:`~fairseq.modules.quantization.packed.PackedLinear`, which lists them.

    Args:
        codes: int8 (out, in), see :class:`PackedWeight`; kept, as ``scale`` and ``zero_point`` are.
        scale, zero_point, config: as :func:`~.weight.check_integers` accepts them.
        bias: (out,) or None.
        name: how errors call the layer.
        input_range, input_factor: see :meth:`PackedLinear.from_integers`.

    Raises:
        ValueError: too many inputs, or a range that is missing, not used, or none.
    """

    weight_codes: Tensor
    code_sums: Tensor | None
    scale: Tensor
    zero_point: Tensor
    settings: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_correction: Tensor | None
    input_factor: Tensor | None

    PARTS = (
        "weight_codes", "code_sums", "scale", "zero_point", "bias", "input_factor", "input_scale", "input_zero_point",
        "input_correction",
    )  # fmt: skip
    """Buffers that the native kernels need, in the order of :class:`arguments.Prepared`."""

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bias: Tensor | None,
        config: LinearConfig,
        name: str,
        input_range: Sequence[float] | None = None,
        input_factor: Tensor | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features = codes.shape
        if self.in_features >= MAX_IN_FEATURES:
            raise ValueError(f"{name} has {self.in_features} inputs; integer sums are exact below {MAX_IN_FEATURES}")
        self.config, self.name = config, name
        self.native = False  # whether the native kernels run it where they can
        self.register_buffer("weight_codes", Layout.of(codes, config.bits, config.weight_storage == "unpacked").codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.to(torch.uint8))
        settings = settings_tensor(config.bits, self.in_features, config.group_size, config.symmetric)
        self.register_buffer("settings", settings.to(codes.device))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        qparams = static_qparams(config.activations, input_range, config.activation_bits, name)
        for key, value in zip(("input_scale", "input_zero_point"), qparams, strict=True):
            self.register_buffer(key, None if value is None else value.to(codes.device))
        self.register_buffer("input_factor", None if input_factor is None else input_factor.detach().clone())
        for key in ("input_correction", "code_sums"):
            self.register_buffer(key, None, persistent=False)
        self._derive()
        self._prepared: arguments.Prepared | None = None

    @property
    def layout(self) -> Layout:
        """The integers as they lie in memory."""
        config = self.config
        return Layout(
            self.weight_codes, self.code_sums, config.bits, self.out_features, self.in_features,
            takes_a_byte(config.bits, config.weight_storage == "unpacked"), config.group_size,
        )  # fmt: skip

    @layout.setter
    def layout(self, layout: Layout) -> None:
        self.weight_codes, self.code_sums = layout.codes, layout.sums

    @property
    def panels(self) -> Tensor | None:
        """The integers if they lie in panels, else None."""
        return self.weight_codes if self.weight_codes.ndim == 3 else None

    @property
    def weight_matrix(self) -> PackedWeight:
        """The integers and their meaning, for a kernel."""
        config = self.config
        centred = config.symmetric and config.bits == 8
        rows = self.weight_codes if self.panels is None else self.layout.row_codes()  # 2.9 compiles no layout
        return PackedWeight(
            rows, self.scale, self.zero_point, config.bits, self.in_features, config.group_size,
            centred,
        )  # fmt: skip

    @property
    def input_grid(self) -> InputGrid:
        """How the input becomes integers, for a kernel."""
        bits = self.config.activation_bits
        if self.config.activations != "static":
            return InputGrid(bits)
        return InputGrid(bits, self.input_scale, self.input_zero_point, self.input_correction)

    @plain_context()
    def set_input_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Round the input on this very grid, of a layer with static activations.

        Args:
            scale: float32 (1,), finite and above 0.
            zero_point: integers (1,), in [-2**(activation_bits - 1), 2**(activation_bits - 1) - 1].

        Raises:
            ValueError: the layer has no static activations, or the grid is none.
        """
        half = 2 ** (self.config.activation_bits - 1)
        if self.input_scale is None:
            raise ValueError(f"{self.name} has activations={self.config.activations!r}; only static ones have a grid")
        right = scale.shape == zero_point.shape == (1,) and bool(torch.isfinite(scale) & (scale > 0))
        if not right or not -half <= int(zero_point) < half:
            raise ValueError(
                f"the input of {self.name} needs a scale above 0 and a zero point from {-half} to {half - 1}, of shape "
                f"(1,) each; got {scale.tolist()} and {zero_point.tolist()}"
            )
        place = self.input_scale.device
        self.input_scale = scale.detach().to(place, torch.float32, copy=True)
        self.input_zero_point = zero_point.detach().to(place, torch.int32, copy=True)
        self._derive()

    def prepared(self) -> arguments.Prepared:
        """What the native kernels take for this layer as it is now, on the CPU after :meth:`use_native`."""
        parts = self.parts()
        if self._prepared is None or not self._prepared.is_of(parts):
            self._prepared = arguments.Prepared(parts, self.sizes())
        return self._prepared

    def parts(self) -> arguments.Parts:
        """The tensors that the native kernels need, see :class:`arguments.Prepared`."""
        return tuple(self._buffers[key] for key in self.PARTS)

    def sizes(self) -> tuple[int, ...]:
        """What the native kernels need beside :meth:`parts`, see :class:`arguments.Prepared`."""
        config = self.config
        return (
            self.in_features, self.out_features, config.bits, int(config.activations is None), config.activation_bits,
            config.group_size or 0,
        )  # fmt: skip

    def integers(self) -> Tensor:
        """The weight's integers, uint8 of shape (out_features, in_features)."""
        return self.weight_matrix.integers()

    def dequantize(self) -> Tensor:
        """The weight as real numbers, input factor included: (out_features, in_features), in the dtype of ``scale``."""
        weight = self.weight_matrix.dequantize()
        return weight if self.input_factor is None else weight * self.input_factor.to(weight.dtype)

    def _place(self) -> None:
        """Bring the integers into panels where the native kernels can run them, else into rows."""
        wanted = self.native and self.weight_codes.device.type == "cpu" and bool(native.levels())
        if wanted != self.layout.in_panels():
            with plain_context():
                self.layout = self.layout.panels() if wanted else self.layout.rows()

    @plain_context()
    def _derive(self) -> None:
        """Set what follows from the other buffers as they are now: the sums of the codes, and ``input_correction``.

        Of groups they come in whatever order they were found or saved in; kernels take them row by row.
        """
        self.scale, self.zero_point = self.scale.contiguous(), self.zero_point.contiguous()
        self.layout = self.layout.summed()
        if self.input_scale is not None and self.input_zero_point is not None:
            self.input_correction = correction(self.weight_matrix, self.input_scale, self.input_zero_point)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = {name: self._buffers.get(name) for name in ("scale", "input_scale", "input_correction")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if buffer is not None:
                setattr(self, name, moved(buffer, getattr(self, name).device))
        self._place()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_prepared": None}  # pointers
        codes = self.weight_codes
        alone = codes.untyped_storage().nbytes() == codes.numel() * codes.element_size()
        if not alone and not codes.is_shared():  # they lie behind those of others, which are not to come along
            state["_buffers"] = {**self._buffers, "weight_codes": codes.clone()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._place()  # another machine may have no native kernels

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        saved = self.layout.saved()
        if saved is not self.weight_codes:
            destination[prefix + "weight_codes"] = saved

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict:
            raise ValueError(
                f"{prefix}weight: this state dict is of a float model, or of one quantized with execution='emulated'; "
                f"{self.name} is packed. Load it into such a model, then quantize that"
            )
        check_settings(state_dict.get(prefix + "settings"), self.settings, prefix[:-1] or self.name)
        check_static_state(state_dict, prefix, self.config.activations == "static", self.name)
        saved = state_dict.get(prefix + "weight_codes")
        if saved is not None and self.layout.takes(saved):
            with plain_context():
                state_dict = {**state_dict, prefix + "weight_codes": self.layout.loaded(saved).codes}
        elif saved is not None:
            if why := earlier(self.config.bits, tuple(saved.shape), tuple(self.layout.saved().shape)):
                raise ValueError(f"{prefix}weight_codes{why}")
            self.layout = self.layout.rows()  # for the error that every module gives
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._place()
        self._derive()
