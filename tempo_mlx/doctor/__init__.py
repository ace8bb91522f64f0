"""What is installed, which models are here, and whether this machine computes correctly."""
