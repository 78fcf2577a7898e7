r"""Makes docs/support.rst from what the tests of every family said on two versions of transformers.

    pytest tests/quantization -m "matrix or not matrix" -k "families or other_heads or checkpoint or huggingface" \
        --junitxml=build/support-5.24.xml
    PYTHONPATH=tests python tests/support_matrix.py 4.57=build/support-4.57.xml 5.24=build/support-5.24.xml

A tick stands for a test that passed on all of these versions, and a note for an exception; a test that failed, or was
not run, stops the script.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

from families import BUILDERS
from other_heads import KINDS
from quantization.architectures.test_other_heads import NO_EMBEDDINGS
from quantization.export.test_families import REFUSED, REFUSED_BY_TORCH_2_9
from quantization.export.test_other_heads import NAMES as EXPORTED
from quantization.export.test_other_heads import REFUSED as REFUSED_OTHERS
from quantization.export.test_other_heads import REFUSED_BY_TORCH_2_9 as LATE_OTHERS

from fairseq.quantization.export.export import FORMATS

PAGE = Path(__file__).parent.parent / "docs" / "support.rst"
COLUMNS = {
    "packed": ("architectures.test_families", "test_quantized_output_is_close_and_not_equal[{}]"),
    "emulated": ("architectures.test_families", "test_emulated_is_packed[{}]"),
    "calibrated": ("architectures.test_families", "test_calibration_lowers_the_error[{}]"),
    "embeddings": ("architectures.test_families", "test_embeddings[{}-False]"),
    "one file": ("saving.test_checkpoint", "test_every_family[{}]"),
    "folder": ("saving.test_huggingface", "test_every_family_comes_back[{}]"),
    "while loading": ("saving.test_huggingface", "test_every_family_is_quantized_while_it_is_loaded[{}]"),
    "ONNX": ("export.test_families", "test_export[{}-onnx]"),
    "OpenVINO": ("export.test_families", "test_export[{}-openvino]"),
    "TorchScript": ("export.test_families", "test_export[{}-torchscript]"),
    "torch.export": ("export.test_families", "test_export[{}-torch_export]"),
}
"""Title -> folder and file, and name, of the test."""
OTHER_COLUMNS = {
    "packed": ("architectures.test_other_heads", "test_the_vision_tower_is_quantized_and_nothing_else[{}]"),
    "calibrated": ("architectures.test_other_heads", "test_it_is_close_and_calibration_brings_it_closer[{}]"),
    "saved": ("architectures.test_other_heads", "test_it_comes_back_equal[{}]"),
    "embeddings": ("architectures.test_other_heads", "test_embeddings[{}]"),
    "fused": ("architectures.test_other_heads", "test_fused_blocks_give_what_their_layers_do[{}]"),
    "ONNX": ("export.test_other_heads", "test_export[{}-onnx]"),
    "OpenVINO": ("export.test_other_heads", "test_export[{}-openvino]"),
    "TorchScript": ("export.test_other_heads", "test_export[{}-torchscript]"),
    "torch.export": ("export.test_other_heads", "test_export[{}-torch_export]"),
}
"""The same of models with other heads."""

OLDEST = "4.57"
"""Tested with torch 2.9."""
NOT_BY_TORCH_2_9, NO_FOLDER, NO_FILE, BY_LAYERS, NO_TEXT, NO_EXPORTER = "✓¹", "no²", "no³", "no⁴", "no⁵", "no⁶"
UNKNOWN = "no⁷"

HEAD = """Support matrix
==============

.. Made by tests/support_matrix.py; do not edit.

A tick is a test of a small random model of the family that passed on transformers {versions}; {oldest} was tested with
torch 2.9.

.. table::
   :class: compact

"""
NOTES = """
¹ Not with torch 2.9, whose exporter fails on it; ``export`` says so.

² timm's models have no ``from_pretrained``; *one file* saves them.

³ SigLIP 2 resizes its position embeddings to the shape of each picture, which no file can; ``export`` refuses it.

What a tick says:

- *packed*, *emulated*: the outputs are close to the float model's.
- *calibrated*: they are closer with pictures than without.
- *embeddings*: these can be packed, too.
- *one file* (``ViTQuantizer.save`` and ``load``), *folder* (``save_pretrained`` and ``from_pretrained``): what is
  loaded gives equal outputs, to the bit.
