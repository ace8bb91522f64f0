"""The language model of pyctcdecode's beam search, which is imported nowhere here."""

import math
import os
import sys
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from ..arguments import shown
from ..errors import TempoError
from .scorer import ContinuationScorer

#: What the decoder calls the parameters, and the attributes that hold them.
PARAMETERS = {
    "alpha": "weight",
    "beta": "word_insertion_bonus",
    "unk_score_offset": "unk_score_offset",
    "score_boundary": "score_boundary",
}
#: As in pyctcdecode: partial words that are longer than this many characters cost more.
PARTIAL_LENGTH = 6
NOT_STORED = (
    "a PyctcdecodeLM is not saved or loaded; make it of its model: "
    "PyctcdecodeLM(ContinuationScorer(model, tokenizer))"
)


class PyctcdecodeLM:
    """A scorer as pyctcdecode's ``AbstractLanguageModel``, by its methods.

        lm = PyctcdecodeLM(ContinuationScorer(model, tokenizer, weight=0.5))
        decoder = BeamSearchDecoderCTC(Alphabet.build_alphabet(labels), lm)
        decoder.decode(logits)

    ``batched(decoder)`` asks for all new words of a step at once. A state is the text so far.
    ``decode(logits, lm_start_state="What was said before")`` goes on from a text. The scorer's
    ``weight`` and ``word_insertion_bonus`` are pyctcdecode's alpha and beta; all scores are in
    nats. A pool of forked processes cannot be used: MLX lives in one.

    Args:
        scorer: what gives words their score.
        order: words that decide how a text goes on, the next one included, at least 1. Of beams
            that agree in their last ``order - 1`` words (at least one), the decoder keeps the best
            only. By default all words count, as they do for the model, and no beam is dropped so.
        score_boundary: whether the last word also gets weight x log-probability that the text ends
            after it.
        unigrams: words that are expected. Others, and beginnings of words that none of these has,
            get ``unk_score_offset``. None: no word is unexpected.
        unk_score_offset: nats, finite; on whole words it is multiplied by the weight.

    Raises:
        ValueError: naming the argument, its value, and what is allowed.
    """

    def __init__(
        self,
        scorer: ContinuationScorer,
        *,
        order: int = sys.maxsize,
        score_boundary: bool = True,
        unigrams: Collection[str] | None = None,
        unk_score_offset: float = -10.0,
    ):
        if type(order) is not int or order < 1:
            raise TempoError(f"order must be an integer of at least 1, got {order!r}")
        known = None
        if unigrams is not None:
            known = frozenset(unigrams)
            if isinstance(unigrams, str) or not all(isinstance(word, str) for word in known):
                raise TempoError(f"unigrams must be a collection of words, got {unigrams!r}")
            if not known:
                raise TempoError("unigrams must hold at least 1 word; None expects every word")
        self.scorer = scorer
        self.score_boundary = _checked("score_boundary", score_boundary)
        self.unk_score_offset = _checked("unk_score_offset", unk_score_offset)
        self._order = order
        self._known = known
        self._sorted = sorted(known or ())
        self._process = os.getpid()
        self._ready: dict[tuple[str, str, bool], tuple[float, str]] = {}

    @property
    def order(self) -> int:
        """Words that decide how a text goes on, the next one included."""
        return self._order

    def get_start_state(self) -> str:
        """The empty text."""
        return ""

    def score(self, prev_state: str, word: str, is_last_word: bool = False) -> tuple[float, str]:
        """The score of a word after a text, and the text with the word.

        Args:
            prev_state: the text so far.
            word: may be empty, which scores 0: the decoder ends a text so where no word is open.
            is_last_word: whether the text ends after the word.
        """
        found = self._ready.get((prev_state, word, is_last_word))
        return found or self.score_many([(prev_state, word)], is_last_word)[0]

    def score_many(
        self, pairs: Sequence[tuple[str, str]], is_last_word: bool = False
    ) -> list[tuple[float, str]]:
        """As :meth:`score`, for many pairs of a text and a word, in one call of the scorer."""
        if os.getpid() != self._process:
            raise RuntimeError("MLX does not work in forked processes; decode with pool=None")
        ends = is_last_word and self.score_boundary
        worded = [(state, word) for state, word in pairs if word]
        scores = iter(
            self.scorer.score_continuations(
                [state for state, _ in worded], [[word] for _, word in worded], end=ends
            )
        )
        bare = [state for state, word in pairs if not word] if ends else []
        over = iter(self.scorer.log_p_end(bare))
        found = []
        for state, word in pairs:
            if not word:
                found.append((self.scorer.weight * next(over) if ends else 0.0, state))
                continue
            (score,) = next(scores)
            if self._known is not None and word not in self._known:
                score += self.scorer.weight * self.unk_score_offset
            found.append((score, self.scorer.joined(state, word)))
        return found

    @contextmanager
    def ready(self, pairs: Sequence[tuple[str, str]], is_last_word: bool) -> Iterator[None]:
        """Inside, :meth:`score` knows these pairs already."""
        unique = list(dict.fromkeys(pairs))
        scores = self.score_many(unique, is_last_word) if unique else []
        self._ready = {
            (*pair, is_last_word): found for pair, found in zip(unique, scores, strict=True)
        }
        try:
            yield
        finally:
            self._ready = {}

    def score_partial_token(self, partial_token: str) -> float:
        """What the beginning of a word costs: 0 unless no unigram begins so."""
        if self._known is None:
            return 0.0
        at = bisect_left(self._sorted, partial_token)
        if at < len(self._sorted) and self._sorted[at].startswith(partial_token):
            return 0.0
        return float(self.unk_score_offset * max(1.0, len(partial_token) / PARTIAL_LENGTH))

    def reset_params(self, **params: Any) -> None:
        """Change the parameters that are not None, as ``decoder.reset_params`` passes them.

        Args:
            params: alpha (the scorer's weight), beta (its word insertion bonus), unk_score_offset:
                finite numbers; score_boundary: a bool.

        Raises:
            ValueError: for another name, or a value that is not allowed. Nothing is changed.
        """
        for name, value in params.items():
            if name not in PARAMETERS:
                raise TempoError(f"parameters are {', '.join(PARAMETERS)}, got {name!r}")
            if value is not None:
                _checked(name, value)
        for name, value in params.items():
            if value is not None:
                owner = self.scorer if name in ("alpha", "beta") else self
                setattr(owner, PARAMETERS[name], value)

    def save_to_dir(self, filepath: str) -> NoReturn:
        """Refused: a model is not a file of the decoder's."""
        raise NotImplementedError(NOT_STORED)

    @classmethod
    def load_from_dir(cls, filepath: str) -> NoReturn:
        """Refused, as saving is."""
        raise NotImplementedError(NOT_STORED)


