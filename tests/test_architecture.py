"""Which way imports may run, and what importing the package costs."""

import ast
from pathlib import Path

import pytest
from beside import Beside, python

import fairseq

ROOT = Path(fairseq.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A file of the first folder that matches may import the house's modules that start with one of these.
CONTEXT = "fairseq.modules.quantization.context"
PRODUCT = "fairseq.modules.quantization.float_product"
SCALAR, INTEGER = "fairseq.modules.quantization.scalar", "fairseq.modules.quantization.integer"
PACKED = "fairseq.modules.quantization.packed"
KERNELS = tuple(f"{SCALAR}.{leaf}" for leaf in ("ops", "weights", "tokens", "modules.replace"))
Q = "fairseq.quantization"
# The pipeline: each room of the model floor and those below it.
ROOMS = {
    "architectures": (),
    "rounding": ("architectures",),
    "calibration": ("rounding", "architectures"),
    "evaluation": ("architectures",),
    "engine": ("architectures",),
    "conversion": ("evaluation", "engine", "calibration", "rounding", "architectures"),
    "reconstruction": ("conversion", "calibration", "rounding", "architectures"),
    "bit_allocation": ("conversion", "evaluation", "calibration", "rounding", "architectures"),
    "training": ("saving", "conversion", "engine", "calibration", "architectures"),
    "export": ("integer_only", "conversion", "evaluation", "engine", "architectures"),
    "saving": ("integer_only", "conversion", "evaluation", "engine", "architectures"),
    "integer_only": ("conversion", "evaluation", "engine", "calibration", "architectures"),
}
ALLOWED = {
    "modules/quantization/context.py": (),
    "modules/quantization/float_product.py": (),
    "modules/quantization/scalar/grid.py": (),
    "modules/quantization/scalar/ranges.py": (f"{SCALAR}.grid",),
    "modules/quantization/scalar/ops.py": (f"{SCALAR}.grid", f"{SCALAR}.ranges"),
    "modules/quantization/scalar/tokens.py": (f"{SCALAR}.grid",),
    "modules/quantization/scalar/weights.py": (f"{SCALAR}.ops", f"{SCALAR}.grid"),
    "modules/quantization/scalar": (SCALAR, CONTEXT),
    "modules/quantization/packed/packing.py": (f"{SCALAR}.ops",),
    "modules/quantization/packed": (*KERNELS, PACKED, CONTEXT, PRODUCT),
    "modules/quantization/integer": (f"{SCALAR}.ops", INTEGER),
    "modules": (),
    "quantization/utils": (INTEGER,),
    "quantization/config.py": (f"{PACKED}.config",),
    "quantization/files.py": (),
    "quantization/json_files.py": (f"{Q}.files",),
    "quantization/synthetic.py": (f"{Q}.calibration.synthetic",),
    **{
        f"quantization/{room}/": (
            SCALAR,
            PACKED,
            CONTEXT,
            PRODUCT,
            f"{Q}.config",
            f"{Q}.files",
            f"{Q}.json_files",
            *(f"{Q}.{r}" for r in (room, *below)),
            *((INTEGER,) if room in ("integer_only", "export") else ()),
        )
        for room, below in ROOMS.items()
    },
    "quantization/__init__.py": (),
    "models": ("fairseq.quantization", CONTEXT),
    "cli/machine": ("fairseq.cli", f"{Q}.calibration.precision", PACKED),
    "cli": ("fairseq.cli", "fairseq.models", "fairseq.quantization", f"{PACKED}.packing"),
    "__init__.py": (),
}


EXTENDS_TRANSFORMERS = ("quantization/saving/huggingface.py", "quantization/training/trainer.py")


def imports(path):
    """Every module that a file imports, at any depth in the code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    relative = path.relative_to(ROOT).as_posix()
    allowed = next(names for start, names in ALLOWED.items() if relative.startswith(start))
    for name in imports(path):
        if name.split(".")[0] == "fairseq":
            assert any(name == a or name.startswith(a + ".") or a.startswith(name + ".") for a in allowed), name
        outside = () if relative in EXTENDS_TRANSFORMERS else ("transformers",)
        assert name.split(".")[0] not in (*outside, "timm", "matplotlib", "onnx", "onnxruntime"), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_lives_there(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


IMPORTS = """
import sys
import fairseq
assert "torch" not in sys.modules
import fairseq.quantization.conversion.convert
assert "transformers" not in sys.modules
import fairseq.models.vit_quantization
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "fairseq_vit" in AUTO_QUANTIZATION_CONFIG_MAPPING and "fairseq_vit" in AUTO_QUANTIZER_MAPPING
print(fairseq.__version__)
"""
IMPORTED = Beside(lambda: lambda: python("-c", IMPORTS))


@IMPORTED
def test_what_each_import_loads():
    """One process, which imports one after the other; each assertion says what was there by then."""
    done = IMPORTED.result()
    assert (done.returncode, done.stdout.strip()) == (0, fairseq.__version__), done.stderr
