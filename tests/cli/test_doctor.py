"""doctor: what it says of this machine, of kernels that are missing or wrong, and what it advises."""

import copy
import functools
import json
import os
import platform
import runpy
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fairseq
from fairseq.cli import machine, machine_speed
from fairseq.cli.doctor import advise, text
from fairseq.modules.quantization.packed.kernels import library, native, native_calls

CACHES = (library.load, native.level_names, native.levels, native._checked_level)
NATIVE = bool(native.levels())
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """What the kernels found out about themselves before is forgotten, and again after; nothing of ours is set."""
    for key in [key for key in os.environ if key.startswith("FAIRSEQ_QUANTIZATION_")]:
        monkeypatch.delenv(key)
    for cached in CACHES:
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in CACHES:
        cached.cache_clear()


@pytest.fixture
def quick(monkeypatch):
    """Seconds of measuring become moments; as many things are measured."""
    for name, value in {"SECONDS": 0, "COPYING": 0, "TURN": 0, "PAUSE": 0, "CALLS": 1, "BUFFER": 2**20}.items():
        monkeypatch.setattr(machine_speed, name, value)


def test_json_is_whole_and_true(cli, quick, monkeypatch):
    monkeypatch.setenv("FAIRSEQ_QUANTIZATION_ATTENTION", "float32")
    monkeypatch.setenv("FAIRSEQ_ELSE", "not ours")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    result = cli("doctor", "--json")
    found = json.loads(result.out)
    assert result.code == found["attention"] == (0 if NATIVE else 1), found["advice"]
    assert set(found) == {
        "system", "processor", "torch", "gpu", "versions", "optional", "environment", "native", "measured", "advice",
        "attention",
    }  # fmt: skip
    assert found["processor"]["threads"] == torch.get_num_threads()
    if hasattr(os, "sched_getaffinity") and not machine._limit("cpu.max"):
        assert found["processor"]["cores"] == len(os.sched_getaffinity(0))
    if Path("/proc/meminfo").exists():
        total = 1024 * int(Path("/proc/meminfo").read_text().split()[1])
        assert found["processor"]["memory"] == pytest.approx(total, rel=0.05) or machine._limit("memory.max")
    assert found["processor"]["name"] in machine.CPUINFO.read_text() + platform.processor() + platform.machine()
    assert found["torch"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert f"BLAS_INFO={found['torch']['blas']}," in torch.__config__.show()
    assert found["versions"] == {
        "fairseq": fairseq.__version__, "python": platform.python_version(), "torch": torch.__version__,
        **{name: metadata.version(name) for name in ("torchvision", "transformers", "numpy", "safetensors")},
    }  # fmt: skip
    assert len(found["gpu"]["devices"]) == torch.cuda.device_count()
    own = {key: value for key, value in found["environment"].items() if key.startswith("FAIRSEQ")}
    assert own == {"FAIRSEQ_QUANTIZATION_ATTENTION": "float32"}
    assert found["environment"]["OMP_WAIT_POLICY"] == "active"
    assert tuple(one["name"] for one in found["native"]["levels"]) == native.level_names()
    assert tuple(one["name"] for one in found["native"]["levels"] if one["runs_here"]) == native.levels()
    assert found["native"]["used"] == (native.levels()[-1] if NATIVE else None)
    assert (found["measured"]["kernels"] == "native") == NATIVE
    assert set(found["measured"]["products"]) == {"float32", "bfloat16", "8 bits", "4 bits"}


def test_cores_are_the_affinity_and_the_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 2, 5, 7, 8}, raising=False)
    assert machine.cores() == 5
    for quota, expected in {"250000 100000": 3, "max 100000": 5, "900000 100000": 5}.items():
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert machine.cores() == expected
    (tmp_path / "memory.max").write_text("1000000\n")
    assert machine.memory() in (1000000, None)


