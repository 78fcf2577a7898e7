"""What quantization did to a model: comparisons, the report and its picture."""
