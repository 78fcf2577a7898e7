"""The command line ``fairseq-vit``: quantize, distill, compare, evaluate, benchmark, export, inspect, doctor."""
