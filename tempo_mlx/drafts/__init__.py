"""Drafts: tokens that probably follow, checked many at a time in one forward pass."""

from .costs import PassCosts, pass_costs
from .draft import TEXT, Candidate, Draft, Drafter, Source, plan
from .lookup import SuffixLookup
from .recycling import FollowerTable, TokenRecycling

__all__ = [
    "TEXT",
    "Candidate",
    "Draft",
    "Drafter",
    "FollowerTable",
    "PassCosts",
    "Source",
    "SuffixLookup",
    "TokenRecycling",
    "pass_costs",
    "plan",
]
