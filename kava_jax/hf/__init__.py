"""Hugging Face directories in and out: geometry, names, weights, model card."""
