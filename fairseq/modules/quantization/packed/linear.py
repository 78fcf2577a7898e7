"""PackedLinear: a Linear that holds n-bit integers and runs on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import kernels
from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.packed.input_grid import InputGrid, correction
from fairseq.modules.quantization.packed.kernels import cpu, functional, native, operators
from fairseq.modules.quantization.packed.packing import STORED_BITS, packed_length
from fairseq.modules.quantization.packed.panels import from_panels, sums_of, to_panels
from fairseq.modules.quantization.packed.weight import (
    PackedWeight,
    check_integers,
    pack_codes,
    to_codes,
    unpack_codes,
)
from fairseq.modules.quantization.scalar.modules.replace import moved, reason_not_quantizable
from fairseq.modules.quantization.scalar.tokens import check_static_state, static_qparams
from fairseq.modules.quantization.scalar.weights import check_settings, observe_weight, settings_tensor, weight_to_int

MAX_IN_FEATURES = 2**16
"""Above it a sum of products may not fit int32: 2**16 * 128 * 255 < 2**31."""


class PackedLinear(nn.Module):
    """``y = x @ W.T + b``, W = scale * (q - zero_point) held as integers q of ``config.bits`` bits; for inference.

    With ``activations="dynamic"`` each token of x is rounded by its own scale and multiplied in integers; with "static"
    by one fixed scale and zero point, and what is outside of their range saturates; with None the weight is dequantized
    and multiplied in the dtype of x. The output has the dtype of x. A NaN makes the outputs of its token NaN, and an
    Inf makes them NaN or Inf unless it saturates.

    Buffers, in the state dict:
        weight_codes: the packed integers, uint8 (out_features, bytes per row).
        scale: float32 (float64 if made from a float64 layer), (1,), (out_features,) or (out_features, groups).
        zero_point: uint8, the shape of ``scale``.
        settings: int32 (4,): bits, in_features, group_size (0 for none), 1 if symmetric.
        bias: (out_features,) or None.
        input_scale: float32 (1,), only if static.
        input_zero_point: int32 (1,), only if static.
        input_factor: (in_features,), or None: x is multiplied by it first, and W is the weight divided by it.

    And one that is not, since it follows from the others: input_correction, (out_features,), only if static; see
    :func:`~fairseq.modules.quantization.packed.input_grid.correction`.

    A scale keeps its dtype in ``.half()``. There is no gradient: RuntimeError in the backward pass.

    After :meth:`use_native`, on the CPU, weight_codes is None and the integers lie in another buffer that is not in the
    state dict: panels, in the order in which the native kernels read them, with code_sums, int32 (out_features,), the
    sum of each output's codes, above 4 bits. The state dict is the same, and so is what it loads.
    """

    weight_codes: Tensor | None
    panels: Tensor | None
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
        "panels", "code_sums", "scale", "zero_point", "bias", "input_factor", "input_scale", "input_zero_point",
        "input_correction",
    )  # fmt: skip
    """Buffers that the native kernels need, in the order of :class:`native.Prepared`."""

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
        self.shares_input = False
        self.register_buffer("weight_codes", codes if self._bytewise else pack_codes(codes, config.bits))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.to(torch.uint8))
        settings = settings_tensor(config.bits, self.in_features, config.group_size, config.symmetric)
        self.register_buffer("settings", settings.to(codes.device))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        qparams = static_qparams(config.activations, input_range, config.activation_bits, name)
        for key, value in zip(("input_scale", "input_zero_point"), qparams, strict=True):
            self.register_buffer(key, None if value is None else value.to(codes.device))
        self.register_buffer("input_factor", None if input_factor is None else input_factor.detach().clone())
        for key in ("input_correction", "panels", "code_sums"):
            self.register_buffer(key, None, persistent=False)
        self._correct()
        self._native = False
        self._prepared: native.Prepared | None = None
        if config.backend == "native":
            self.use_native()

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        config: LinearConfig,
        name: str = "linear",
        input_range: Sequence[float] | None = None,
    ) -> PackedLinear:
        """Quantize ``linear``, which is not changed; no memory is shared with it.

        Args:
            linear: an ``nn.Linear``, its weight finite.
            config: bits, method, activations and so on.
            name: how errors call the layer.
            input_range: (low, high) of the input, finite, for ``activations="static"`` and only for it; 0 is included.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: the weight is not finite, empty, computed by pruning, or on the meta device; a range is missing,
                not used, or none.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} must be an nn.Linear, got {type(linear).__name__}")
        if reason := reason_not_quantizable(linear):
            raise ValueError(f"{name} cannot be packed: {reason}")
        weight, bits = linear.weight.detach(), config.bits
        scale, zero_point = observe_weight(
            weight, bits, config.method, config.group_size, config.symmetric, f"{name}.weight"
        )
        q = weight_to_int(weight, scale, zero_point, bits, config.group_size)
        return cls.from_integers(q, scale, zero_point, linear.bias, config, name, input_range).train(linear.training)

    @classmethod
    def from_integers(
        cls,
        q: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bias: Tensor | None,
        config: LinearConfig,
        name: str = "linear",
        input_range: Sequence[float] | None = None,
        input_factor: Tensor | None = None,
    ) -> PackedLinear:
        """The layer of a weight that is integers already: W = scale * (q - zero_point). No memory is shared.

        Args:
            q: uint8 (out, in), at most 2**bits - 1.
            scale: float32 or float64, > 0, shape (1,) for method "tensor", else (out,), or (out, groups).
            zero_point: integers in [0, 2**bits - 1], the shape of ``scale``.
            bias: (out,) or None.
            config, name, input_range: as for :meth:`from_float`.
            input_factor: (in,), floating: what the input is multiplied by before anything else; None for 1.

        Raises:
            TypeError, ValueError: what came and what is accepted.
        """
        check_integers(q, scale, zero_point, config, name)
        if bias is not None and bias.shape != (len(q),):
            raise ValueError(f"the bias of {name} must have the shape ({len(q)},), got {tuple(bias.shape)}")
        if input_factor is not None and input_factor.shape != q.shape[1:]:
            shape = tuple(input_factor.shape)
            raise ValueError(f"input_factor of {name} must have the shape ({q.shape[1]},), got {shape}")
        codes = to_codes(q.clone(memory_format=torch.contiguous_format), config.bits)
        layer = cls(codes, scale.detach().clone(), zero_point.clone(), bias, config, name, input_range, input_factor)
        kernels.choose(codes.device, config.backend)  # a backend that cannot run is found out here
        return layer

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        config: LinearConfig,
        name: str = "linear",
        bias: bool = True,
        input_factor: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        scale_dtype: torch.dtype = torch.float32,
    ) -> PackedLinear:
        """A layer to load a state dict into; its integers are 0 and its scales 1 until then. ``dtype``: of the bias."""
        shape: tuple[int, ...] = (1,) if config.method == "tensor" else (out_features,)
        if config.group_size is not None:
            shape = (out_features, -(-in_features // config.group_size))
        return cls(
            torch.zeros(out_features, in_features, dtype=torch.int8, device=device),
            torch.ones(shape, device=device, dtype=scale_dtype),
            torch.zeros(shape, dtype=torch.uint8, device=device),
            torch.zeros(out_features, device=device, dtype=dtype) if bias else None,
            config,
            name,
            (0.0, 1.0) if config.activations == "static" else None,
            torch.ones(in_features, device=device, dtype=dtype) if input_factor else None,
        )

    @property
    def weight_matrix(self) -> PackedWeight:
        """The integers and their meaning, for a kernel."""
        centred = self.config.symmetric and self.config.bits == 8
        codes = self.weight_codes
        if codes is None:
            assert self.panels is not None
            codes = from_panels(self.panels, self.out_features, self.in_features, self.config.bits)
        return PackedWeight(
            codes, self.scale, self.zero_point, self.config.bits, self.in_features,
            self.config.group_size, centred,
        )  # fmt: skip

    @property
    def input_grid(self) -> InputGrid:
        """How the input becomes integers, for a kernel."""
        bits = self.config.activation_bits
        if self.config.activations != "static":
            return InputGrid(bits)
        return InputGrid(bits, self.input_scale, self.input_zero_point, self.input_correction)

    @property
    def backend(self) -> str:
        """The kernels that run this layer where it is now: "reference", "cpu", "cuda" or "native"."""
        return "native" if self._is_native() else kernels.choose(self.scale.device, self.config.backend).name

    def native_obstacle(self) -> str | None:
        """Why the native kernels cannot run this layer, wherever it is; None if they can."""
        config = self.config
        if not native.levels():
            return native.NOT_BUILT
        if not kernels.runs_native(config.backend):
            return f"backend={config.backend!r}, or what {kernels.ENVIRONMENT} says"
        if config.activations is None:
            return "activations=None: its products are in float"
        if config.activation_bits != 8:
            return f"activation_bits={config.activation_bits}"
        if config.group_size is not None:
            return f"group_size={config.group_size}"
        return None if self.scale.dtype == torch.float32 else f"a scale of {self.scale.dtype}"

    def use_native(self, use: bool = True, shared: dict[int, Any] | None = None) -> None:
        """Run on the native kernels from now on, whenever the layer is on the CPU, or no longer.

        Args:
            use: whether.
            shared: filled with what was laid out, by what it was, so that layers that share their integers still do.

        Raises:
            RuntimeError: they were not built.
            ValueError: they cannot run such a layer; the message says why.
        """
        obstacle = self.native_obstacle() if use else None
        if obstacle:
            kind = RuntimeError if obstacle == native.NOT_BUILT else ValueError
            raise kind(f"the native kernels cannot run {self.name}: {obstacle}")
        self._native = use
        self._lay_out({} if shared is None else shared)

    def prepared(self) -> native.Prepared:
        """What the native kernels take for this layer as it is now, on the CPU after :meth:`use_native`."""
        parts = self.parts()
        if self._prepared is None or not self._prepared.is_of(parts):
            self._prepared = native.Prepared(parts, self.sizes())
        return self._prepared

    def parts(self) -> native.Parts:
        """The tensors that the native kernels need, see :class:`native.Prepared`."""
        return tuple(self._buffers[key] for key in self.PARTS)

    def sizes(self) -> tuple[int, int, int]:
        """in_features, out_features, bits."""
        return self.in_features, self.out_features, self.config.bits

    def integers(self) -> Tensor:
        """The weight's integers, uint8 of shape (out_features, in_features)."""
        return self.weight_matrix.integers()

    def dequantize(self) -> Tensor:
        """The weight as real numbers, input factor included: (out_features, in_features), in the dtype of ``scale``."""
        weight = self.weight_matrix.dequantize()
        return weight if self.input_factor is None else weight * self.input_factor.to(weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features), floating -> (..., out_features), the same dtype."""
        if not input.is_floating_point() or input.ndim == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"{self.name} takes a floating tensor of shape (..., {self.in_features}), "
                f"got {input.dtype} of shape {tuple(input.shape)}"
            )
        if functional.capturing():  # detached in any grad mode: a graph recorded in one is that of the other
            return self._run(input.detach())
        if torch.is_grad_enabled() and input.requires_grad:
            result: Tensor = NoGradient.apply(input, self)
            return result
        return self._run(input)

    def _run(self, input: Tensor) -> Tensor:
        if self._is_native() and not functional.recording():
            rows = input.to(torch.float32).reshape(-1, self.in_features).contiguous()
            if torch.compiler.is_compiling():
                y = operators.native_linear(rows, self.parts(), self.sizes())
            else:
                prepared = self.prepared()  # kept alive by this name, whatever other threads do
                y = native.run_linear(prepared.linear, rows, native.level_number())
            y = y.to(input.dtype)
            return y.reshape(*input.shape[:-1], self.out_features)
        chosen = kernels.choose(self.scale.device, self.config.backend)
        if self.input_factor is not None:
            input = input * self.input_factor.to(input.dtype)
        rows = input.reshape(-1, self.in_features)  # (M, in)
        if self.config.activations is None:
            y = chosen.weight_only(rows, self.weight_matrix, self.bias)
        elif chosen.name == "cpu" and self.shares_input and self.input_factor is None and not self._forward_pre_hooks:
            y = cpu.integer(rows, self.weight_matrix, self.bias, self.input_grid, cpu.Source(input, id(self)))
        else:
            y = chosen.integer(rows, self.weight_matrix, self.bias, self.input_grid)
        return y.reshape(*input.shape[:-1], self.out_features)

    def _is_native(self) -> bool:
        return self.panels is not None and kernels.runs_native(self.config.backend)

    @property
    def _bytewise(self) -> bool:
        """Whether each code takes a byte in memory."""
        return STORED_BITS[self.config.bits] == 8 or self.config.resident == "unpacked"

    def _lay_out(self, shared: dict[int, Any] | None = None) -> None:
        """Bring the integers into panels if the native kernels run them here, or else back into rows."""
        shared = {} if shared is None else shared
        wanted = self._native and self.scale.device.type == "cpu"
        rows, panels, bits = self.weight_codes, self.panels, self.config.bits
        if wanted and rows is not None:
            if id(rows) not in shared:
                codes = self.weight_matrix.unpacked()
                shared[id(rows)] = rows, to_panels(codes, bits), sums_of(codes, bits)
            _, self.panels, self.code_sums = shared[id(rows)]
            self.weight_codes = None
        elif not wanted and panels is not None:
            if id(panels) not in shared:
                codes = self.weight_matrix.codes
                shape = (self.out_features, packed_length(self.in_features, bits))
                packed = codes.new_empty(shape, dtype=torch.uint8) if codes.is_meta else pack_codes(codes, bits)
                shared[id(panels)] = panels, codes if self._bytewise else packed
            _, self.weight_codes = shared[id(panels)]
            self.panels = self.code_sums = None

    def _correct(self) -> None:
        """Set ``input_correction`` from the other buffers as they are now."""
        if self.input_scale is not None and self.input_zero_point is not None:
            self.input_correction = correction(self.weight_matrix, self.input_scale, self.input_zero_point)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        kept = {name: self._buffers.get(name) for name in ("scale", "input_scale", "input_correction")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if buffer is not None:
                setattr(self, name, moved(buffer, getattr(self, name).device))
        self._lay_out()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # pointers

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._bytewise or self.weight_codes is None:
            destination[prefix + "weight_codes"] = pack_codes(self.weight_matrix.codes, self.config.bits)
        kept = dict(destination)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(kept)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = self.state_dict()
        saved = {key: state_dict.get(prefix + key) for key in own}
        if prefix + "weight" in state_dict:
            raise ValueError(
                f"{prefix}weight: this state dict is of a float model, or of one quantized with execution='emulated'; "
                f"{self.name} is packed. Load it into such a model, then quantize that"
            )
        check_settings(saved["settings"], own["settings"], prefix[:-1] or self.name)
        check_static_state(state_dict, prefix, self.config.activations == "static", self.name)
        native, self._native = self._native, False
        self._lay_out()  # into rows, where a state dict goes
        try:
            self._load_rows(state_dict, prefix, saved["weight_codes"], own["weight_codes"], *args)
        finally:
            self._native = native
            self._lay_out()

    def _load_rows(
        self, state_dict: dict[str, Any], prefix: str, packed: Tensor | None, own: Tensor, *args: Any
    ) -> None:
        if self._bytewise and packed is not None and packed.shape == own.shape:
            # of another shape: the error that every module gives
            codes = unpack_codes(packed, self.config.bits, self.in_features)
            state_dict = {**state_dict, prefix + "weight_codes": codes}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._correct()

    def extra_repr(self) -> str:
        config = self.config
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        parts.append(f"bits={config.bits}, method={config.method}, activations={config.activations}")
        if config.activation_bits != 8:
            parts.append(f"activation_bits={config.activation_bits}")
        if config.group_size is not None:
            parts.append(f"group_size={config.group_size}")
        if config.symmetric:
            parts.append("symmetric")
        if config.backend != "auto":
            parts.append(f"backend={config.backend}")
        return ", ".join(parts)


class NoGradient(torch.autograd.Function):
    """Runs a layer, or a block of them; the backward pass is an error that says what to do instead."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: Any) -> Tensor:
        ctx.layer_name = layer.name
        result: Tensor = layer._run(input)
        return result.clone() if result._is_view() else result  # views cannot be added to in place, as timm's BEiT does

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.layer_name} holds packed integers and has no gradient; to train or to differentiate, quantize with "
            "ViTQuantizer(..., execution='emulated')"
        )
