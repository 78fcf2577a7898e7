"""Packed models in files: written whole, read with care."""
