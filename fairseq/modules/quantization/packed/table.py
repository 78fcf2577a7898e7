"""PackedTable: rows of integers that are dequantized when read, in place of an embedding or of a parameter."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.context import default_device, plain_context
from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.packed.packing import packed_length, unpack
from fairseq.modules.quantization.packed.weight import code_offset, pack_codes, to_codes
from fairseq.modules.quantization.scalar.modules.replace import moved
from fairseq.modules.quantization.scalar.weights import (
    check_settings,
    observe_weight,
    settings_tensor,
    weight_to_int,
    weight_to_real,
)


class PackedTable(nn.Module):
    """real = scale * (q - zero_point), a scale and zero point for each row (and group of columns).

    The constructor makes a table to load a state dict into; all its integers are 0 until then.

    Args:
        rows, columns: of the table.
        config: its bits, group_size and symmetric count; the method is "channel" or "histogram".
        name: how errors call the table.
        device: of the buffers.
        dtype: of what is read; ``.to()`` and ``.half()`` change it, and no scale.

    Buffers, in the state dict:
        weight_codes: the packed integers, uint8 (rows, bytes per row).
        scale: float32, (rows,) or (rows, groups); zero_point: uint8, the same shape.
        settings: int32 (4,): bits, columns, group_size (0 for none), 1 if symmetric.

    Raises:
        ValueError: method "tensor".
    """

    weight_codes: Tensor
    scale: Tensor
    zero_point: Tensor
    settings: Tensor
    like: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        config: LinearConfig,
        name: str = "table",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if config.method == "tensor":
            raise ValueError(f"{name} has a scale for each row; method must be 'channel' or 'histogram', got 'tensor'")
        self.rows, self.columns, self.config, self.name = rows, columns, config, name
        shape = (rows,) if config.group_size is None else (rows, -(-columns // config.group_size))
        with plain_context(default_device() if device is None else device):
            width = packed_length(columns, config.bits)
            self.register_buffer("weight_codes", torch.zeros(rows, width, dtype=torch.uint8))
            self.register_buffer("scale", torch.ones(shape))
            self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.uint8))
            settings = settings_tensor(config.bits, columns, config.group_size, config.symmetric)
            self.register_buffer("settings", settings.to(self.scale.device))
            self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @plain_context()
    def quantize_(self, table: Tensor) -> None:
        """Take the integers of a table, (rows, columns), finite, each to the nearest."""
        config = self.config
        scale, zero_point = observe_weight(
            table, config.bits, config.method, config.group_size, config.symmetric, self.name
        )
        self.set_integers(weight_to_int(table, scale, zero_point, config.bits, config.group_size), scale, zero_point)

    def set_integers(self, q: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Take integers, uint8 (rows, columns), with their scales and zero points, (rows,) or (rows, groups)."""
        self.weight_codes = pack_codes(to_codes(q, self.config.bits), self.config.bits)
        self.scale, self.zero_point = scale.float(), zero_point.to(torch.uint8)

    def read(self, rows: Tensor | None = None) -> Tensor:
        """The rows with these numbers, or all in order: (..., columns), in the table's dtype."""
        codes, scale, zero_point = self.weight_codes, self.scale, self.zero_point
        if rows is not None:
            flat = rows.reshape(-1)
            codes, scale, zero_point = codes[flat], scale[flat], zero_point[flat]
        real = weight_to_real(self._unpacked(codes), scale, zero_point, self.config.group_size).to(self.like.dtype)
        return real if rows is None else real.view(*rows.shape, self.columns)

    def integers(self) -> Tensor:
        """uint8, (rows, columns)."""
        return self._unpacked(self.weight_codes)

    def _unpacked(self, codes: Tensor) -> Tensor:
        """The integers of some rows; without a view as another dtype, which exporters do not know."""
        bits = self.config.bits
        return codes ^ code_offset(bits) if bits == 8 else unpack(codes, bits, self.columns)

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """As :meth:`read`."""
        return self.read(rows)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedTable:
        kept = self.scale
        super()._apply(fn, recurse)
        self.scale = moved(kept, self.scale.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check_settings(state_dict.get(prefix + "settings"), self.settings, prefix[:-1] or self.name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, bits={self.config.bits}"


class PackedEmbedding(PackedTable):
    """An ``nn.Embedding`` that holds integers: (...) numbers of rows -> (..., embedding_dim)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        config: LinearConfig,
        name: str = "embedding",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, config, name, device, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    @classmethod
    @plain_context()
    def from_float(cls, embedding: nn.Embedding, config: LinearConfig, name: str) -> PackedEmbedding:
        """Quantize ``embedding``, which is not changed.

        Raises:
            ValueError: its weight is not finite.
        """
        weight = embedding.weight.detach()
        rows, columns = weight.shape
        new = cls(rows, columns, config, name, weight.device, weight.dtype, embedding.padding_idx)
        new.quantize_(weight)
        return new.train(embedding.training)

    @property
    def weight(self) -> Tensor:
        """All rows, (num_embeddings, embedding_dim); computed at each access."""
        return self.read()


class PackedParameters(nn.Module):
    """Put before the class of a module: parameters of shape (1, rows, columns) that are read from packed tables.

    Where the module had ``name`` it has a :class:`PackedTable` called ``packed_name``, and ``module.name`` is
    computed from it at each access.
    """

    packed_names: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, (type(self).__mro__[2], self.packed_names), self.__dict__


@plain_context()
def pack_parameter(module: nn.Module, name: str, config: LinearConfig, full_name: str) -> PackedTable:
    """Replace a parameter of ``module``, (1, rows, columns), by a packed table, in place; return that.

    Raises:
        ValueError: a parameter of another shape, or not finite.
    """
    parameter = module.get_parameter(name)
    if parameter.ndim != 3 or len(parameter) != 1:
        raise ValueError(f"{full_name} must be of shape (1, rows, columns) to be packed, got {tuple(parameter.shape)}")
    value = parameter.detach()[0]
    table = PackedTable(value.shape[0], value.shape[1], config, full_name, value.device, value.dtype)
    table.quantize_(value)
    install_table(module, name, table)
    return table


def install_table(module: nn.Module, name: str, table: PackedTable) -> None:
    """Put ``table`` in the place of a parameter of ``module``, or of the table that took it before."""
    if name in module._parameters:
        del module._parameters[name]
        module.__class__ = with_packed(type(module), (name,))
    module.add_module(f"packed_{name}", table.train(module.training))


@plain_context()
def unpack_parameters(module: PackedParameters) -> None:
    """Undo :func:`pack_parameter`, in place, with the rounded values."""
    names = module.packed_names
    module.__class__ = type(module).__mro__[2]
    for name in names:
        value = cast(PackedTable, module._modules.pop(f"packed_{name}")).read()
        module.register_parameter(name, nn.Parameter(value.unsqueeze(0)))


def with_packed(kind: Any, names: tuple[str, ...]) -> Any:
    """The class of a ``kind`` whose parameters of these ``names`` are packed, added to those that are already."""
    if issubclass(kind, PackedParameters):
        return _packed_class(kind.__mro__[2], (*kind.packed_names, *names))
    return _packed_class(kind, names)


@functools.cache
def _packed_class(kind: Any, names: tuple[str, ...]) -> Any:
    def reader(name: str) -> property:
        return property(lambda self: self._modules[f"packed_{name}"].read().unsqueeze(0))

    members = {
        "__module__": kind.__module__, "__doc__": kind.__doc__, "packed_names": names,
        "__jit_unused_properties__": [*getattr(kind, "__jit_unused_properties__", []), *names],
        **{name: reader(name) for name in names},
    }  # fmt: skip
    return type(kind.__name__, (PackedParameters, kind), members)


def _new(kind: type, names: tuple[str, ...]) -> Any:
    """An empty module with packed parameters, for pickle and copy, which know no class made on the fly."""
    packed = with_packed(kind, names)
    return packed.__new__(packed)
