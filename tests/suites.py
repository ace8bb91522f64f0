"""A small suite for a tiny model on disk, and what its results must be."""

from pathlib import Path

import yaml

TEXT = """
name: small
model: {model}
prompts:
  first: [hello there, a b c]
  second: [once upon, the end of it]
settings: {{max_tokens: 6, threshold: 0.03, max_parallel: 4}}
grid:
  visibility: [isolated, visible]
"""


def suite_text(model: str, **changes) -> str:
    """The suite's YAML; a change of None leaves a key out."""
    data = yaml.safe_load(TEXT.format(model=model)) | changes
    return yaml.safe_dump({key: value for key, value in data.items() if value is not None})


def save_suite(path: Path, model: str, **changes) -> Path:
    path.write_text(suite_text(model, **changes))
    return path


def assert_same_tables(one, other, atol=1e-5):
    """Tables of two folders: equal tokens, numbers equal but for rounding, times left out."""
    import numpy as np
    import pandas as pd

    pd.testing.assert_frame_equal(
        one.runs.drop(columns="seconds"), other.runs.drop(columns="seconds")
    )
    for name in ("tokens", "entries", "entropy", "next_tokens", "kl"):
        pd.testing.assert_frame_equal(
            getattr(one, name), getattr(other, name), check_exact=False, rtol=atol, atol=atol
        )
    np.testing.assert_allclose(one.received, other.received, atol=atol)
