"""The distribution: `pip install .` for the library, with the extras onnx, plot, test, docs and dev."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "fairseq" / "__init__.py").read_text(encoding="utf-8")).group(1)
REQUIREMENTS = [
    line for line in (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
]

ONNX = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]
PLOT = ["matplotlib>=3.9"]
TEST = ["pytest>=8", "hypothesis>=6.100", "pytest-benchmark>=5", *ONNX, *PLOT]
DOCS = ["sphinx>=8", "furo>=2024.8", "sphinx-copybutton>=0.5"]
LINT = ["ruff>=0.12", "mypy>=1.16", "pre-commit>=4"]

setup(
    name="fairseq",
    version=VERSION,
    description="Quantization of HuggingFace Vision Transformers to 8 and 4 bits, in the lineage of I-BERT",
    long_description=(HERE / "README.rst").read_text(encoding="utf-8"),
    long_description_content_type="text/x-rst",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["fairseq", "fairseq.*"]),
    package_data={"fairseq": ["py.typed"]},
    install_requires=REQUIREMENTS,
    extras_require={"onnx": ONNX, "plot": PLOT, "test": TEST, "docs": DOCS, "dev": [*TEST, *DOCS, *LINT]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