def test_extras_are_those_of_the_distribution(monkeypatch):
    monkeypatch.setattr(pytest.importorskip("setuptools"), "setup", lambda **keywords: None)
    extras = runpy.run_path(str(ROOT / "setup.py"))["EXTRAS"]
    brought = {
        package.partition(">=")[0]: name
        for name in ("openvino", "onnx", "report", "plot", "training", "lora")
        for package in extras[name]
    }
    assert {name: extra for name, extra in machine.OPTIONAL.items() if extra} == brought


def test_what_is_not_installed_comes_with_its_line(cli, monkeypatch):
    monkeypatch.setattr(machine, "installer", lambda: "pip install")
    monkeypatch.setattr(machine, "_version", lambda package: None if package in ("peft", "triton") else "1.2.3")
    out = cli("doctor", "--no-measure").out
    assert 'Missing:     peft (pip install -e ".[lora]")\nMissing:     triton (pip install triton)\n' in out
    assert "onnxruntime 1.2.3" in out


WHEEL = "a wheel, which has them (bash .ci/wheels, on any Linux with gcc, makes it), or "


@pytest.mark.parametrize(
    ("wheel", "compiler", "said"),
    [
        (True, None, f"install {WHEEL}a C++ compiler (Debian and Ubuntu: apt"),
        (True, "g++", f"install {WHEEL}fairseq again, in the folder of the"),
        (False, None, "install a C++ compiler (Debian and Ubuntu: apt install g++), and then fairseq again, in the"),
        (False, "g++", "install fairseq again, in the folder of the"),
    ],
)
def test_kernels_that_were_not_built(cli, quick, monkeypatch, tmp_path, wheel, compiler, said):
    monkeypatch.setattr(library, "_file", lambda: tmp_path / "_native.so")
    monkeypatch.setattr(machine, "compiler", lambda: compiler)
    monkeypatch.setattr(machine, "WHEELS", [(platform.system(), platform.machine())] if wheel else [])
    result = cli("doctor", "--json", *([] if (wheel, compiler) == (False, None) else ["--no-measure"]))
    found = json.loads(result.out)
    assert (result.code, found["native"]["problem"], found["native"]["levels"]) == (1, library.NOT_BUILT, [])
    assert f"missing, which make quantized models fast on the CPU: {said}" in found["advice"]
    assert found["advice"].endswith(f"in the folder of the clone: {found['native']['install']}")
    assert found["measured"] is None or found["measured"]["kernels"] != "native"
    assert (found["measured"] is None) == ((wheel, compiler) != (False, None))  # once is enough


def test_a_library_that_does_not_load(cli, monkeypatch, tmp_path):
    (tmp_path / "_native.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "_file", lambda: tmp_path / "_native.so")
    result = cli("doctor", "--no-measure")
    assert result.code == 1
    assert f"Kernels:     they do not load: {tmp_path / '_native.so'}" in result.out
    monkeypatch.setenv(library.LIBRARY, str(tmp_path / "_native.so"))
    result = cli("doctor", "--no-measure")
    assert result.code == 1
    assert result.out.splitlines()[-1].startswith("Unset FAIRSEQ_QUANTIZATION_LIBRARY; ")


@pytest.mark.skipif(not NATIVE, reason=library.NOT_BUILT)
def test_a_level_that_fails_its_check(cli, monkeypatch):
    *_, second, best = native.levels()
    native.levels.cache_clear()
    exact, wrong = native_calls.product, native.level_names().index(best)
    monkeypatch.setattr(native_calls, "product", lambda q, layer, level: exact(q, layer, level) + (level == wrong))
    result = cli("doctor", "--no-measure")
    problem = "their integer product at 8 bits differs from the reference's"
    assert result.code == 1
    assert f"\n{best}: {problem}\n" in result.out
    assert f"{second} runs\n" in result.out
    assert result.out.endswith(
        f"{best} is left out, as its self-check fails, and {second} runs instead: please report it.\n"
    )
    assert f"warning: the native kernels for {best} are not used: {problem}" in result.err


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("LEVEL", "sse9", "FAIRSEQ_QUANTIZATION_LEVEL: level 'sse9' does not run here"),
        ("BACKEND", "fast", "FAIRSEQ_QUANTIZATION_BACKEND must be one of"),
        ("ATTENTION", "float16", "FAIRSEQ_QUANTIZATION_ATTENTION must be one of"),
    ],
)
def test_environment_variables_that_say_what_cannot_be(cli, monkeypatch, variable, value, said):
    if variable == "LEVEL" and not NATIVE:
        pytest.skip(library.NOT_BUILT)
    monkeypatch.setenv(f"FAIRSEQ_QUANTIZATION_{variable}", value)
    result = cli("doctor")
    assert result.code == 1
    assert f"\nCorrect the environment variable: {said}" in result.out
    assert "failed" not in result.out
    assert "GOP/s" not in result.out


