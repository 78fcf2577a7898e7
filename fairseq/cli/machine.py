"""What ``fairseq-vit doctor`` finds out: processor, native kernels, versions, PyTorch and GPUs, as plain values."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import torch

import fairseq
from fairseq.cli.output import first_line
from fairseq.modules.quantization.packed.kernels import choose, library, native, native_calls
from fairseq.modules.quantization.packed.kernels.triton.support import reason_not_on
from fairseq.quantization.calibration.precision import has_bfloat16

NEEDED = ("torchvision", "transformers", "numpy", "safetensors")
OPTIONAL = {
    "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino", "matplotlib": "plot",
    "jinja2": "report", "accelerate": "training", "peft": "lora", "timm": None, "triton": None,
}  # fmt: skip
"""Packages and the extras that bring them. Not read from the metadata: an editable installation keeps its first."""
CPUINFO, CGROUP = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup")
NVIDIA = Path("/proc/driver/nvidia/version")
WHEELS = (("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"))
"""What there are wheels for with native kernels in them."""
OURS, OPENMP = "FAIRSEQ_QUANTIZATION_", ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")


def facts() -> dict[str, Any]:
    """All of them; JSON can hold every value. Warnings say what is wrong with the native kernels, as everywhere."""
    return {
        "system": platform.platform(),
        "processor": processor(),
        "torch": of_torch(),
        "gpu": gpu(),
        "versions": versions(),
        "optional": optional(),
        "environment": environment(),
        "native": kernels(),
    }


def processor() -> dict[str, Any]:
    """Name, cores and memory that this process may use (bytes), threads, and how busy the machine is.

    What the system does not tell is None.
    """
    return {
        "name": processor_name(),
        "cores": cores(),
        "cores_of_machine": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "openmp": torch.backends.openmp.is_available(),
        "memory": memory(),
        "load": load(),
    }


def processor_name() -> str:
    """As the system calls it; on Linux ``platform`` knows no more than the architecture."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def cores() -> int:
    """Logical cores that this process may run on: its affinity, and the quota of the container that it is in."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota, _, period = _limit("cpu.max").partition(" ")
    return min(count, math.ceil(int(quota) / int(period))) if quota.isdecimal() else count


def memory() -> int | None:
    """Bytes of the machine, or of the container if that may have fewer."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows
        return None
    limit = _limit("memory.max")
    return min(total, int(limit)) if limit.isdecimal() else total


def load() -> float | None:
    """How many threads ran or waited for a core, on average of the last minute."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        return None


def _limit(name: str) -> str:
    """What a control group, version 2, says of itself; empty where there is none."""
    try:
        return (CGROUP / name).read_text().strip()
    except OSError:
        return ""


def of_torch() -> dict[str, Any]:
    """How this build of PyTorch computes on the CPU.

    ``bfloat16``: whether the processor multiplies in it in hardware; None on processors that are not x86.
    """
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    parallel = re.search(r"ATen parallel backend: (.+)", torch.__config__.parallel_info())
    return {
        "blas": blas and blas[1],
        "parallel": parallel and parallel[1].strip(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
        "bfloat16": has_bfloat16(torch.device("cpu")) if platform.machine() in ("x86_64", "AMD64") else None,
    }


def gpu() -> dict[str, Any]:
    """The devices that PyTorch can use, the driver, and why the kernels in Triton do not run on the first of them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    every = [torch.cuda.get_device_properties(index) for index in range(count)]
    devices = [
        {"name": one.name, "memory": one.total_memory, "capability": f"{one.major}.{one.minor}"} for one in every
    ]
    return {
        "devices": devices,
        "cuda": torch.version.cuda,
        "driver": driver(),
        "triton_problem": _triton_problem() if devices else None,
    }


def driver() -> str | None:
    """The version of NVIDIA's driver, where Linux tells it."""
    try:
        version = re.search(r"\b\d+\.\d[\d.]*", NVIDIA.read_text())
    except OSError:
        return None
    return version and version[0]


def _triton_problem() -> str | None:
    if reason := reason_not_on(torch.device("cuda", 0)):
        return reason
    try:
        importlib.import_module("triton")
    except Exception as error:  # whatever a broken installation raises
        return f"Triton does not import: {first_line(error)}"
    return None


def versions() -> dict[str, str | None]:
    """Of this library, of Python, and of the packages that it needs; None for one that has no metadata."""
    own = {"fairseq": fairseq.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    return own | {name: _version(name) for name in NEEDED}


def optional() -> dict[str, dict[str, str | None]]:
    """Packages that some features need: the version, None where it is not installed, and what installs it."""
    pip = installer()
    return {
        name: {"version": _version(name), "install": f'{pip} -e ".[{extra}]"' if extra else f"{pip} {name}"}
        for name, extra in OPTIONAL.items()
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installer() -> str:
    """The command that this library was installed with: "uv pip install" or "pip install"."""
    try:
        by = importlib.metadata.distribution("fairseq").read_text("INSTALLER") or ""
    except importlib.metadata.PackageNotFoundError:
        by = ""
    return "pip install" if by.strip() == "pip" else "uv pip install"


def environment() -> dict[str, str]:
    """The environment variables of this library that are set, and those of OpenMP and MKL."""
    return {key: os.environ[key] for key in sorted(os.environ) if key.startswith(OURS) or key in OPENMP}


def kernels() -> dict[str, Any]:
    """The native kernels.

    Keys:
        problem: why there are none; None where they were built and load.
        wheel: whether there is a wheel for this system that has them.
        install: the line that builds them, in the folder of the clone.
        compiler: the C++ compiler that is here, or None.
        levels: every instruction set of the build, the slowest first: ``name``, ``runs_here`` and ``problem``, which
            is how it differs from the reference; empty where there is a mistake that would make each of them fail.
        used: the name of the one that runs; None without any.
        mistake: what an environment variable of this library says that cannot be, or None.
    """
    problem, mistake, used = library.reason_not_loaded(), _mistake(), None
    levels = native.check_levels() if problem is None and mistake is None else ()
    if levels and native.levels():
        try:
            used = native.level_names()[native.level_number()]
        except ValueError as error:
            mistake = f"{native.ENVIRONMENT}: {first_line(error)}"
    return {
        "problem": problem, "wheel": (platform.system(), platform.machine()) in WHEELS,
        "install": f"{installer()} -e .", "compiler": compiler(), "levels": [level._asdict() for level in levels],
        "used": used, "mistake": mistake,
    }  # fmt: skip


def _mistake() -> str | None:
    """What is wrong with the environment variables that the kernels look at before they run; None if nothing is."""
    try:
        native_calls.attention_is_exact()
        choose(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except (ValueError, RuntimeError) as error:
        return first_line(error)
    return None


def compiler() -> str | None:
    """The name of a C++ compiler that can be called."""
    names = (os.environ.get("CXX", "").partition(" ")[0], "c++", "g++", "clang++")
    return next((name for name in names if name and shutil.which(name)), None)
