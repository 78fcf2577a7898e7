"""QuantizationReport: bytes, text, table, files; and the numbers about a weight."""

import csv
import json
import math
from fnmatch import fnmatch

import pytest
import torch

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.evaluation.report import LayerReport, QuantizationReport
from fairseq.quantization.rounding.quality import decibels, sqnr, weight_statistics

NOTE = "static range too lossy: dynamic"


@pytest.fixture
def report():
    """Two quantized layers, one of them exact, and one in float."""
    layers = (
        LayerReport(
            "vit.layers.0.q", "attention", (4, 8), 128, 500, 4, "channel", None,
            "gptq", "dynamic", NOTE, 18.25, 24.5, 0.75, 3.5,
        ),
        LayerReport("vit.layers.0.fc1", "mlp", (16, 4), 256, 250, 8, "tensor", rounding="nearest", activations="static",
                    weight_sqnr=math.inf, output_sqnr=-math.inf, clip=1.0, outlier_ratio=2.0),
        LayerReport("classifier", "classifier", (3, 4), 48, 48, skipped="quantize_classifier=False"),
    )  # fmt: skip
    return QuantizationReport(layers, 2000, 1000)


def test_text_says_what_was_done_and_why_not():
    layers = (
        LayerReport("a", "attention", (4, 4), 64, 21, 8, "tensor"),
        LayerReport("b", "mlp", (4, 4), 64, 13, 4, "channel"),
        LayerReport("c", "classifier", (4, 4), 64, 64, skipped="quantize_classifier=False"),
    )
    report = QuantizationReport(layers, 2_000_000, 500_000)
    assert [layer.name for layer in report.quantized] == ["a", "b"]
    assert str(report).splitlines() == [
        "Quantized 2 linear layers: 1 8-bit tensor, 1 4-bit channel (1 attention, 1 mlp)",
        "Left 1 in float, quantize_classifier=False: c",
        "Model: 2.0 MB before, 0.5 MB after (-75.0%)",
    ]


def test_text_says_what_shares_a_scale_and_how_its_range_was_found():
    grids = [("channel", "least squared error")] * 2 + [("group", "min-max"), (None, None)]
    layers = tuple(
        LayerReport(str(i), "mlp", (4, 4), 64, 21, 8, "channel", granularity=granularity, range_search=search)
        for i, (granularity, search) in enumerate(grids)
    )
    text = str(QuantizationReport(layers, 2000, 500)).splitlines()
    assert text[0] == "Quantized 4 linear layers: 4 8-bit channel (4 mlp)"
    assert text[1] == "Ranges: 2 per channel by least squared error, 1 per group by min-max"
    table = QuantizationReport(layers, 2000, 500).table().splitlines()
    assert table[0].split() == ["layer", "component", "shape", "bits", "method", "granularity", "range", "size"]
    assert table[1].split()[5:-1] == ["channel", "least", "squared", "error"]
    assert table[4].split()[5:-1] == ["-", "-"]


@pytest.mark.filterwarnings("ignore:calibrating on")
def test_a_model_says_of_each_layer_its_block_and_what_was_used(tiny_vit, pixels):
    overrides = {"classifier": {"skip": True}, "*fc2": {"method": "tensor"}, "*output.dense": {"method": "tensor"}}
    overrides = {
        glob: own for glob, own in overrides.items() if any(fnmatch(n, glob) for n, _ in tiny_vit.named_modules())
    }
    quantizer = ViTQuantizer(bits=4, method="channel", overrides=overrides, quantize_embeddings=True)
    used = {}
    for calibration in (None, pixels):
        quantizer.quantize_model(tiny_vit, calibration=calibration)
        for layer in quantizer.report.layers:
            assert (layer.block is None) == (layer.component in ("classifier", "embeddings"))
            assert layer.block is None or layer.name.startswith(f"{layer.block}.")
            used.setdefault((calibration is not None, layer.method), set()).add((layer.granularity, layer.range_search))
    assert len({layer.block for layer in quantizer.report.layers}) == 3
    search = "least squared error"
    assert used == {
        (False, "channel"): {("channel", "min-max")},
        (True, "channel"): {("channel", search), ("channel", "min-max")},  # position embeddings are not calibrated
        (False, "tensor"): {("tensor", search)},
        (True, "tensor"): {("tensor", search)},
        (False, None): {(None, None)},
        (True, None): {(None, None)},
    }


