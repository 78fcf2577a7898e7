"""LinearConfig: how one Linear becomes integers and runs on them, validated once."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.modules.quantization.scalar.ops import check_bits, check_method
from fairseq.modules.quantization.scalar.weights import check_group_size

ACTIVATIONS = ("dynamic", "static", None)
WEIGHT_STORAGE = ("packed", "unpacked")
BACKENDS = ("auto", "reference", "cpu", "floats", "cuda", "triton", "native")


@dataclass(frozen=True)
class LinearConfig:
    """The settings of one layer.

    Attributes:
        bits: 2 to 8.
        method: "tensor" (one scale for the weight), "channel" (one per output channel) or "histogram" (one per output
            channel, clipped where the squared error is smallest).
        activations: "dynamic" (one scale per token, computed on the fly; integer products), "static" (one scale and
            zero point, from a calibrated range; integer products) or None (the weight is dequantized and multiplied in
            the model's dtype).
        group_size: input channels that share a scale within an output channel, 32 to 128 in steps of 8; None for all.
        symmetric: the weight's zero point is in the middle of the grid.
        weight_storage: "packed" keeps the weight's bits in memory and unpacks at each call; "unpacked" keeps a byte
            each, for speed. What is saved is the same.
        backend: "auto", or the kernels that must run: "reference", "cpu", "floats", "cuda", "triton", or "native", the
            compiled ones.
        activation_bits: 2 to 8; of the integers that activations become. Their product is one of int8 all the same.

    Raises:
        TypeError, ValueError: what came and what is accepted.
    """

    bits: int = 8
    method: str = "tensor"
    activations: str | None = "dynamic"
    group_size: int | None = None
    symmetric: bool = False
    weight_storage: str = "packed"
    backend: str = "auto"
    activation_bits: int = 8

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_method(self.method)
        check_group_size(self.group_size, self.method)
        check_one_of("activations", self.activations, ACTIVATIONS)
        check_one_of("weight_storage", self.weight_storage, WEIGHT_STORAGE)
        check_one_of("backend", self.backend, BACKENDS)
        check_flag("symmetric", self.symmetric)
        try:
            check_bits(self.activation_bits)
        except (TypeError, ValueError) as error:
            raise type(error)(f"activation_{error}") from None
        if self.activations is None and self.activation_bits != 8:
            raise ValueError(
                f"activations=None rounds no activations and takes no activation_bits={self.activation_bits}"
            )

    @property
    def resident(self) -> str:
        """:attr:`weight_storage` by its former name."""
        return self.weight_storage

    def summary(self) -> str:
        """The settings as a layer prints them; what is a default is left out."""
        parts = [f"bits={self.bits}, method={self.method}, activations={self.activations}"]
        if self.activation_bits != 8:
            parts.append(f"activation_bits={self.activation_bits}")
        if self.group_size is not None:
            parts.append(f"group_size={self.group_size}")
        if self.symmetric:
            parts.append("symmetric")
        if self.backend != "auto":
            parts.append(f"backend={self.backend}")
        return ", ".join(parts)


def check_one_of(name: str, value: object, accepted: tuple[str | None, ...]) -> None:
    """ValueError unless ``value`` is one of ``accepted``."""
    if not (value is None or isinstance(value, str)) or value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}")


def check_flag(name: str, value: object) -> None:
    """TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