- *while loading*: ``from_pretrained`` with a ``FairseqViTConfig`` gives the integers of ``quantize_model``.
- *ONNX*, *OpenVINO*, *TorchScript*, *torch.export*: the file runs by itself, on two batch sizes, and gives the model's
  outputs. OpenVINO's files are tested at 7 bits, which it multiplies exactly on every processor; 8 bits need VNNI
  (:doc:`export`).
"""


OTHERS = """
Models with other heads
-----------------------

On transformers {versions}, likewise.

.. table::
   :class: compact

"""
OTHER_NOTES = """
⁴ Blocks of another kind, which run layer by layer on the native kernels.

⁵ It reads text, which no file does: take its vision tower.

⁶ PyTorch's exporter fails on it, or keeps the number of pictures.

⁷ None that are known: its patches overlap or are of a video, it begins with other convolutions, or it is of no family.

- *saved*: in one file and, of models of HuggingFace, in a folder, and loaded with equal outputs, to the bit.
- *embeddings*: these can be packed, too, and come back from a file with equal outputs.
- *fused*: blocks run as one native call each, and give what their layers do.
"""


def outcomes(path: str) -> dict[tuple[str, str], str]:
    """(folder and file, test) -> "passed", "skipped" or "failed", from a JUnit file of pytest."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        folder_and_file = ".".join(case.attrib["classname"].split(".")[-2:])
        found[folder_and_file, case.attrib["name"]] = outcome
    return found


def cell(column: str, family: str, results: dict[str, dict[tuple[str, str], str]]) -> str:
    """A tick if the test of a cell passed on all versions, or the mark of a known exception."""
    file, name = COLUMNS[column]
    if any((family, form) in REFUSED and f"-{form}]" in name for form in FORMATS):
        return NO_FILE
    if family.startswith("timm-") and file == "saving.test_huggingface":
        return NO_FOLDER
    late = any((family, form) in REFUSED_BY_TORCH_2_9 and f"-{form}]" in name for form in FORMATS)
    for version, result in results.items():
        outcome = result.get((file, name.format(family)), "not run")
        if outcome != "passed" and not (late and version == OLDEST):
            raise SystemExit(f"{file}::{name.format(family)} on transformers {version}: {outcome}")
    return NOT_BY_TORCH_2_9 if late else "✓"


def other_cell(column: str, name: str, results: dict[str, dict[tuple[str, str], str]]) -> str:
    """The same of a model with another head."""
    file, test = OTHER_COLUMNS[column]
    if column == "fused" and not KINDS[name].fused:
        return BY_LAYERS
    if column == "embeddings" and name in NO_EMBEDDINGS:
        return UNKNOWN
    form = test.rpartition("-")[2].removesuffix("]")
    if "test_export" in test and name not in EXPORTED:
        return NO_TEXT
    if (name, form) in REFUSED_OTHERS:
        return NO_EXPORTER
    for version, result in results.items():
        outcome = result.get((file, test.format(name)), "not run")
        if outcome != "passed":
            raise SystemExit(f"{file}::{test.format(name)} on transformers {version}: {outcome}")
    return NOT_BY_TORCH_2_9 if (name, form) in LATE_OTHERS else "✓"


def simple_table(rows: list[list[str]]) -> str:
    """Rows of cells, the first of titles, as the content of a table directive of reStructuredText."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(f"{text:{width}}" for text, width in zip(row, widths)).rstrip() for row in rows]
    return "".join(f"   {line}\n" for line in (rule, lines[0], rule, *lines[1:], rule))


def main(arguments: list[str]) -> None:
    results: dict[str, dict[tuple[str, str], str]] = {}
    for version, _, path in (argument.partition("=") for argument in arguments):
        results.setdefault(version, {}).update(outcomes(path))  # a later file of a version wins
    rows = [["family", *COLUMNS], *([family, *(cell(c, family, results) for c in COLUMNS)] for family in BUILDERS)]
    others = [
        ["model", *OTHER_COLUMNS],
        *([name, *(other_cell(c, name, results) for c in OTHER_COLUMNS)] for name in KINDS),
    ]
    versions = " and ".join(results)
    head, second = HEAD.format(versions=versions, oldest=OLDEST), OTHERS.format(versions=versions)
    text = head + simple_table(rows) + NOTES + second + simple_table(others) + OTHER_NOTES
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE.name}: {len(rows) - 1} families, {len(COLUMNS)} columns; {len(others) - 1} other models")


if __name__ == "__main__":
    main(sys.argv[1:])
