"""Exchangeable rules: selection, combining, visibility, pruning, posterior, schedules."""
