"""Data sets as lists of `Example`, and their encoding for a causal language model."""
