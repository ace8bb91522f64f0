"""Weights of a rescoring that make the fewest word errors, and how far they can be trusted.

Word errors along one weight are piecewise constant: the best hypothesis of a list changes only
where two lines cross. So each weight in turn is swept exactly (Och 2003, "Minimum Error Rate
Training in Statistical Machine Translation").
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import TempoError
from .rescoring import FEATURES, Weights

MISSING = "tuning needs the jiwer package: pip install 'tempo-mlx[rescore]'"

#: Sweeps over all weights that are made at most; each makes fewer errors than the one before.
MOST_SWEEPS = 50

#: Weights are at most this far from 0.
MOST_FACTOR = 1e3

#: Share of the resampled sets in which new scores must help.
SURE = 0.95

PUNCTUATION = re.compile(r"[^\w\s'’]|_")


@dataclass(frozen=True, eq=False)
class Judged:
    """A list whose text is known.

    Args:
        features: of its hypotheses, :data:`.FEATURES`, [n, 5].
        errors: words of each that are wrong, [n]: substituted, left out or put in.
        n_words: of the reference.
        group: what must not be split by cross-validation: an utterance, or its speaker.
    """

    features: np.ndarray
    errors: np.ndarray
    n_words: int
    group: str


@dataclass(frozen=True)
class Rate:
    """A word error rate, in percent, and its interval of 95 %, by resampling groups."""

    wer: float
    low: float
    high: float


@dataclass(frozen=True)
class Tuned:
    """What came out of tuning.

    Args:
        weights: those with the fewest errors over all lists; without the new scores where these
            do not help.
        with_new: the same with the new scores, whether these help or not.
        intervals: weight -> where 95 % of resampled sets have their best value, the others fixed.
        first: of the first hypotheses as they were given.
        decoder: of the decoder's own scores, tuned without the new ones, cross-validated.
        rescored: with the new scores, cross-validated.
        oracle: of the best hypothesis of each list.
        tuned: on the lists that it was tuned on.
        helps: whether the new scores make fewer errors than the decoder's own, cross-validated, in
            95 % of the resampled sets.
    """

    weights: Weights
    with_new: Weights
    intervals: dict[str, tuple[float, float]]
    first: Rate
    decoder: Rate
    rescored: Rate
    oracle: Rate
    tuned: Rate
    helps: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)


def normalized(text: str) -> str:
    """A text as it is compared: small letters, without punctuation, blanks between words."""
    return " ".join(PUNCTUATION.sub(" ", text.replace("’", "'").lower()).split())


def word_errors(references: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Words of each text that are wrong, [n], by jiwer's alignment with its reference.

    Raises:
        TempoError: if jiwer is missing.
    """
    try:
        import jiwer
    except ModuleNotFoundError as error:
        raise TempoError(MISSING) from error
    errors = np.zeros(len(texts), np.int64)
    known: dict[tuple[str, str], int] = {}
    for i, pair in enumerate(zip(references, texts, strict=True)):
        if pair not in known:
            reference, text = pair
            if not reference or not text:
                known[pair] = len(reference.split()) + len(text.split())
            else:
                found = jiwer.process_words(reference, text)
                known[pair] = found.substitutions + found.deletions + found.insertions
        errors[i] = known[pair]
    return errors


