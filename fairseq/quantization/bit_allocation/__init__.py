"""How many bits each layer gets."""
