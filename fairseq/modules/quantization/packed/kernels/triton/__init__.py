"""Kernels in Triton for NVIDIA GPUs, one file each; only what runs on a GPU imports them, and Triton with them."""
