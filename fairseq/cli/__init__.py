"""The program ``fairseq-vit``: quantize, distill, pareto, compare, evaluate, benchmark, report, export, inspect."""
