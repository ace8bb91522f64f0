"""What a run is: tokens, steps, sets and parents, and how they are shown."""
