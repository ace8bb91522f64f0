"""Tokens and text: the vocabulary, chat templates, and printable text."""
