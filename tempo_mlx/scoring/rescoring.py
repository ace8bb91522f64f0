"""Hypotheses of a decoder, ranked again with what a language model says about them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..arguments import check_range, check_text, shown
from ..errors import TempoError
from .scorer import MOST_WEIGHT, ContinuationScorer

#: Keys that a record has beside what was given.
RESULTS = ("best", "confidence", "error", "row", "key")


@dataclass(frozen=True)
class Weights:
    """What the parts of a hypothesis count.

        total = acoustic_scale x ac + (1 - alpha) x lm + alpha x new
                + word_bonus x words + token_penalty x tokens

    Args:
        acoustic_scale: of the decoder's acoustic log-probability ac.
        alpha: of the new log-probability; the decoder's own, lm, has what is left of 1.
        word_bonus: nats for every word.
        token_penalty: nats for every token; a penalty is negative.

    Raises:
        TempoError: for a weight that is not in [-1e9, 1e9].
    """

    acoustic_scale: float = 1.0
    alpha: float = 0.5
    word_bonus: float = 0.0
    token_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_range(name, value, -MOST_WEIGHT, MOST_WEIGHT)

    def totals(self, features: np.ndarray) -> np.ndarray:
        """Totals [n] of hypotheses by their :data:`FEATURES`, [n, 5]."""
        totals: np.ndarray = features @ self.factors
        return totals

    @property
    def factors(self) -> np.ndarray:
        """What each of the :data:`FEATURES` is multiplied by, [5]."""
        own = self.acoustic_scale, 1 - self.alpha, self.alpha, self.word_bonus, self.token_penalty
        return np.array(own, np.float64)

    def to_dict(self) -> dict[str, float]:
        """The weights as JSON-ready data."""
        return asdict(self)


#: What a total is made of: two log-probabilities of the decoder, the new one, and two counts.
FEATURES = ("ac", "lm", "new", "words", "tokens")


@dataclass(frozen=True)
class Hypothesis:
    """A text of a decoder's list, log-probabilities in nats.

    Args:
        text: may be empty.
        ac: acoustic, or the decoder's total where it has only that.
        lm: of the decoder's own language model; 0 if it has none.
        given: all that its object in a file has, to be kept.
    """

    text: str
    ac: float = 0.0
    lm: float = 0.0
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NBest:
    """The hypotheses of an utterance.

    Args:
        utt: its name.
        hypotheses: at least 1.
        context: what was said before.
        given: all that its object in a file has but the hypotheses, to be kept.
    """

    utt: str
    hypotheses: Sequence[Hypothesis]
    context: str = ""
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rescored:
    """A hypothesis with its new log-probability.

    Args:
        hypothesis: as it was given.
        new: log P of the text, and of its end if that counts, nats.
        words, tokens: of the text.
        total: see :class:`Weights`.
        posterior: share of its total in the list: softmax of the totals.
    """

    hypothesis: Hypothesis
    new: float
    words: int
    tokens: int
    total: float
    posterior: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data, all that was given included."""
        h = self.hypothesis
        own = {"text": h.text, "ac": h.ac, "lm": h.lm, **vars(self)}
        own.pop("hypothesis")
        return {**h.given, **own}


