"""Suites of many runs: expanded from one file, run, captured, analysed, reported."""
