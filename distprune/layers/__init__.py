"""Decoder layers: as values that pruning changes, and as transformers' own modules that run."""
