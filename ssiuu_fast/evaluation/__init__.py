"""Scores of what a model knows, and attacks that try to bring it back."""