def level(name, runs_here=True, problem=None):
    return {"name": name, "runs_here": runs_here, "problem": problem}


FINE = {
    "system": "Linux-6.18",
    "processor": {"threads": 4, "cores": 4, "load": 2.0, "openmp": True},
    "gpu": {"devices": [], "triton_problem": None},
    "environment": {},
    "native": {
        "problem": None, "wheel": True, "install": "uv pip install -e .", "compiler": "c++", "used": "avx2",
        "mistake": None, "levels": [level("portable"), level("avx2"), level("amx", runs_here=False)],
    },
    "measured": {"products": {
        "8 bits": {"to_float32": 3.24, "to_bfloat16": 1.61}, "4 bits": {"to_float32": 3.06, "to_bfloat16": 1.5},
    }},
}  # fmt: skip
H100 = {"name": "H100"}


@pytest.mark.parametrize(
    ("changes", "attention", "said"),
    [
        ({}, False, "8 bits are 3.2 times as fast as float32 here (1.6 times bfloat16); quantize with bits=8, or with "
         "bits=4 for half of the size at 3.1 times."),
        ({"measured": None}, False, "without --no-measure"),
        ({"measured.products.8 bits.to_float32": 1.04}, False, "not be faster than float32 here; it will be smaller"),
        ({"processor.load": 2.1}, False, "busy (load 2.1 on 4 cores), so these times say little: measure again when it "
         "is idle; to work beside them, set OMP_WAIT_POLICY=passive."),
        ({"processor.load": 2.1, "environment": {"OMP_WAIT_POLICY": "active"}}, False, "OMP_WAIT_POLICY=passive."),
        ({"processor.load": 2.1, "environment": {"OMP_WAIT_POLICY": "PASSIVE"}}, False, "again when it is idle."),
        ({"processor.load": 2.1, "processor.openmp": False}, False, "again when it is idle."),
        ({"processor.load": 2.1, "processor.threads": 1}, False, "again when it is idle."),
        ({"gpu.devices": [H100]}, False, 'H100 is here: move the model to it, model.to("cuda", torch.bfloat16), or '
         "take --device cuda."),
        ({"gpu.devices": [H100], "gpu.triton_problem": "it is old"}, False, "do not run there, as it is old."),
        ({"native.used": "portable"}, False, "LEVEL=portable is set, though avx2 runs here"),
        ({"environment": {"FAIRSEQ_QUANTIZATION_BACKEND": "cpu"}}, False, "BACKEND=cpu rules out faster kernels"),
        ({"processor.threads": 5, "gpu.devices": [H100]}, True, "uses 5 threads on 4 cores: set OMP_NUM_THREADS=4."),
        ({"native.levels": [level("avx2", problem="off")], "native.used": None, "processor.threads": 5}, True,
         "avx2 is left out, as its self-check fails, and no native kernels run: please report it."),
        ({"native.problem": "gone", "native.levels": [], "processor.threads": 5}, True, "clone: uv pip install -e ."),
        ({"native.problem": "gone", "system": "Windows-11"}, True, "Windows has none, its Linux (WSL) has them"),
        ({"native.problem": "gone", "native.mistake": "that is no level"}, True, "variable: that is no level."),
    ],
)  # fmt: skip
def test_advice(changes, attention, said):
    found = copy.deepcopy(FINE)
    for path, value in changes.items():
        *outer, last = path.split(".")
        place = found
        for key in outer:
            place = place[key]
        place[last] = value
    sentence, needs_attention = advise(found)
    assert needs_attention is attention
    assert said in sentence
    assert "\n" not in sentence