@dataclass(frozen=True)
class RescoredList:
    """A list in the order of its totals, best first.

    Args:
        nbest: as it was given.
        ranked: its hypotheses; those that score alike keep the order of the list.
        confidence: posterior of the best text, of all hypotheses that have it.
    """

    nbest: NBest
    ranked: list[Rescored]
    confidence: float

    @property
    def best(self) -> str:
        """The text with the highest total."""
        return self.ranked[0].hypothesis.text

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data, all that was given included."""
        return {
            **self.nbest.given,
            "utt": self.nbest.utt,
            "best": self.best,
            "confidence": self.confidence,
            "nbest": [each.to_dict() for each in self.ranked],
        }


def rescore(
    scorer: ContinuationScorer,
    lists: Sequence[NBest | Mapping[str, Any]],
    weights: Weights = Weights(),  # noqa: B008 - frozen
    end: bool | str = True,
) -> list[RescoredList]:
    """Rank the hypotheses of many lists in one call.

    Args:
        scorer: its weight and bonus do not count.
        lists: as :class:`NBest`, or objects such as
            ``{"utt": "a", "nbest": [{"text": "he is", "ac": -5.1, "lm": -3.2}], "context": ""}``.
        weights: what the parts of a total count.
        end: whether the end of a text counts, and how it ends; see
            :meth:`.ContinuationScorer.score_texts`.

    Raises:
        ValueError: for an empty list, what is not a list, or a text that cannot be scored.
    """
    made = [each if isinstance(each, NBest) else _named(i, each) for i, each in enumerate(lists)]
    for i, each in enumerate(made):
        if not each.hypotheses:
            raise TempoError(f"lists[{i}] has no hypotheses")
    texts = [h.text for each in made for h in each.hypotheses]
    contexts = [each.context for each in made for _ in each.hypotheses]
    scores = iter(scorer.score_texts(texts, contexts, end))
    found = []
    for each in made:
        own = [next(scores) for _ in each.hypotheses]
        rows = zip(each.hypotheses, own, strict=True)
        features = [(h.ac, h.lm, s.logprob, s.n_words, s.n_tokens) for h, s in rows]
        found.append(ranked(each, np.array(features, np.float64), weights))
    return found


def ranked(nbest: NBest, features: np.ndarray, weights: Weights) -> RescoredList:
    """A list in the order of its totals.

    Args:
        nbest: n hypotheses.
        features: of each its :data:`FEATURES`, [n, 5].
        weights: what they count.
    """
    totals = weights.totals(features)
    posteriors = np.exp(totals - np.logaddexp.reduce(totals))
    order = np.argsort(-totals, kind="stable").tolist()
    hypotheses = nbest.hypotheses
    best = hypotheses[order[0]].text
    found = [
        Rescored(
            hypotheses[i],
            float(features[i, 2]),
            int(features[i, 3]),
            int(features[i, 4]),
            float(totals[i]),
            float(posteriors[i]),
        )
        for i in order
    ]
    confidence = sum(each.posterior for each in found if each.hypothesis.text == best)
    return RescoredList(nbest, found, min(1.0, confidence))


def nbest_of(given: Mapping[str, Any], utt: str) -> NBest:
    """The list of an object.

    Args:
        given: {"utt", "nbest": [{"text", "ac", "lm"}, ...], "context"} and anything else; a
            hypothesis may be its text alone. Only "nbest" and its texts must be there; results of
            an earlier rescoring are left out.
        utt: the name of a list that has none.

    Raises:
        TempoError: if it is no such object.
    """
    if not isinstance(given.get("nbest"), list) or not given["nbest"]:
        raise TempoError('"nbest" must be a list of at least 1 hypothesis')
    context = given.get("context", "")
    check_text("context", context)
    name = given.get("utt", utt)
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise TempoError(f"utt must be a text or an integer, got {shown(name)}")
    hypotheses = [_hypothesis(i, each) for i, each in enumerate(given["nbest"])]
    kept = {key: value for key, value in given.items() if key not in ("nbest", *RESULTS)}
    return NBest(str(name), hypotheses, context, kept)


def _hypothesis(i: int, given: Any) -> Hypothesis:
    if isinstance(given, str):
        given = {"text": given}
    if not isinstance(given, Mapping) or "text" not in given:
        raise TempoError(f'nbest[{i}] must be a text or an object with "text", got {shown(given)}')
    check_text(f"nbest[{i}].text", given["text"])
    scores = {}
    for name in ("ac", "lm"):
        scores[name] = given.get(name, 0.0)
        check_range(f"nbest[{i}].{name}", scores[name], -1e30, 1e30)
    return Hypothesis(given["text"], scores["ac"], scores["lm"], dict(given))


def _named(i: int, given: Any) -> NBest:
    if not isinstance(given, Mapping):
        raise TempoError(f"lists[{i}] must be an NBest or an object, got {shown(given)}")
    try:
        return nbest_of(given, str(i))
    except TempoError as error:
        raise TempoError(f"lists[{i}]: {error}") from error
