"""The distribution: `pip install .` for the library, with the extras onnx, plot, test, docs and dev.

The native kernels are compiled if there is a C++ compiler; without one everything runs on PyTorch's own operations.
"""

import os
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "fairseq" / "__init__.py").read_text(encoding="utf-8")).group(1)
REQUIREMENTS = [
    line for line in (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
]

ONNX = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]
PLOT = ["matplotlib>=3.9"]
TEST = ["pytest>=8", "hypothesis>=6.100", "pytest-benchmark>=5", "timm>=1.0", "accelerate>=1.1", *ONNX, *PLOT]
DOCS = ["sphinx>=8", "furo>=2024.8", "sphinx-copybutton>=0.5"]
LINT = ["ruff>=0.12", "mypy>=1.16", "pre-commit>=4", "setuptools>=77"]  # setuptools: .ci/sanitize

KERNELS = Path("fairseq", "modules", "quantization", "packed", "kernels")
COMPILE = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-Wno-psabi"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma"]
LEVELS = {"portable": []}  # instruction set -> the flags for its file alone; which one runs is decided at run time
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avxvnni": ["-mavx2", "-mfma", "-mavxvnni"],
        "avx512vnni": AVX512,
        "avx512bf16": [*AVX512, "-mavx512bf16"],
    }


class BuildNative(build_ext):
    """Compiles each file of the native library with the flags of its instruction set."""

    def build_extension(self, ext):
        first, *others = ext.sources
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(lambda source: self.compile_level(ext, source), others))
        known = [f"-DWITH_{Path(source).stem}" for source, objects in zip(others, compiled) if objects]
        objects = sum(compiled, self.compile(first, [*ext.extra_compile_args, *known]))
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, target, extra_postargs=ext.extra_link_args, target_lang="c++")

    def compile_level(self, ext, source):
        """The object of one instruction set; none where the compiler does not know it."""
        level = Path(source).stem
        try:
            return self.compile(source, [*ext.extra_compile_args, *LEVELS[level]])
        except CompileError as error:
            if level == "portable":
                raise
            self.warn(f"this compiler does not know {level}, which is left out: {error}")
            return []

    def compile(self, source, flags):
        return self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)


NATIVE = Extension(
    ".".join((*KERNELS.parts, "_native")),
    [str(KERNELS / "csrc" / f"{name}.cpp") for name in ("native", *LEVELS)],
    depends=[str(header) for header in sorted((KERNELS / "csrc").glob("*.h"))],
    extra_compile_args=COMPILE,
    extra_link_args=["-fopenmp"],
    language="c++",
    optional=True,
)

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
    entry_points={"console_scripts": ["fairseq-vit = fairseq.cli.main:main"]},
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildNative},
    install_requires=REQUIREMENTS,
    extras_require={"onnx": ONNX, "plot": PLOT, "test": TEST, "docs": DOCS, "dev": [*TEST, *DOCS, *LINT]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