def tune(
    lists: Sequence[Judged],
    folds: int = 5,
    restarts: int = 10,
    resamples: int = 1000,
    seed: int = 0,
) -> Tuned:
    """The weights that make the fewest word errors.

    Args:
        lists: at least 2 groups of them.
        folds: parts of the groups; each is rescored with weights of the others. At least 2.
        restarts: random weights to begin with, beside the usual ones.
        resamples: of the groups, for intervals.
        seed: of the restarts, folds and resamples.

    Raises:
        TempoError: if there are too few groups.
    """
    rng = np.random.default_rng(seed)
    names = sorted({each.group for each in lists})
    if len(names) < 2:
        raise TempoError(f"tuning needs lists of at least 2 groups, got {len(names)}")
    folds = min(folds, len(names))
    fold_of = dict(zip(rng.permutation(names).tolist(), np.arange(len(names)) % folds, strict=True))
    fold = np.array([fold_of[each.group] for each in lists])
    own = [name for name in free_weights(lists) if name != "alpha"]
    with_new = free_weights(lists)
    bare = Weights(alpha=0.0)

    def validated(free: list[str]) -> np.ndarray:
        """Errors of each list with weights of the other folds, [n lists]."""
        errors = np.zeros(len(lists), np.int64)
        for k in range(folds):
            others = [each for each, f in zip(lists, fold, strict=True) if f != k]
            weights = best_weights(others, free, restarts, rng, bare)
            for i in np.flatnonzero(fold == k).tolist():
                errors[i] = _chosen(lists[i], weights)
        return errors

    # The decoder's lm counts in full where the new score does not.
    decoder, rescored = validated(own), validated(with_new)
    rater = _Rater(lists, names, resamples, rng)
    helps = rater.fewer(rescored, decoder)
    best = best_weights(lists, with_new, restarts, rng, bare)
    weights = best if helps else best_weights(lists, own, restarts, rng, bare)
    tuned = np.array([_chosen(each, weights) for each in lists])
    return Tuned(
        weights,
        best,
        {name: rater.interval(name, weights) for name in with_new},
        rater.rate(np.array([each.errors[0] for each in lists])),
        rater.rate(decoder),
        rater.rate(rescored),
        rater.rate(np.array([each.errors.min() for each in lists])),
        rater.rate(tuned),
        helps,
    )


def free_weights(lists: Sequence[Judged]) -> list[str]:
    """The weights that can change anything; the scale of a total cannot."""
    varying = {
        name: any(np.ptp(each.features[:, i]) > 0 for each in lists)
        for i, name in enumerate(FEATURES)
    }
    return [
        *(["acoustic_scale"] if varying["ac"] and varying["lm"] else []),
        *(["alpha"] if varying["new"] else []),
        *(["word_bonus"] if varying["words"] else []),
        *(["token_penalty"] if varying["tokens"] else []),
    ]


def best_weights(
    lists: Sequence[Judged],
    free: Sequence[str],
    restarts: int,
    rng: np.random.Generator,
    start: Weights,
) -> Weights:
    """Coordinate by coordinate from several beginnings; the one with the fewest errors.

    Of those that make as many, the one that was found from ``start``.
    """
    best: tuple[int, Weights] | None = None
    for attempt in range(restarts + 1):
        begun = asdict(start)
        if attempt:
            begun |= {name: float(rng.normal(0, 1)) for name in free}
            if "acoustic_scale" in free:
                begun["acoustic_scale"] = float(rng.gamma(1.0))
        found = _descended(lists, Weights(**begun), free)
        if best is None or found[0] < best[0]:
            best = found
    assert best is not None
    return best[1]


def _descended(
    lists: Sequence[Judged], weights: Weights, free: Sequence[str]
) -> tuple[int, Weights]:
    errors = sum(_chosen(each, weights) for each in lists)
    for _ in range(MOST_SWEEPS):
        before = errors
        for name in free:
            at, value = Sweep(lists, name, weights).best()
            if at < errors:
                errors, weights = at, Weights(**{**asdict(weights), name: value})
        if errors == before:
            break
    return errors, weights


