"""What a run is: tokens, steps, sets and parents; the result and its JSON schema."""
