"""The distribution: `pip install .` for the library; EXTRAS lists what else there is.

The native kernels are compiled if there is a C++ compiler; without one everything runs on PyTorch's own operations.
"""

import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "fairseq" / "__init__.py").read_text(encoding="utf-8")).group(1)
REQUIREMENTS = [
    line for line in (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
]

ONNX = ["onnx>=1.17", "onnxruntime>=1.23", "onnxscript>=0.5"]
OPENVINO = ["onnx>=1.17", "onnxscript>=0.5", "openvino>=2025.3"]
PLOT = ["matplotlib>=3.9"]
REPORT = ["jinja2>=3.1", *PLOT]
TRAINING = ["accelerate>=1.1"]
LORA = ["peft>=0.17"]
RAY = ["ray[data]>=2.46"]  # with pyarrow
TEST = [
    "pytest>=8", "hypothesis>=6.100", "pytest-benchmark>=5", "pytest-xdist>=3.7", "timm>=1.0",
    "open_clip_torch>=2.30", "scipy>=1.13", "nbclient>=0.10", "ipykernel>=6.29",  # scipy: transformers' Mask2Former
    *TRAINING, *LORA, *ONNX, *OPENVINO, *RAY, *REPORT,
]  # fmt: skip
DOCS = ["sphinx>=8", "furo>=2024.8", "sphinx-copybutton>=0.5"]
LINT = ["ruff>=0.12", "mypy>=1.16", "pre-commit>=4", "clang-format==23.1.5", "setuptools>=77"]
# clang-format: each version formats in its own way; setuptools: .ci/sanitize
EXTRAS = {
    "onnx": ONNX, "openvino": OPENVINO, "plot": PLOT, "report": REPORT, "training": TRAINING, "lora": LORA,
    "ray": RAY, "test": TEST, "docs": DOCS, "dev": [*TEST, *DOCS, *LINT],
}  # fmt: skip

KERNELS = Path("fairseq", "modules", "quantization", "packed", "kernels")
# -g0: Python's own flags ask for debugging information, a fifth of the time and five times the size of the code.
COMPILE = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi"]
# Of .ci/sanitize: flags that come last, which of two that disagree counts, and instruction sets beside "portable".
COMPILE += os.environ.get("FAIRSEQ_QUANTIZATION_BUILD_FLAGS", "").split()
ONLY = os.environ.get("FAIRSEQ_QUANTIZATION_BUILD_LEVELS", "").split()
OPENMP = ["-fopenmp"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-Wno-uninitialized"]
# The last one: gcc 12 warns of its own header.
NEON = "-march=armv8.2-a+dotprod"
UNSCHEDULED = "-fno-schedule-insns"  # gcc takes all loads to the front of a loop, whose sums then lack registers
# Instruction sets, the slowest first: each a file of csrc/isa and the flags that the kernels are compiled with for it;
# which one runs is decided at run time.
LEVELS = {"amx_emulated": [], "portable": []}
# The machine to compile for: this one, or the one that a cross-compilation names in CPython's own variable.
MACHINE = os.environ.get("_PYTHON_HOST_PLATFORM", platform.machine()).split("-")[-1]
if MACHINE in ("x86_64", "AMD64"):
    LEVELS |= {
        "avx2": AVX2,
        "avxvnni": [*AVX2, "-mavxvnni"],
        "avx512vnni": AVX512,
        "avx512bf16": [*AVX512, "-mavx512bf16"],
        "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
    }
elif MACHINE in ("aarch64", "arm64"):
    LEVELS |= {"neon": [NEON, UNSCHEDULED], "neon_i8mm": [f"{NEON}+i8mm+bf16", UNSCHEDULED]}
if ONLY:
    LEVELS = {level: LEVELS[level] for level in LEVELS if level in (*ONLY, "portable")}


class BuildNative(build_ext):
    """Compiles the kernels once for each instruction set, with its flags."""

    def build_extension(self, ext):
        native, kernels = ext.sources
        openmp, linked = self.openmp()
        ext.extra_compile_args = [*ext.extra_compile_args, *openmp]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(lambda level: self.compile_level(ext, kernels, level), LEVELS))
        known = " ".join(f"X({level})" for level, objects in zip(LEVELS, compiled) if objects)
        objects = sum(compiled, self.compile(native, [*ext.extra_compile_args, f"-DLEVELS(X)={known}"], "native"))
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, target, extra_postargs=[*linked, "-pthread"], target_lang="c++")

    def openmp(self):
        """The flags for OpenMP, of compiling and of linking.

        None where the compiler refuses it, as Apple's does: all runs on one thread then. What gcc makes on Linux is
        linked to no OpenMP: PyTorch's is in the process before it, under a name that depends on PyTorch's build.
        """
        source = Path(self.build_temp, "openmp.cpp")
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("#include <omp.h>\nvoid region(void (*run)()) {\n#pragma omp parallel\n  run();\n}\n")
        try:
            (compiled,) = self.compile(str(source), OPENMP, "openmp")
        except CompileError as error:
            self.warn(f"this compiler has no OpenMP, the native kernels will run on one thread: {error}")
            return [], []
        from_torch = sys.platform == "linux" and b"GOMP_parallel" in Path(compiled).read_bytes()
        return OPENMP, [] if from_torch else OPENMP

    def get_ext_filename(self, fullname):
        """Without the version of Python, on which the library does not depend: ctypes loads it."""
        return f"{os.path.join(*fullname.split('.'))}.so"

    def compile_level(self, ext, source, level):
        """The object of one instruction set; none where the compiler does not know it."""
        try:
            return self.compile(source, [*ext.extra_compile_args, *LEVELS[level], f"-DLEVEL={level}"], level)
        except CompileError as error:
            if not LEVELS[level]:  # plain C++
                raise
            self.warn(f"this compiler does not know {level}, which is left out: {error}")
            return []

    def compile(self, source, flags, name):
        folder = str(Path(self.build_temp, name))
        return self.compiler.compile([source], output_dir=folder, extra_postargs=flags)


class Wheel(bdist_wheel):
    """One for every version of Python; only the system and the processor matter to the kernels."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


NATIVE = Extension(
    ".".join((*KERNELS.parts, "_native")),
    [str(KERNELS / "csrc" / name) for name in ("native.cpp", "level.cpp")],
    depends=[str(header) for header in sorted((KERNELS / "csrc").rglob("*.h"))],
    extra_compile_args=COMPILE,
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
    package_data={"fairseq": ["py.typed", "quantization/evaluation/page.html"]},
    entry_points={"console_scripts": ["fairseq-vit = fairseq.cli.main:main"]},
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    classifiers=[
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
