"""Objective, optimizer, step, checkpoints, monitor and loop."""
