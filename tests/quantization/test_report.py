"""QuantizationReport: bytes and text."""

from fairseq.quantization.report import LayerReport, QuantizationReport


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
