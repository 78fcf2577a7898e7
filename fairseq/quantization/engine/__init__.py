"""Encoder blocks as native calls."""
