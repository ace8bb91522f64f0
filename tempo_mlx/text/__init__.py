"""Tokens and text: the vocabulary, chat templates, and text that is printed."""
