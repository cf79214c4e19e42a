"""Readers of weights that others trained, each checked by its outputs."""
