"""Scores of candidate words in contexts, for decoders of speech and brain signals."""

from .pyctcdecode import PyctcdecodeLM
from .requests import ScoringStats
from .scorer import CandidateScore, ContinuationScorer, TokenScore

__all__ = [
    "CandidateScore",
    "ContinuationScorer",
    "PyctcdecodeLM",
    "ScoringStats",
    "TokenScore",
]
