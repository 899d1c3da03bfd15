"""Held-out loss, alignment and exact match."""