def batched(decoder: Any) -> Any:
    """Let a decoder ask for all new words of a step in one call.

    Without this, pyctcdecode asks for one word at a time, and each costs a pass.

    Args:
        decoder: pyctcdecode's ``BeamSearchDecoderCTC`` with a :class:`PyctcdecodeLM`; changed.

    Returns:
        the decoder.

    Raises:
        ValueError: if its language model is another one, or its version has no such step.
    """
    lm = getattr(decoder, "_language_model", None)
    step = getattr(decoder, "_get_lm_beams", None)
    if not isinstance(lm, PyctcdecodeLM) or step is None:
        raise TempoError(
            "decoder must be a BeamSearchDecoderCTC of pyctcdecode 0.5 with a PyctcdecodeLM, "
            f"got {shown(decoder)}"
        )

    def batched_step(
        beams: Any, hotwords: Any, scores: Any, partial: Any, is_eos: bool = False
    ) -> Any:
        pairs = []
        for text, next_word, *_ in beams:
            longer = f"{text} {next_word}" if text and next_word else text + next_word
            if (longer, is_eos) not in scores:
                _, _, state = scores[text, False]
                pairs.append((state, next_word))
        with lm.ready(pairs, is_eos):
            return step(beams, hotwords, scores, partial, is_eos)

    decoder._get_lm_beams = batched_step
    return decoder


def _checked(name: str, value: Any) -> Any:
    if name == "score_boundary":
        if not isinstance(value, bool):
            raise TempoError(f"score_boundary must be True or False, got {value!r}")
    elif type(value) not in (int, float) or not math.isfinite(value):
        raise TempoError(f"{name} must be a finite number, got {value!r}")
    return value
