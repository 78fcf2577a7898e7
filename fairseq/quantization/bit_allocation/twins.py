"""Twins: every layer of a model at several widths, each rounded as it will be, beside a packed copy that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.linear import use_native
from fairseq.modules.quantization.scalar.modules.replace import carry_hooks, names_of
from fairseq.modules.quantization.scalar.ops import check_bits
from fairseq.quantization.architectures.copies import copied
from fairseq.quantization.architectures.forward import Pixels
from fairseq.quantization.architectures.plan import LayerPlan, check_model, resolve
from fairseq.quantization.architectures.separate import separated
from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.conversion.convert import convert, finish
from fairseq.quantization.conversion.quantize_layer import quantize_layer
from fairseq.quantization.conversion.quantize_stage import packed_twin
from fairseq.quantization.rounding.statistics import Statistics

CHOICES = (2, 3, 4, 5, 6, 8)


class Twins:
    """A model quantized with every layer at its widest, and for each layer a twin at each of its other widths.

    All of them are rounded on the same pictures by the rounding of ``config``, after the same equalization, with its
    activations: a model with some layers changed for their twins runs what a model of those widths runs. It is not the
    very model: the input of a layer changes a little with the widths of those before it, and rounding follows it, as
    do the factors of equalization where activations are narrow or static. Layers that share a weight share its integers
    in the end if they get one width, while twins are rounded each for itself. And up to 4 bits the layer that ends a
    block makes up for the drift of its inputs here, and for all that its block is missing there.

    In memory all widths together take about 4.5 bytes for each weight.

    Args:
        model: the float model; it stays as it is.
        pixel_values: calibration images, (N, C, H, W), or None to round to nearest without any.
        config: selects the layers, and says all but their widths; a width that an override gives is a layer's only one.
        choices: the widths of all other layers, 2 to 8.

    Attributes:
        plan: of the float model.
        model: the packed model with every layer at its widest, layer by layer, on the native kernels where they run.
        layers: layer name -> width, from narrow to wide -> the layer.
        noise: layer name -> width -> the squared error of the layer's output as a share of that output's square.

    Raises:
        TypeError, ValueError: choices are not as above; layers are of a text tower, which pictures do not reach; or as
            :func:`~fairseq.quantization.conversion.convert.convert`.
    """

    def __init__(
        self,
        model: nn.Module,
        pixel_values: Pixels | None,
        config: QuantizationConfig,
        choices: Sequence[int] = CHOICES,
    ):
        check_model(model)
        self.choices = _check_choices(choices)
        self.config = replace(config, bits=max(self.choices), execution="packed")
        model = separated(model)
        self.plan = resolve(model, self.config, pixel_values)
        unseen = [layer.name for layer in self.plan.chosen if layer.tower == "text"]
        if unseen:
            raise ValueError(
                f"towers={config.towers!r} selects {unseen[0]} and other layers of the text tower, and pictures do not "
                "reach them; measure with towers='vision'"
            )
        self.layers: dict[str, dict[int, PackedLinear]] = {layer.name: {} for layer in self.plan.chosen}
        self.noise: dict[str, dict[int, float]] = {layer.name: {} for layer in self.plan.chosen}
        self.model, report = convert(model, self.config, pixel_values, engine="layers", watch=self._round)
        errors = {layer.name: _noise(layer.output_sqnr, layer.weight_sqnr) for layer in report.quantized}
        for name, own in self.layers.items():
            layer = self.model.get_submodule(name)
            assert isinstance(layer, PackedLinear)
            own[layer.config.bits], self.noise[name][layer.config.bits] = layer, errors[name]
        self.model.eval()
        _run_natively([module for module in self.model.modules() if isinstance(module, PackedLinear)])

    @property
    def weights(self) -> dict[str, int]:
        """Layer name -> the number of its weights."""
        return {n: own[max(own)].in_features * own[max(own)].out_features for n, own in self.layers.items()}

    @property
    def bytes(self) -> dict[str, dict[int, int]]:
        """Layer name -> width -> the bytes that are saved of it."""
        return {name: {bits: stored_bytes(layer) for bits, layer in own.items()} for name, own in self.layers.items()}

    @property
    def other_bytes(self) -> int:
        """The bytes that are saved of all that is not in these layers."""
        return stored_bytes(self.model) - sum(own[max(own)] for own in self.bytes.values())

    def assembled(self, bits: Mapping[str, int]) -> nn.Module:
        """A packed model with these widths, its blocks fused where they can be; it may share memory with the twins."""
        result = sharing(self.model)
        for name, width in bits.items():
            put(result, name, sharing(self.layers[name][width]))
        finish(result, "auto")
        return result.eval()

    def _round(self, layer: LayerPlan, linear: nn.Linear, statistics: Statistics | None, factor: Tensor | None) -> None:
        """Make the twins of one layer."""
        for bits in self.choices if self._is_free(layer.name) else ():
            if bits == layer.settings.bits:
                continue
            settings = replace(layer.settings, bits=bits)
            rounded = quantize_layer(linear.weight, linear.bias, statistics, settings, layer.name)
            twin = packed_twin(linear, rounded, layer, factor)
            carry_hooks(linear, twin)
            _run_natively([twin])
            self.layers[layer.name][bits] = twin
            self.noise[layer.name][bits] = _noise(rounded.record.get("output_sqnr"), rounded.record["weight_sqnr"])

    def _is_free(self, name: str) -> bool:
        """Whether no override gives the layer its width."""
        return len({replace(self.config, bits=bits).for_layer(name).bits for bits in (2, 8)}) > 1


def stored_bytes(module: nn.Module) -> int:
    """The bytes of what is saved of a packed model or layer: each tensor of its state dict, a shared one each time.

    Integers take as many bits there as they have. In memory the native kernels hold 2 and 3 bits in 4, and 5 to 7 in 8.
    """
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def sharing(module: nn.Module) -> nn.Module:
    """A copy with the same tensors."""
    return copied(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put another layer in the place of the one called ``name``, wherever the model has it."""
    for alias in names_of(model, model.get_submodule(name)):
        model.set_submodule(alias, layer)


def _run_natively(layers: Sequence[PackedLinear]) -> None:
    use_native(layer for layer in layers if layer.reason_not_native() is None)


def _noise(output_sqnr: float | None, weight_sqnr: float | None) -> float:
    """The error as a share of the signal, of what the layer gives, or of its weight where no picture reaches it."""
    decibels = weight_sqnr if output_sqnr is None else output_sqnr
    return 0.0 if decibels is None else 10 ** (-decibels / 10)


def _check_choices(choices: Sequence[int]) -> list[int]:
    if not isinstance(choices, Sequence) or not len(choices):
        raise ValueError(f"choices must hold at least one bit width, such as {CHOICES}; got {choices!r}")
    for bits in choices:
        check_bits(bits)
    return sorted(set(choices))
