"""Loading models: recipes, folders and Hub ids, GGUF conversion, fingerprints."""

from .loading import ModelLoadError, load

__all__ = ["ModelLoadError", "load"]
