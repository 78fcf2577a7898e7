"""The program ``fairseq-vit``: a command for each thing that people do with models, and ``doctor`` for the machine."""