def test_text_counts_the_notes():
    notes = ["x", None, "y", "y", "z", "u"]
    layers = tuple(LayerReport(str(i), "mlp", (4, 4), 64, 21, 8, "tensor", note=note) for i, note in enumerate(notes))
    line = str(QuantizationReport(layers, 2000, 500)).splitlines()[1]
    assert line == "Notes: y (2 layers); x (1 layer); z (1 layer); ..."


def test_table_aligns_all_columns(report):
    head, first, second, third = report.table().splitlines()
    assert head.split("  ")[0] == "layer"
    columns = ["component", "shape", "bits", "method", "rounding", "activations", "weight SQNR", "output SQNR", "clip",
               "outliers", "size", "note"]  # fmt: skip
    starts = [head.index(title) for title in columns]
    assert starts == sorted(starts)
    assert first.split(maxsplit=12) == [
        "vit.layers.0.q", "attention", "4x8", "4", "channel", "gptq", "dynamic", "18.2", "24.5", "0.750", "3.5",
        "50.0%", NOTE,
    ]  # fmt: skip
    assert second.split() == [
        "vit.layers.0.fc1", "mlp", "16x4", "8", "tensor", "nearest", "static", "inf", "-inf", "1.000", "2.0", "25.0%",
    ]  # fmt: skip
    assert third.split() == ["classifier", "classifier", "3x4", *["-"] * 8, "4.8%", "quantize_classifier=False"]
    end = head.index("note") - 2
    assert all(line[:end][-1] == "%" and line[end : end + 2].strip() == "" for line in (first, second, third))


def test_table_leaves_out_what_no_layer_has():
    report = QuantizationReport((LayerReport("a", "mlp", (4, 4), 64, 25, 8, "tensor", weight_sqnr=40.0),), 200, 100)
    assert report.table().splitlines() == [
        "layer  component  shape  bits  method  weight SQNR   size",
        "a      mlp          4x4     8  tensor         40.0  25.0%",
    ]


def test_json_gives_the_same_report_back(report, tmp_path):
    path = tmp_path / "report.json"
    report.to_json(path)
    assert QuantizationReport.from_json(path) == report
    assert QuantizationReport.from_json(str(path)).layers[1].weight_sqnr == math.inf
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]  # no temporary file


def test_json_of_an_older_version_loads(tmp_path):
    """Written before layers told their block, granularity and range search."""
    layer = '{"name": "a", "component": "mlp", "shape": [4, 8], "bytes_before": 128, "bytes_after": 60, "bits": 4}'
    head = '"execution": "packed", "fused_blocks": 1, "bytes_before": 2000, "bytes_after": 1000'
    (tmp_path / "report.json").write_text(f'{{{head}, "layers": [{layer}]}}')
    (layer,) = QuantizationReport.from_json(tmp_path / "report.json").layers
    assert layer == LayerReport("a", "mlp", (4, 8), 128, 60, 4)
    assert (layer.block, layer.granularity, layer.range_search) == (None, None, None)


def test_json_is_strict_and_keeps_infinite_apart_from_unknown(report, tmp_path):
    path = tmp_path / "report.json"
    report.to_json(path)
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (content["execution"], content["bytes_before"], content["bytes_after"]) == ("packed", 2000, 1000)
    assert content["layers"][1]["weight_sqnr"] is None
    assert "weight_sqnr" not in content["layers"][2]


def test_json_of_a_report_without_layers(tmp_path):
    report = QuantizationReport((), 10, 10, "emulated")
    report.to_json(tmp_path / "report.json")
    report.to_csv(tmp_path / "report.csv")
    assert QuantizationReport.from_json(tmp_path / "report.json") == report
    assert report.table().count("\n") == 0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"layers": [{"nome": 1}]}', '{"layers": [1]}', '{"layers": [], "x": 1}', "\xff"]
)
def test_json_that_is_no_report(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"other\.json is not a report"):
        QuantizationReport.from_json(path)