class Sweep:
    """Word errors along one weight, exactly.

    Args:
        lists: whose best hypotheses make the errors.
        name: of the weight.
        weights: of the others.
    """

    def __init__(self, lists: Sequence[Judged], name: str, weights: Weights):
        self.current = getattr(weights, name)
        low, high = (Weights(**{**asdict(weights), name: value}) for value in (0.0, 1.0))
        at, first, owner, delta = [], [], [], []
        for i, each in enumerate(lists):
            offset = low.totals(each.features)
            slope = high.totals(each.features) - offset
            crossings, winners = envelope(slope, offset)
            errors = each.errors[winners]
            first.append(errors[0])
            at.append(crossings)
            delta.append(np.diff(errors))
            owner.append(np.full(len(crossings), i))
        places = np.concatenate(at)
        order = np.argsort(places, kind="stable")
        self.places = places[order]
        #: errors of each list left of all places, [n lists]; and what changes at each, of whom
        self.first = np.array(first)
        self.delta, self.owner = np.concatenate(delta)[order], np.concatenate(owner)[order]

    def errors(self, counts: np.ndarray | None = None) -> np.ndarray:
        """Errors between the places, [n places + 1].

        Args:
            counts: how often each list counts, [n lists]; once if None.
        """
        counts = np.ones(len(self.first), np.int64) if counts is None else counts
        changes = np.cumsum(self.delta * counts[self.owner])
        return np.concatenate([[0], changes]) + int(self.first @ counts)

    def best(self, counts: np.ndarray | None = None) -> tuple[int, float]:
        """The fewest errors, and a value of the weight that makes them.

        It is the present value if that makes them; else the middle of the widest range that does,
        of which what lies beyond the last crossing counts as a range of length 1.
        """
        errors = self.errors(counts)
        bounds = np.clip(self.places, -MOST_FACTOR, MOST_FACTOR)
        first, last = (bounds[0], bounds[-1]) if len(bounds) else (0.0, 0.0)
        edges = np.concatenate([[first - 1], bounds, [last + 1]])
        fewest = int(errors.min())
        if errors[np.searchsorted(self.places, self.current)] == fewest:
            return fewest, self.current
        # Neighbouring ranges with as few errors are one.
        good = errors == fewest
        starts = np.flatnonzero(good & ~np.concatenate([[False], good[:-1]]))
        stops = np.flatnonzero(good & ~np.concatenate([good[1:], [False]])) + 1
        widest = int(np.argmax(edges[stops] - edges[starts]))
        return fewest, float((edges[starts[widest]] + edges[stops[widest]]) / 2)


def envelope(slope: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The highest of some lines, from left to right.

    Args:
        slope, offset: of each line, [n].

    Returns:
        where another line becomes the highest [m - 1], and the lines [m]. Of equal lines, the
        first.
    """
    order = np.lexsort((np.arange(len(slope)), -offset, slope))
    lines: list[int] = []
    crossings: list[float] = []
    for i in order.tolist():
        if lines and slope[i] == slope[lines[-1]]:
            continue  # parallel, and not higher
        while lines:
            j = lines[-1]
            at = (offset[j] - offset[i]) / (slope[i] - slope[j])
            if crossings and at <= crossings[-1]:
                lines.pop()
                crossings.pop()
            else:
                crossings.append(float(at))
                break
        lines.append(i)
    return np.array(crossings), np.array(lines)


def _chosen(judged: Judged, weights: Weights) -> int:
    """Errors of a list's best hypothesis."""
    return int(judged.errors[int(np.argmax(weights.totals(judged.features)))])


class _Rater:
    """Word error rates with intervals, by resampling groups."""

    def __init__(
        self, lists: Sequence[Judged], names: list[str], resamples: int, rng: np.random.Generator
    ):
        self._lists = lists
        self._words = np.array([each.n_words for each in lists])
        if not self._words.sum():
            raise TempoError("the references have no words")
        group = np.array([names.index(each.group) for each in lists])
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
        #: how often each list counts in each resample, [resamples, n lists]
        self._counts = drawn[:, group]

    def rate(self, errors: np.ndarray) -> Rate:
        words = np.maximum(1, self._counts @ self._words)
        low, high = np.percentile(100 * (self._counts @ errors) / words, [2.5, 97.5])
        return Rate(100 * errors.sum() / self._words.sum(), float(low), float(high))

    def fewer(self, errors: np.ndarray, others: np.ndarray) -> bool:
        """Whether there are fewer errors than others in 95 % of the resamples."""
        return bool(np.mean(self._counts @ (others - errors) > 0) >= SURE)

    def interval(self, name: str, weights: Weights) -> tuple[float, float]:
        sweep = Sweep(self._lists, name, weights)
        values = [sweep.best(counts)[1] for counts in self._counts]
        low, high = np.percentile(values, [2.5, 97.5])
        return float(low), float(high)