def test_gpus(monkeypatch, tmp_path):
    """As PyTorch tells of them; there is none on most machines that run the tests."""
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    )
    monkeypatch.setattr(machine, "NVIDIA", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device = SimpleNamespace(name="NVIDIA H100", total_memory=85_000_000_000, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(machine, "reason_not_on", lambda device: None)
    gpu = machine.gpu()
    assert gpu["devices"] == 2 * [{"name": "NVIDIA H100", "memory": 85_000_000_000, "capability": "9.0"}]
    assert (gpu["driver"], gpu["cuda"]) == ("580.65.06", torch.version.cuda)
    monkeypatch.undo()
    found = {**machine.facts(), "measured": None, "advice": "", "gpu": gpu | {"triton_problem": "Triton is old"}}
    line = f"NVIDIA H100, 85.0 GB, compute capability 9.0, driver 580.65.06, CUDA {gpu['cuda']}; Triton is old"
    assert text(found).count(f"GPU:         {line}\n") == 2


def test_times_and_ratios_are_those_of_the_turns(monkeypatch):
    """On a clock of its own: of a turn's calls the first does not count; rounds are 1, 3 and 2 times as slow."""
    milliseconds, clock, count = {"float32": 40, "bfloat16": 20, "8 bits": 10, "4 bits": 5}, [0.0], [0]

    def call(ms):
        of_turn, of_round = (0.5, 3, 1, 0.5)[count[0] % 4], (1, 3, 2)[count[0] // 16]
        clock[0] += of_turn * of_round * ms / 1000
        count[0] += 1

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(machine_speed, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=sleep))
    for name, value in {"SECONDS": 2, "COPYING": 0, "TURN": 0}.items():  # two rounds take 1.66, three 2.49
        monkeypatch.setattr(machine_speed, name, value)
    calls = {name: functools.partial(call, ms) for name, ms in milliseconds.items()}
    monkeypatch.setattr(machine_speed, "candidates", lambda backend: calls)
    monkeypatch.setattr(machine_speed, "copy_rate", lambda nbytes, seconds: nbytes)
    found = machine_speed.measure(False, 2**30)
    assert (found["rounds"], found["copy_gb_per_second"]) == (3, 2**26 / 1e9)
    for name, ms in milliseconds.items():
        expected = {"ms": 2 * ms, "gops": 2 * 197 * 768 * 3072 / (2 * ms) / 1e6}
        assert found["products"][name] == pytest.approx(expected | {"to_float32": 40 / ms, "to_bfloat16": 20 / ms})


def test_copies_are_read_and_written(monkeypatch):
    monkeypatch.setattr(machine_speed, "_seconds", lambda call, seconds, least: [call() is not None and 9, 0.5, 0.1])
    assert machine_speed.copy_rate(2**20, 0) == 2 * 2**20 / 0.5


def test_candidates_compute_the_same_layer():
    four = machine_speed.candidates("native" if NATIVE else "cpu")
    assert list(four) == ["float32", "bfloat16", "8 bits", "4 bits"]
    with torch.inference_mode():
        outputs = {name: call() for name, call in four.items()}
    expected = outputs["float32"]
    assert expected.shape == (197, 3072)
    assert outputs["bfloat16"].dtype == torch.bfloat16
    errors = {name: float((y.float() - expected).norm() / expected.norm()) for name, y in outputs.items()}
    assert errors["bfloat16"] < errors["8 bits"] < 0.02 < errors["4 bits"] < 0.2


def test_without_measuring(cli, monkeypatch):
    monkeypatch.setattr(machine_speed, "measure", lambda *arguments: pytest.fail("measured"))
    result = cli("doctor", "--no-measure", "--json", "--quiet")
    assert json.loads(result.out)["measured"] is None
    assert result.err == ""
