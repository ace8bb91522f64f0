"""An OpenAI-style HTTP server: generation in one running batch, exact scores, distinct texts."""
