"""Arithmetic of quantization, one layer at a time: ``scalar`` emulates, ``integer`` is integer-only."""
