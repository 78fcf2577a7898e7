"""QuantizationReport: bytes and text."""

from fairseq.quantization.report import LayerReport, QuantizationReport, packed_bytes


def test_packed_bytes():
    assert packed_bytes((10, 100), 8, 1) == 1000 + 5
    assert packed_bytes((10, 100), 4, 10) == 500 + 50
    assert packed_bytes((10, 101), 4, 1) == 510 + 5  # a row ends with its byte
    assert packed_bytes((10, 100), 3, 1) == 380 + 5
    assert packed_bytes((10, 100), 2, 1) == 250 + 5
    assert {packed_bytes((10, 100), bits, 1) for bits in (5, 6, 7)} == {1005}


def test_text_says_what_was_done_and_why_not():
    layers = (
        LayerReport("a", "attention", (4, 4), 64, 21, 8, "tensor"),
        LayerReport("b", "mlp", (4, 4), 64, 13, 4, "channel"),
        LayerReport("c", "classifier", (4, 4), 64, 64, skipped="quantize_classifier=False"),
    )
    report = QuantizationReport(layers, 2_000_000, 500_000, 2_100_000)
    assert [layer.name for layer in report.quantized] == ["a", "b"]
    assert str(report).splitlines() == [
        "Quantized 2 linear layers: 1 8-bit tensor, 1 4-bit channel (1 attention, 1 mlp)",
        "Left 1 in float, quantize_classifier=False: c",
        "Model: 2.0 MB in float, 0.5 MB as packed integers (-75.0%); in memory now: 2.1 MB",
    ]
