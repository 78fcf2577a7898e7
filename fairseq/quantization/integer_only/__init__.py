"""A Vision Transformer on integers alone, from the rounded pixels to the integers of the logits."""
