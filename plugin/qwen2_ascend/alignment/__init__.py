"""Finds where a run differs from transformers, layer by layer."""
