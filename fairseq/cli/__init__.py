"""The command line ``fairseq-vit``: quantize, compare, evaluate, benchmark, export, inspect."""
