"""benchmark.py, roofline.py and bench_candidates.py: what they measure, write and draw, and one line for a mistake."""

import csv
import importlib.util
import io
import json
import statistics
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.kernels import library, native, structures
from fairseq.quantization.engine.fused_block import FusedBlock

FOLDER = Path(__file__).parents[2] / "examples" / "vision_transformer"
EIGHT, FOUR = "8-bit channel", "4-bit channel"
HELD = {"resident": 3_000_000, "peak": 5_000_000, "before_model": 2_000_000}


def load(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark_script(monkeypatch, capsys):
    """Run benchmark.py in this process, with short turns: (exit code, standard output, standard error)."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def call(*arguments, held=lambda *_: HELD, **replaced):
        module = load("benchmark")
        vars(module).update(replaced)
        module.PAUSE, module.TURN = 0, 0.005
        module.measure_roofline = lambda: module.Roofline(1e12, "a product", 1e9)
        if held:
            module.measure_memory = held
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments), "--threads", "1"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            module.run(module.main)
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return call


@pytest.fixture
def pictures(tmp_path):
    """Arguments for six noise pictures, all of class 0."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    with (tmp_path / "labels.csv").open("w", newline="") as opened:
        csv.writer(opened).writerows([("file", "class_index"), *((f"{i}.png", 0) for i in range(6))])
    return ["--images", folder, "--labels", tmp_path / "labels.csv"]


def test_candidates_are_packed_and_run(tiny_vit, pixels):
    module = load("bench_candidates")
    candidates = module.candidates(tiny_vit)
    assert list(candidates) == list(module.SETTINGS)
    fused = {
        name for name, candidate in candidates.items() if any(isinstance(m, FusedBlock) for m in candidate.modules())
    }
    by_layers = {name for name in candidates if "layers" in name}
    assert fused == (set(candidates) - by_layers if native.levels() else set())
    expected = tiny_vit(pixels).logits
    for name, candidate in candidates.items():
        with torch.inference_mode():
            got = candidate(pixels).logits
        assert got.shape == (5, 7)
        assert got.isfinite().all()
        assert not torch.equal(got, expected)
        layers = [m for m in candidate.modules() if isinstance(m, PackedLinear)]
        assert len(layers) == 7
        assert not any(isinstance(m, torch.nn.Linear) for m in candidate.modules())
        assert {m.config.bits for m in layers} == {int(name[0])}
        assert {m.config.activations for m in layers} == {None if "weight-only" in name else "dynamic"}


def test_every_figure_is_written(benchmark_script, model, tmp_path):
    file = tmp_path / "result.json"
    code, out, _ = benchmark_script("--model", model, "--rounds", 3, "--batch", 1, 3, "--json", file)
    assert code == 0
    result = json.loads(file.read_text())
    assert result["pictures"] == 0
    assert result["rounds"] == 3
    assert result["machine"]["threads"] == 1
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["processor"]
    configurations = result["configurations"]
    assert len(configurations) == 13
    assert all(fixed["memory"] == HELD for fixed in configurations.values())
    size = {name: fixed["weight_bytes"] for name, fixed in configurations.items()}
    assert size["bfloat16"] == size["float32"] / 2
    assert size[FOUR] < size[EIGHT]
    assert size["4-bit channel, layers"] < size["8-bit channel, layers"] < size[EIGHT] == size["8-bit weight-only"]
    assert result["profiles"] == {}
    assert "by operation" not in out
    assert list(result["batches"]) == ["1", "3"]
    tokens, linears = 17, 4 * 24 * 24 + 2 * 24 * 40
    assert result["operations_per_picture"] == 2 * (tokens * linears + 24 * 7)
    for batch, timings in result["batches"].items():
        assert set(timings) == set(configurations)
        reference = timings["float32"]["ms_per_round"]
        for name, timing in timings.items():
            assert timing["ms"] == statistics.median(timing["ms_per_round"])
            ratios = [f / own for f, own in zip(reference, timing["ms_per_round"], strict=True)]
            assert timing["speed"] == pytest.approx(statistics.median(ratios))
            assert timing["images_per_second"] == pytest.approx(1000 * int(batch) / timing["ms"])
            share = result["operations_per_picture"] * timing["images_per_second"] / 1e12
            in_integers = name not in ("float32", "bfloat16") and "weight-only" not in name
            assert timing["int8_peak_share"] == (pytest.approx(share) if in_integers else None)
            assert timing["bandwidth_share"] == pytest.approx(size[name] / (timing["ms"] / 1000) / 1e9)
        kernels = native.level_names()[native.level_number()] if native.levels() else "no native kernels"
        assert f"Batch {batch} ({kernels}, threads: 1, int8 peak 1.00 TOPS, memory 1.0 GB/s)\n" in out
    assert "the fastest product was a product\n" in out
    assert "top-1" not in out
    row = next(line for line in out.splitlines() if line.startswith("float32"))
    assert row.split()[3] == "1.00x"
    assert "3 MB" in row


def test_models_of_integers_are_timed_on_random_weights_alone(benchmark_script, model, tiny_vit):
    module = load("bench_candidates")
    for name in module.INTEGERS:
        assert type(module.quantized(tiny_vit, name)).__name__ == type(tiny_vit).__name__
        code, _, err = benchmark_script("--model", model, "--configs", name)
        assert code != 0
        assert f"{name!r} has ranges from noise, and needs --size" in err
    code, out, _ = benchmark_script(
        "--size", "tiny", "--rounds", 1, "--batch", 1, "--configs", *module.INTEGERS, build=lambda *_: tiny_vit
    )
    assert code == 0
    assert all(name in out for name in module.INTEGERS)


@pytest.mark.skipif(not native.levels(), reason=library.NOT_BUILT)
def test_the_profile(benchmark_script, model, tmp_path):
    file = tmp_path / "result.json"
    names = [EIGHT, "8-bit channel, layers"]
    script = ["--model", model, "--rounds", 2, "--batch", 2, "--configs", *names, "--profile", "--json", file]
    code, out, _ = benchmark_script(*script)
    assert code == 0
    result = json.loads(file.read_text())
    assert result["machine"]["instruction_set"] == native.level_names()[native.level_number()]
    (linears,) = result["linears"].values()
    assert [(one["rows"], one["in"], one["out"]) for one in linears] == [(34, 24, 24), (34, 24, 40), (34, 40, 24)]
    assert all(one["native layer"] > 0 and one["torch._int_mm"] > 0 for one in linears)
    assert "34 x 24 -> 40" in out
    (profile,) = result["profiles"]["2"].values()  # the other two run no native kernel
    assert set(profile) == {*structures.STAGES, "outside"}
    assert profile["unpack 4 bits"] == 0
    assert all(profile[name] > 0 for name in ("integer products", "attention", "outside"))
    lines = out.split("Batch 2, by operation (")[1].splitlines()[1:]
    assert lines[1].split() == ["operation", *EIGHT.split(), "share"]
    assert [line[: len("scale, bias, GELU, add")].strip() for line in lines[3:13]] == [
        *structures.STAGES, "outside", "all", "roofline",
    ]  # fmt: skip
    fixed = result["configurations"][EIGHT]["weight_bytes"]
    assert result["machine"]["int8_peak_tops"] == 1  # no layer of this size reaches it
    least = max(2 * result["operations_per_picture"] / 1e12, fixed / 1e9)
    assert f"{1000 * least:.2f} ms" in lines[12]


@pytest.mark.skipif(not native.levels(), reason=library.NOT_BUILT)
def test_a_layer_that_is_faster_is_the_peak(benchmark_script, model, tmp_path):
    file = tmp_path / "result.json"
    arguments = ["--model", model, "--rounds", 1, "--batch", 2, "--configs", EIGHT, "--profile", "--json", file]
    linear = {"rows": 34, "in": 24, "out": 40, "native layer": 3e12, "torch._int_mm": 2e12}
    code, out, _ = benchmark_script(*arguments, measure_linears=lambda *_: [linear])
    assert code == 0
    assert json.loads(file.read_text())["machine"]["int8_peak_tops"] == 3
    assert "the fastest product was native layer, 34 x 24 -> 40\n" in out
    assert "int8 peak 3.00 TOPS, memory 1.0 GB/s" in out
    row = next(line for line in out.splitlines() if line.startswith("34 x 24 -> 40"))
    assert row.split()[-2:] == ["150%", "100%"]


def test_the_higher_of_the_two_limits_counts(benchmark_script):
    roofline = load("roofline")
    limits = roofline.Roofline(peak=100.0, product="", bandwidth=10.0)
    assert limits.seconds(operations=1000, nbytes=50) == 10
    assert limits.seconds(operations=1000, nbytes=200) == 20
    other = roofline.Roofline(90.0, "another", 11.0)
    assert roofline.best([limits, other]) == (100.0, "", 11.0)


def test_limits_are_measured_on_this_machine(benchmark_script, monkeypatch):
    """The same work in the time that it took, the product by whichever is faster."""
    roofline = load("roofline")
    monkeypatch.setattr(roofline, "PRODUCTS", [(32, 64, 96)])
    monkeypatch.setattr(roofline, "last_cache", lambda: 0)
    monkeypatch.setattr(roofline, "LEAST_BUFFER", 4000)
    monkeypatch.setattr(roofline, "fastest", lambda function, seconds: [function(), 0.5][1])
    kinds = ["torch._int_mm", *(["native layer"] if native.levels() else [])]
    assert list(roofline.products(32, 64, 96)) == kinds
    assert all(run_once().shape == (32, 96) for run_once in roofline.products(32, 64, 96).values())
    assert roofline.measure_roofline() == (2 * 32 * 64 * 96 / 0.5, "torch._int_mm, 32 x 64 -> 96", 4000 / 0.5)
    times = iter([0.4, 0.2])
    monkeypatch.setattr(roofline, "products", lambda *_: {"slow": None, "fast": None})
    monkeypatch.setattr(roofline, "fastest", lambda *_: next(times))
    assert roofline.int8_peak(0)[1] == "fast, 32 x 64 -> 96"


def test_the_buffer_is_larger_than_the_last_cache(benchmark_script, monkeypatch, tmp_path):
    roofline = load("roofline")
    for level, size in enumerate(("48K", "2048K", "8192K")):
        (tmp_path / f"index{level}").mkdir()
        (tmp_path / f"index{level}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(roofline, "CACHES", tmp_path)
    monkeypatch.setattr(roofline, "LEAST_BUFFER", 4)
    monkeypatch.setattr(roofline, "fastest", lambda *_: 1)
    assert roofline.memory_bandwidth(0) == 16 * 2**20
    monkeypatch.setattr(roofline, "CACHES", tmp_path / "missing")
    assert roofline.memory_bandwidth(0) == 4


def test_the_roofline_is_drawn_where_the_figures_say(benchmark_script):
    from matplotlib.figure import Figure

    batches = {"1": {"images_per_second": 10.0}, "4": {"images_per_second": 20.0}}
    result = {
        "machine": {"int8_peak_tops": 2.0, "int8_peak_of": "a product", "memory_gb_per_second": 50.0,
                    "instruction_set": "avx2", "threads": 3},
        "operations_per_picture": 4e9,
        "configurations": {EIGHT: {"weight_bytes": 1e8}},
        "batches": {batch: {EIGHT: timing} for batch, timing in batches.items()},
    }  # fmt: skip
    axes = Figure().subplots()
    points = load("benchmark_picture").draw_roofline(axes, result)
    assert [(x, y, name) for x, y, _, name in points] == [(160.0, 0.08, EIGHT)]
    reached, roof = axes.lines
    assert reached.get_xydata().tolist() == [[40.0, 0.04], [160.0, 0.08]]
    left, ridge, right = roof.get_xydata().tolist()
    assert ridge == [40.0, 2.0]  # 2 Tera-operations on 50 GB
    assert left[1] / left[0] == pytest.approx(0.05)
    assert right[1] == 2.0
    assert "avx2, threads: 3, batch 1 (small) to 4 (large)" in axes.get_title()


def test_eight_bits_are_less_than_half(benchmark_script, tmp_path, monkeypatch):
    """On a model wide enough that its Linear layers are most of it."""
    file = tmp_path / "result.json"
    script = ["--size", "tiny", "--pixels", 32, "--rounds", 1, "--batch", 1, "--configs", EIGHT, FOUR, "--json", file]
    code, out, _ = benchmark_script(*script)
    assert code == 0
    assert out.startswith("ViT-tiny: ")
    result = json.loads(file.read_text())
    size = {name: fixed["weight_bytes"] for name, fixed in result["configurations"].items()}
    assert list(size) == ["float32", EIGHT, FOUR]
    assert size[EIGHT] < 0.5 * size["float32"]
    assert size[FOUR] < 0.65 * size[EIGHT]


def test_accuracy_and_the_picture(benchmark_script, model, pictures, tmp_path):
    file, picture = tmp_path / "result.json", tmp_path / "result.png"
    arguments = ["--model", model, "--rounds", 1, "--batch", 2, "--configs", "bfloat16", EIGHT]
    code, out, _ = benchmark_script(*arguments, *pictures, "--limit", 5, "--json", file, "--picture", picture)
    assert code == 0
    assert "agreement" in out
    result = json.loads(file.read_text())
    assert result["pictures"] == 5
    assert result["configurations"]["float32"]["agreement"] == 1
    assert all(5 * fixed["top1"] % 1 == pytest.approx(0) for fixed in result["configurations"].values())
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    code, *_ = benchmark_script(*arguments, "--picture", tmp_path / "size.PNG")
    assert code == 0
    assert Image.open(tmp_path / "size.PNG").size == Image.open(picture).size


def test_the_embedded_model_has_its_pictures(benchmark_script, tmp_path):
    file = tmp_path / "result.json"
    arguments = ["--model", FOLDER / "cifar10-vit", "--rounds", 1, "--batch", 1, "--configs", EIGHT, "--limit", 50]
    code, _, _ = benchmark_script(*arguments, "--json", file)
    assert code == 0
    result = json.loads(file.read_text())
    assert result["pictures"] == 50
    assert all(fixed["top1"] >= 0.7 for fixed in result["configurations"].values())
    assert result["configurations"][EIGHT]["agreement"] >= 0.95


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
@pytest.mark.parametrize("process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_is_that_of_another_process(benchmark_script, model, tmp_path, monkeypatch, process):
    """Or of this one, called as that is: how it is called and read, as the figures are then those of the tests."""
    file = tmp_path / "result.json"
    asked = load("benchmark")

    def here(command, **keywords):
        with monkeypatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
            patch.setattr(sys, "argv", command[1:])
            assert asked.main() == 0
        return SimpleNamespace(returncode=0, stdout=printed.getvalue())

    def once(name, *rest):
        return asked.measure_memory(name, *rest) if name == EIGHT else HELD

    if not process:
        asked.subprocess = SimpleNamespace(run=here)
    arguments = ["--model", model, "--rounds", 1, "--batch", 1, "--configs", EIGHT, "--json", file]
    code, out, _ = benchmark_script(*arguments, held=once)
    assert code == 0
    memory = json.loads(file.read_text())["configurations"][EIGHT]["memory"]
    assert 20e6 < memory["before_model"] < memory["peak"]
    assert memory["resident"] <= memory["peak"]
    assert "Python and PyTorch take" in out


def test_a_system_without_proc_says_so(benchmark_script, model):
    code, out, _ = benchmark_script(
        "--model", model, "--rounds", 1, "--batch", 1, "--configs", EIGHT, held=lambda *_: None
    )
    assert code == 0
    assert "resident and peak memory were not measured" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "9-bit channel"], "error: --configs: '9-bit channel' is not one of bfloat16; 8-bit channel; "),
        (["--model", "./missing"], "error: --model ./missing: no such folder"),
        (["--images", "pictures"], "error: --images and --labels go together"),
        (["--size", "tiny", "--images", "i", "--labels", "l"], "the random weights of --size have no accuracy"),
        (["--picture", "result.jpg"], "its name must end in .png"),
        (["--json", "missing/result.json"], "error: --json missing/result.json: no folder missing"),
        (["--json", "."], "error: --json .: is a folder"),
    ],
)
def test_mistakes_are_one_line(benchmark_script, arguments, message):
    code, _, err = benchmark_script(*arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_an_instruction_set_that_does_not_run_is_one_line(benchmark_script, monkeypatch):
    if not native.levels():
        pytest.skip(library.NOT_BUILT)
    monkeypatch.setenv(native.ENVIRONMENT, "sse9")
    code, _, err = benchmark_script("--size", "tiny")
    assert code == 2
    assert err.startswith("error: FAIRSEQ_QUANTIZATION_LEVEL: level 'sse9' does not run here; amx_emulated, portable")
    assert len(err.splitlines()) == 1


def test_without_matplotlib(benchmark_script, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    code, _, err = benchmark_script("--size", "tiny", "--picture", "result.png")
    assert (code, err) == (2, "error: --picture needs matplotlib: uv pip install matplotlib\n")


def test_a_child_that_fails_is_one_line(benchmark_script, model, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    code, _, err = benchmark_script("--model", model, "--configs", EIGHT, held=None)
    assert code == 2
    assert "error: the process that measures the memory of float32 failed: exit code 1" in err.splitlines()[-1]
