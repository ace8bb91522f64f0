"""Measurements of speed and memory, compared with alternatives in the same process."""
