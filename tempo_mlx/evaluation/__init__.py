"""The tasks of lm-evaluation-harness, with what their texts have in common read once."""
