"""PackedLinear: a Linear that holds n-bit integers and runs on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.context import default_device, plain_context
from fairseq.modules.quantization.packed import kernels
from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.packed.gradient import StraightThrough, inside_grid, transformed
from fairseq.modules.quantization.packed.kernels import functional, library, memory, native, native_calls, operators
from fairseq.modules.quantization.packed.state import PackedState
from fairseq.modules.quantization.packed.weight import check_integers, to_codes
from fairseq.modules.quantization.scalar.modules.replace import reason_not_quantizable
from fairseq.modules.quantization.scalar.weights import observe_weight, weight_to_int


class PackedLinear(PackedState):
    """``y = x @ W.T + b``, W = scale * (q - zero_point) held as integers q of ``config.bits`` bits; for inference.

    With ``activations="dynamic"`` each token of x is rounded by its own scale and multiplied in integers; with "static"
    by one fixed scale and zero point, and what is outside of their range saturates; with None the weight is dequantized
    and multiplied in the dtype of x; or, on the native kernels, x is rounded to bfloat16 and its products with
    q - zero_point are added up in float32. The output has the dtype of x. A NaN makes the outputs of its token NaN, and
    an Inf makes them NaN or Inf unless it saturates.

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

    A scale keeps its dtype in ``.half()``. The gradient goes straight through to the input; the integers have none.

    After :meth:`use_native`, on the CPU, weight_codes lies in panels, as the native kernels read it, with code_sums,
    int32 (out_features,) or of each group, above 4 bits; see
    :class:`~fairseq.modules.quantization.packed.layout.Layout`. The state dict has rows all the same, and rows are what
    it loads.
    """

    @classmethod
    @plain_context()
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
    @plain_context()
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
        if config.backend == "native":
            layer.use_native()
        layer._kernels()  # a backend that cannot run is found out here
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
        device = default_device() if device is None else device
        shape: tuple[int, ...] = (1,) if config.method == "tensor" else (out_features,)
        if config.group_size is not None:
            shape = (out_features, -(-in_features // config.group_size))
        with plain_context():
            layer = cls(
                torch.zeros(out_features, in_features, dtype=torch.int8, device=device),
                torch.ones(shape, device=device, dtype=scale_dtype),
                torch.zeros(shape, dtype=torch.uint8, device=device),
                torch.zeros(out_features, device=device, dtype=dtype) if bias else None,
                config,
                name,
                (0.0, 1.0) if config.activations == "static" else None,
                torch.ones(in_features, device=device, dtype=dtype) if input_factor else None,
            )
        if config.backend == "native":
            layer.use_native()
        return layer

    @property
    def backend(self) -> str:
        """The kernels that run this layer where it is now: "reference", "cpu", "floats", "cuda", ..."""
        return self._kernels().name

    def reason_not_native(self) -> str | None:
        """Why the native kernels cannot run this layer, wherever it is; None if they can."""
        return kernels.reason_not_native(self.config, self.scale.dtype)

    def reason_not_triton(self) -> str | None:
        """Why the kernels of fused blocks on a GPU cannot run this layer, wherever it is; None if they can."""
        return kernels.reason_not_triton(self.config, self.scale.dtype)

    def use_native(self, use: bool = True) -> None:
        """Run on the native kernels from now on, whenever the layer is on the CPU, or no longer.

        Raises:
            RuntimeError: they were not built.
            ValueError: they cannot run such a layer; the message says why.
        """
        use_native([self], use)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features), floating -> (..., out_features), the same dtype."""
        if not input.is_floating_point() or input.ndim == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"{self.name} takes a floating tensor of shape (..., {self.in_features}), "
                f"got {input.dtype} of shape {tuple(input.shape)}"
            )
        if functional.capturing():  # detached in any grad mode: a graph recorded in one is that of the other
            y = self._run(input.detach())
            return self._with_gradient(input, y) if functional.compiled_with_gradient(input) else y
        derived = transformed(input)
        if derived and any(map(torch._C._functorch.is_functorch_wrapped_tensor, self.buffers())):
            parts = "integers, scales and bias"
            raise RuntimeError(f"torch.func can transform the input of {self.name}, but not its {parts}")
        if derived or (torch.is_grad_enabled() and input.requires_grad):
            result: Tensor = StraightThrough.apply(input, self)
            return result
        return self._run(input)

    def _with_gradient(self, input: Tensor, y: Tensor) -> Tensor:
        """``y`` in a compiler's graph, with the gradient that :class:`StraightThrough` gives."""
        if self.config.activations == "static":
            input = torch.where(inside_grid(self, input.detach()), input, input.detach())
        result: Tensor = operators.straight_through(input, y, self.dequantize().to(input.dtype))
        return result

    def _kernels(self) -> kernels.Kernels:
        natively = self.weight_codes.ndim == 3
        if natively and self.config.activations is None:
            natively = not native_calls.attention_is_exact()
        return kernels.choose(self.scale.device, self.config.backend, natively)

    def _run(self, input: Tensor) -> Tensor:
        chosen = self._kernels()
        if chosen.name == "native" and not functional.recording() and functional.plain(input, self.weight_codes):
            return self._run_native(input)
        if self.input_factor is not None:
            input = input * self.input_factor.to(input.dtype)
        rows = input.reshape(-1, self.in_features)  # (M, in)
        if self.config.activations is None:
            y = chosen.weight_only(rows, self.weight_matrix, self.bias)
        else:
            y = chosen.integer(rows, self.weight_matrix, self.bias, self.input_grid)
        return y.reshape(*input.shape[:-1], self.out_features)

    def _run_native(self, input: Tensor) -> Tensor:
        rows = input.to(torch.float32).reshape(-1, self.in_features).contiguous()
        if torch.compiler.is_compiling():
            y = operators.native_linear(rows, self.parts(), self.sizes())
        else:
            prepared = self.prepared()  # kept alive by this name, whatever other threads do
            y = native_calls.run_linear(prepared.linear, rows, native.level_number())
        return y.to(input.dtype).reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self.config.summary()}"


def use_native(layers: Iterable[PackedLinear], use: bool = True) -> None:
    """:meth:`PackedLinear.use_native` for each; layers that share their integers still do."""
    twins: dict[int, list[PackedLinear]] = {}
    for layer in layers:
        if use and (reason := layer.reason_not_native()):
            kind = RuntimeError if reason == library.NOT_BUILT else ValueError
            raise kind(f"the native kernels cannot run {layer.name}: {reason}")
        twins.setdefault(id(layer.weight_codes), []).append(layer)
    for first, *others in twins.values():
        first.native = use
        first._place()
        for layer in others:
            layer.native, layer.layout = use, first.layout
    _gather([first for first, *others in twins.values() if not others and first.panels is not None])


def _gather(layers: list[PackedLinear]) -> None:
    """Move the panels of layers one behind the other, unless they lie so."""
    if len({layer.weight_codes.untyped_storage().data_ptr() for layer in layers}) < 2:
        return
    with plain_context():
        places = memory.on_large_pages([layer.weight_codes.numel() for layer in layers])
        for layer, place in zip(layers, places, strict=True):
            layer.weight_codes = place.view(layer.weight_codes.shape).copy_(layer.weight_codes)
