"""Point: the size of one packed model, and how near it is to the float one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Point:
    """One packed model.

    Attributes:
        bits: per weight of the quantized layers, on average.
        bytes: of what is saved, whatever is in float included.
        agreement: the share of pictures, 0 to 1, that have the float model's class; None for models without classes.
        error: KL divergence from the float model's classes in nats; without classes the squared error as a share.
        overrides: the widths of its layers, for ``ViTQuantizer(overrides=...)``; {} where all have one.
    """

    bits: float
    bytes: int
    agreement: float | None
    error: float
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def mixed(self) -> bool:
        """Whether its widths were chosen layer by layer."""
        return bool(self.overrides)
