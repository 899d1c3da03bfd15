"""Measurements of the method itself."""
