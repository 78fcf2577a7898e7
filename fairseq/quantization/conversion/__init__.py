"""Swapping the layers of a model for quantized ones; nothing else swaps a module."""
