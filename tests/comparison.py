"""Comparison of data whose numbers are equal but for rounding."""

import pytest


def assert_close(found, expected, rel=1e-3, abs=1e-5, where="") -> None:
    """Lists and dictionaries of any depth; everything but floating-point numbers is equal."""
    if isinstance(expected, dict) and isinstance(found, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, rel, abs, f"{where}.{key}")
    elif isinstance(expected, list) and isinstance(found, list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, rel, abs, f"{where}[{number}]")
    elif isinstance(expected, float) and isinstance(found, float):
        assert found == pytest.approx(expected, rel=rel, abs=abs), where
    else:
        assert found == expected, where
