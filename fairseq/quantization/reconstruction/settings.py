"""Reconstruction: how long and how fast the blocks of a model learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from fairseq.quantization.architectures.plan import LayerPlan, ModelPlan
from fairseq.quantization.calibration import processes
from fairseq.quantization.calibration.calibration import Calibration
from fairseq.quantization.calibration.statistics import BATCH_SIZE
from fairseq.quantization.config import QuantizationConfig, resolve_rounding

if TYPE_CHECKING:
    from fairseq.quantization.reconstruction.reconstruct import Reconstructor

MIN_PICTURES = 16
"""Fewer tell a block nothing that holds for others."""


class Rates(NamedTuple):
    """How one block learns; see :class:`Reconstruction`."""

    batch_size: int
    integer_rate: float
    scale_rate: float
    bias_rate: float


FINE = Rates(batch_size=16, integer_rate=1e-2, scale_rate=3e-4, bias_rate=3e-4)
"""Of blocks whose activations have 8 bits or more."""
COARSE = Rates(batch_size=4, integer_rate=2e-2, scale_rate=1e-3, bias_rate=1e-3)
"""Of blocks with activations of fewer than 8 bits; with rounding "auto" these begin without corrections."""
COARSE_STEPS = 225
"""With more steps those rates fall, so that weights go as far: farther, they learn the pictures by heart."""


@dataclass(frozen=True)
class Reconstruction:
    """The settings of block reconstruction; the guide has a page on it.

    Attributes:
        epochs: passes over the calibration pictures for each block, at least 1.
        minutes: instead of ``epochs``, at most about so many for learning all blocks on this machine, > 0: a few steps
            are timed, and as many epochs made as fit, one at least, with no second attempts. The same integers on
            another day need ``epochs``.
        batch_size: pictures a step, a multiple of 4. None, for this and for each of the rates: 16, and 1e-2, 3e-4 and
            3e-4. In a block with activations of fewer than 8 bits 4, and 2e-2, 1e-3 and 1e-3 for up to 225 steps in
            all; with more steps less in proportion.
        integer_rate: the step of a weight before it is rounded, in units of its integers; > 0.
        scale_rate: the step of the logarithm of a scale; 0 leaves the scales.
        bias_rate: the step of biases, and of the gains and biases of norms; 0 leaves them.

    Raises:
        TypeError, ValueError: what came and what is accepted.
    """

    epochs: int = 10
    minutes: float | None = None
    batch_size: int | None = None
    integer_rate: float | None = None
    scale_rate: float | None = None
    bias_rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if value is None and name == "batch_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                accepted = "an int of at least 1" if name == "epochs" else "an int of at least 1, or None"
                raise TypeError(f"{name} of a Reconstruction must be {accepted}, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} of a Reconstruction must be at least 1, got {value}")
        if self.batch_size is not None and self.batch_size % BATCH_SIZE:
            raise ValueError(
                f"batch_size of a Reconstruction must be a multiple of {BATCH_SIZE}, got {self.batch_size}"
            )
        for name in ("minutes", "integer_rate", "scale_rate", "bias_rate"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} of a Reconstruction must be a number, or None, got {value!r}")
            positive = name in ("integer_rate", "minutes")
            if not (value > 0 if positive else value >= 0) or value == float("inf"):
                raise ValueError(f"{name} of a Reconstruction must be {'more than' if positive else 'at least'} 0 and "
                                 f"finite, got {value}")  # fmt: skip

    def rates(self, layers: Iterable[LayerPlan], epochs: int, steps: Callable[[int], int]) -> Rates:
        """The rates of a block: what was given, else :data:`FINE` or :data:`COARSE`.

        Args:
            layers: of the block, those that learn.
            epochs: how many there are going to be.
            steps: the steps of one with so many pictures each.
        """
        given = {name: value for name in Rates._fields if (value := getattr(self, name)) is not None}
        if not any(_coarse(layer) for layer in layers):
            return FINE._replace(**given)
        size = given.get("batch_size", COARSE.batch_size)
        share = min(1.0, COARSE_STEPS / (epochs * steps(size)))
        return Rates(size, *(share * rate for rate in COARSE[1:]))._replace(**given)

    def check(self, pictures: int, resumable: bool) -> None:
        """See whether blocks can be learned.

        Args:
            pictures: how many there are, each counted once.
            resumable: an interrupted run is to go on to the same integers.

        Raises:
            ValueError: fewer pictures than 16, several processes, or minutes where epochs are needed.
        """
        if processes.count() > 1:
            raise ValueError(f"reconstruct=True runs in one process; there are {processes.count()}")
        if pictures < MIN_PICTURES:
            raise ValueError(
                f"reconstruct=True learns from calibration pictures and needs at least {MIN_PICTURES}; got {pictures}"
            )
        if resumable and self.minutes is not None:
            raise ValueError("resume= needs a Reconstruction of so many epochs: how many fit in minutes changes")

    def start(self, plan: ModelPlan) -> ModelPlan:
        """The plan of a model whose blocks learn: with coarse activations "auto" corrects nothing there.

        A correction fits the pictures so closely that they have little left to teach. Where activations are rounded to
        fewer than 8 bits, learning does better than it. There "auto" is coordinate or, above 4 bits and with "tensor",
        gptq, each without corrections; docs/results.rst has the figures.
        """
        learning = learned_blocks(plan)

        def begun(layer: LayerPlan) -> LayerPlan:
            if not layer.chosen or layer.block not in learning or not plan.reaches(layer.name):
                return layer
            settings = layer.settings
            if settings.rounding != "auto" or not _coarse(layer):
                return layer
            chosen = resolve_rounding("auto", True, settings.bits, settings.method)
            rounding = chosen if chosen == "coordinate" else "gptq"
            return replace(layer, decision=replace(settings, rounding=rounding), corrected=False)

        return replace(plan, layers={name: begun(layer) for name, layer in plan.layers.items()})

    def learner(
        self, model: nn.Module, plan: ModelPlan, calibration: Calibration, config: QuantizationConfig
    ) -> Reconstructor:
        """What learns the blocks of ``model``, which is being quantized."""
        from fairseq.quantization.reconstruction.reconstruct import Reconstructor

        return Reconstructor(model, plan, calibration, self, config.seed)


def _coarse(layer: LayerPlan) -> bool:
    """Whether a chosen layer's activations have fewer than 8 bits."""
    return layer.settings.activation_bits < 8


def learned_blocks(plan: ModelPlan) -> list[str]:
    """The names of the blocks that learn, in order: pictures reach them, and they share no parameter with others."""
    known = {layer.block for layer in plan.chosen if plan.reaches(layer.name)}
    return [name for name in plan.blocks() if name in known and name not in plan.tied_blocks]


def resolve_reconstruction(reconstruct: object) -> Reconstruction | None:
    """What ``quantize_model(reconstruct=...)`` means: None for False, the defaults for True, or what was given.

    Raises:
        TypeError: anything else.
    """
    if isinstance(reconstruct, Reconstruction):
        return reconstruct
    if isinstance(reconstruct, bool):
        return Reconstruction() if reconstruct else None
    raise TypeError(f"reconstruct must be True, False or a Reconstruction(...), got {reconstruct!r}")
