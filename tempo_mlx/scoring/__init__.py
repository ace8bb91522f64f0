"""Scores of candidate words in contexts, for decoders of speech and brain signals."""

from .ctc_decoder import ctc_decoder_lm
from .pyctcdecode import PyctcdecodeLM, batched
from .requests import ScoringStats
from .rescoring import Hypothesis, NBest, RescoredList, Weights, rescore
from .scorer import CandidateScore, ContinuationScorer, TokenScore
from .text_scores import TextScore

__all__ = [
    "CandidateScore",
    "ContinuationScorer",
    "Hypothesis",
    "NBest",
    "PyctcdecodeLM",
    "RescoredList",
    "ScoringStats",
    "TextScore",
    "TokenScore",
    "Weights",
    "batched",
    "ctc_decoder_lm",
    "rescore",
]
