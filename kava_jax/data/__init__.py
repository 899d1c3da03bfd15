"""Text sources, tokens and batches."""
