"""Quantization of HuggingFace Vision Transformers to 8 and 4 bits; importing this loads nothing else."""

__version__ = "0.1.0"
