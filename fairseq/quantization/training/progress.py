"""Progress: how far a training is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Progress(NamedTuple):
    """What is told of a training each time that it logs.

    Attributes:
        step, steps: how many are done, and how many there are.
        epoch: how often the pictures were seen.
        losses: means since the last time: "loss", which is minimized, of all processes; its parts "loss_outputs",
            "loss_features", "loss_attention", unweighted, of this one.
        seconds_left: at the pace so far.
    """

    step: int
    steps: int
    epoch: float
    losses: Mapping[str, float]
    seconds_left: float

    def __str__(self) -> str:
        losses = ", ".join(f"{name.replace('loss_', '')} {value:.4g}" for name, value in self.losses.items())
        minutes, seconds = divmod(round(self.seconds_left), 60)
        left = f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
        return f"step {self.step} of {self.steps}, epoch {self.epoch:.2f}: {losses}; {left} left"
