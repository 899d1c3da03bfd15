"""The decoder, and greedy decoding with it."""
