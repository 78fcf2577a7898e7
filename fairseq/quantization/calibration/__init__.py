"""Pictures in, statistics of each layer's inputs out."""
