"""Measurements of speed and memory: ours beside the alternative, in one process."""
