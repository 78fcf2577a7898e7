"""Every instruction set gives the portable one's bits, in a program without Python, which .ci/arm runs for ARM, too."""

import os
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from beside import Beside, new_folder

from fairseq.modules.quantization.packed.kernels import library, native

HERE = Path(__file__).parent
ROOT = HERE.parents[4]
SOURCES = Path(native.__file__).with_name("csrc")
COMPILER = shutil.which("g++") or shutil.which("clang++")
OPENMP = ["-fopenmp"] if sys.platform == "linux" and shutil.which("g++") else []  # the library's, without PyTorch's

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def checksums_of(library, folder):
    """What checksums.cpp prints with a library: a checksum of each function, then the levels that ran."""
    program = folder / "checksums"
    rpath = f"-Wl,-rpath,{Path(library).parent}"
    source = HERE / "checksums.cpp"
    command = [COMPILER, "-std=c++17", *OPENMP, "-I", SOURCES, source, library, rpath, "-o", program]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *sums, levels = result.stdout.splitlines()
    return sums, levels.split()[1:]


@Beside
def installed():
    built, path = library.load()._name, new_folder("installed")
    return lambda: checksums_of(built, path)


@installed
def test_every_level_gives_the_bits_of_the_portable_one():
    sums, levels = installed.result()
    assert tuple(levels) == native.levels()
    assert len(sums) == len({line.split()[0] for line in sums}) > 20


def test_what_is_sanitized_is_compiled_as_asked(monkeypatch):
    monkeypatch.setattr(pytest.importorskip("setuptools"), "setup", lambda **keywords: None)
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "linux-x86_64")
    monkeypatch.setenv("FAIRSEQ_QUANTIZATION_BUILD_FLAGS", "-g -O1")
    monkeypatch.setenv("FAIRSEQ_QUANTIZATION_BUILD_LEVELS", "avx2")
    settings = runpy.run_path(str(ROOT / "setup.py"))
    assert list(settings["LEVELS"]) == ["portable", "avx2"]
    assert settings["COMPILE"][-2:] == ["-g", "-O1"]


@Beside
def built_without():
    """The library, from a compiler that refuses OpenMP and instruction sets: what that said, and the checksums."""
    path = new_folder("without_openmp")
    compiler = path / "c++"
    compiler.write_text(
        f'#!/bin/sh\ncase " $* " in *" -fopenmp "*|*" -m"*) echo refused >&2; exit 1;; esac\nexec {COMPILER} "$@" -O1\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IEXEC)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", path, "--build-temp", path / "objects"]
    environment = os.environ | {"CC": str(compiler), "CXX": str(compiler)}

    def build():
        built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        (library,) = path.glob("fairseq/**/_native.so")
        return built.stdout + built.stderr, *checksums_of(library, path)

    return build


@pytest.mark.slow
@built_without
def test_a_compiler_without_openmp_and_instruction_sets_gives_the_same_bits():
    """As Apple's, which refuses -fopenmp: the library is built all the same, and runs on one thread."""
    pytest.importorskip("setuptools")
    said, sums, levels = built_without.result()
    assert "no OpenMP" in said
    assert levels == ["amx_emulated", "portable"]
    assert sums == installed.result()[0]
