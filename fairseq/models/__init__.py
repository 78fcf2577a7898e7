"""Whole models: the Vision Transformer quantizer."""