def test_csv_has_a_row_per_layer(report, tmp_path):
    path = tmp_path / "report.csv"
    report.to_csv(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["vit.layers.0.q", "vit.layers.0.fc1", "classifier"]
    first, second, third = rows
    assert (first["out_features"], first["in_features"], first["bits"], first["note"]) == ("4", "8", "4", NOTE)
    assert (float(first["weight_sqnr"]), float(first["clip"]), float(first["share"])) == (18.25, 0.75, 0.5)
    assert float(second["weight_sqnr"]) == math.inf
    assert (third["bits"], third["clip"], third["skipped"]) == ("", "", "quantize_classifier=False")


@pytest.mark.parametrize("method", ["to_json", "to_csv", "plot"])
def test_missing_folder(report, tmp_path, method):
    if method == "plot":
        pytest.importorskip("matplotlib")
    with pytest.raises(FileNotFoundError, match=r"the folder .*missing does not exist; create it first"):
        getattr(report, method)(tmp_path / "missing" / "report.png")


def test_a_failed_write_leaves_the_old_file(report, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.to_json(path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "old"


def test_sqnr_of_exact_cases():
    signal = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    got = torch.tensor([[3.0, 0.0], [0.5, 4.0]])  # energies 25 and 0.25
    assert sqnr(signal, got) == pytest.approx(20.0, abs=1e-12)
    assert sqnr(signal, 0 * signal) == pytest.approx(0.0, abs=1e-12)
    assert sqnr(signal, signal) == math.inf
    assert sqnr(0 * signal, got) == -math.inf
    assert sqnr(0 * signal, 0 * signal) == math.inf


def test_sqnr_in_half_precision_sums_without_overflow():
    signal = torch.full((64, 64), 300.0, dtype=torch.float16)  # its square is beyond float16
    assert sqnr(signal, signal - 3) == pytest.approx(40.0, abs=1e-9)


def test_decibels():
    assert decibels(1000.0, 1.0) == pytest.approx(30.0)
    assert decibels(1e-300, 1e300) == pytest.approx(-6000.0)
    assert decibels(1.0, -1e-12) == math.inf  # an energy that is zero but for the rounding of a sum


def test_weight_statistics_of_a_small_case():
    weight = torch.tensor([[4.0, -4.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0], [2.0, -2.0, 0.0, 0.0]])
    real = torch.tensor([[2.0, -2.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0], [1.8, -1.8, 0.0, 0.0]])
    statistics = weight_statistics(weight, real)
    assert statistics == {
        "weight_sqnr": pytest.approx(10 * math.log10(42 / 8.08)),
        "clip": pytest.approx(0.9),  # the rows: 0.5, 1.0, 0.9
        "outlier_ratio": pytest.approx(4 / math.sqrt(42 / 12)),
    }
    assert weight_statistics(weight, real, per_tensor=True)["clip"] == pytest.approx(0.5)
    LayerReport("a", "mlp", (3, 4), 48, 12, **statistics)


def test_range_includes_zero_and_is_never_more_than_all():
    weight = torch.tensor([[2.0, 3.0]])
    assert weight_statistics(weight, torch.tensor([[2.0, 2.4]]))["clip"] == pytest.approx(0.8)
    assert weight_statistics(weight, torch.tensor([[2.0, 3.5]]))["clip"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weight_statistics_without_error_or_spread(dtype, device):
    weight = torch.nn.Parameter(torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=dtype, device=device))
    exact = {"weight_sqnr": math.inf, "clip": 1.0, "outlier_ratio": 1.0}
    assert weight_statistics(weight, weight.float()) == exact
    zeros = torch.zeros(3, 4, dtype=dtype, device=device)
    assert weight_statistics(zeros, zeros) == {"weight_sqnr": math.inf, "clip": 1.0, "outlier_ratio": 0.0}
    assert weight_statistics(zeros + 2, zeros + 2)["outlier_ratio"] == math.inf
