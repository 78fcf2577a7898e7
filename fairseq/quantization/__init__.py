"""Acting on a whole model: which layers, which settings, swap, report, compare."""
