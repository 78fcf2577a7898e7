r"""Makes docs/support.rst from what the tests of every family said on two versions of transformers.

    pytest tests/quantization -m "matrix or not matrix" -k "families or checkpoint or huggingface" \
        --junitxml=build/support-5.23.xml
    PYTHONPATH=tests python tests/support_matrix.py 4.57=build/support-4.57.xml 5.23=build/support-5.23.xml

Each cell names the versions on which its test passed; a test that failed stops the script.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

from families import BUILDERS
from quantization.test_export_families import REFUSED, REFUSED_BY_TORCH_2_9

from fairseq.quantization.export.export import FORMATS

PAGE = Path(__file__).parent.parent / "docs" / "support.rst"
COLUMNS = {
    "packed": ("test_families", "test_quantized_output_is_close_and_not_equal[{}]"),
    "emulated": ("test_families", "test_emulated_is_packed[{}]"),
    "calibrated": ("test_families", "test_calibration_lowers_the_error[{}]"),
    "embeddings": ("test_families", "test_embeddings[nearest-{}]"),
    "one file": ("test_checkpoint", "test_every_family[{}]"),
    "folder": ("test_huggingface", "test_every_family_comes_back[{}]"),
    "while loading": ("test_huggingface", "test_every_family_is_quantized_while_it_is_loaded[{}]"),
    "ONNX": ("test_export_families", "test_export[{}-onnx]"),
    "TorchScript": ("test_export_families", "test_export[{}-torchscript]"),
    "torch.export": ("test_export_families", "test_export[{}-torch_export]"),
}
"""Title -> file and name of the test."""

HEAD = """Support matrix
==============

.. Made by tests/support_matrix.py; do not edit.

Every cell is a test of a small random model of the family that passed on these versions of transformers. "packed" and
"emulated" run close to float; "calibrated" is closer with pictures than without; "embeddings" packs them, too; "one
file" (``ViTQuantizer.save`` and ``load``) and "folder" (``save_pretrained`` and ``from_pretrained``) come back equal to
the bit; "while loading" gives the integers of ``quantize_model``; an exported file runs by itself on two batch sizes
and gives the model's outputs. "no" stands for what does not exist for a family: ``from_pretrained`` of timm's models,
and files of SigLIP 2 for any batch size, which ``export`` refuses. transformers 4.57 was tested with torch 2.9, whose
exporter fails on some; ``export`` says so.

"""


def outcomes(path: str) -> dict[tuple[str, str], str]:
    """(file, test) -> "passed", "skipped" or "failed", from a JUnit file of pytest."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[case.attrib["classname"].rpartition(".")[2], case.attrib["name"]] = outcome
    return found


def cell(column: str, family: str, results: dict[str, dict[tuple[str, str], str]]) -> str:
    """The versions on which the test of a cell passed."""
    file, name = COLUMNS[column]
    said = {version: result.get((file, name.format(family))) for version, result in results.items()}
    if any((family, form) in REFUSED and f"-{form}]" in name for form in FORMATS):
        return "no"
    if any((family, form) in REFUSED_BY_TORCH_2_9 and f"-{form}]" in name for form in FORMATS):
        said = {version: outcome for version, outcome in said.items() if version != "4.57"}
    failed = [version for version, outcome in said.items() if outcome == "failed"]
    if failed:
        raise SystemExit(f"{file}::{name.format(family)} failed on transformers {', '.join(failed)}")
    return ", ".join(version for version, outcome in said.items() if outcome == "passed") or "no"


def main(arguments: list[str]) -> None:
    results: dict[str, dict[tuple[str, str], str]] = {}
    for version, _, path in (argument.partition("=") for argument in arguments):
        results.setdefault(version, {}).update(outcomes(path))  # a later file of a version wins
    rows = [["family", *COLUMNS], *([family, *(cell(c, family, results) for c in COLUMNS)] for family in BUILDERS)]
    lines = [".. list-table::", "   :header-rows: 1", "   :stub-columns: 1", ""]
    for row in rows:
        lines += [f"   {'*' if number == 0 else ' '} - {text}" for number, text in enumerate(row)]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{PAGE.name}: {len(rows) - 1} families, {len(COLUMNS)} columns")


if __name__ == "__main__":
    main(sys.argv[1:])
