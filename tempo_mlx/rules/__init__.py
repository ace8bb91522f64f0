"""What may be exchanged: selection, combining, visibility, pruning, posterior, schedules."""
