"""ExportReport: what was written to a file, and how it was found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fairseq.quantization.evaluation.report import megabytes


@dataclass(frozen=True)
class ExportReport:
    """What :func:`~fairseq.quantization.export.export.export` wrote, and how it was found.

    Attributes:
        format: "onnx", "openvino", "torchscript", "torch_export" or "c".
        paths: the file, and the one with its constants if there is one.
        bytes: of all files.
        integer_weights: number of tensors that hold packed weights.
        integer_weight_bytes: of them.
        float_weight_bytes: of all float tensors.
        integer_nodes: how often each operator on integers occurs; ONNX and OpenVINO only.
        outputs: their names, in order.
        max_difference: the largest from the model's outputs, over both batches.
        mean_difference: the mean of the absolute differences.
        tolerance: what ``max_difference`` was allowed to be.
        top1_agreement: share of rows of the first output with the same largest entry.
    """

    format: str
    paths: tuple[str, ...]
    bytes: int
    integer_weights: int
    integer_weight_bytes: int
    float_weight_bytes: int
    integer_nodes: dict[str, int]
    outputs: tuple[str, ...]
    max_difference: float
    mean_difference: float
    tolerance: float
    top1_agreement: float

    def __str__(self) -> str:
        found = (
            f"run by itself, {', '.join(self.outputs)} differ by at most {self.max_difference:.2g} (allowed "
            f"{self.tolerance:.2g}), {self.mean_difference:.2g} on average; same top-1 for {self.top1_agreement:.0%}"
        )
        if self.format == "c":
            found = "not run; two pictures and their logits are in it, which the program compares when it is given none"
        nodes = ", ".join(f"{count} {name}" for name, count in self.integer_nodes.items())
        return "\n".join([
            f"{self.format}: {', '.join(self.paths)}, {megabytes(self.bytes)}",
            f"{self.integer_weights} integer weights, {megabytes(self.integer_weight_bytes)}; "
            f"floats {megabytes(self.float_weight_bytes)}" + (f"; {nodes}" if nodes else ""),
            found,
        ])  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
