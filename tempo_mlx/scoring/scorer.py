"""Scores of candidate words, given the contexts that they would continue."""

import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream, wired_limit

from ..arguments import MOST_BYTES, check_choice, check_count, check_range, check_text, shown
from ..decode.scheduler import default_budget
from ..errors import TempoError
from ..models import PlainModel, PositionedModel, UnsupportedModelError
from ..text.vocabulary import Vocabulary, require_tokenizer
from .batch_scorer import BatchScorer
from .joining import CLOSING, QUOTES, Joining
from .prefix_tree_scorer import PrefixTreeScorer
from .requests import Reader, ScoreRequest, ScoringStats, TokenLogprobs
from .text_scores import TextScore, check_end, check_normalizer, word_sums
from .texts import OWN_START, Candidate, Start, Texts, start_tokens

#: Tokens of a forward pass, unless the caller says how many.
CHUNK_SIZE = 512

#: The largest factor on log-probabilities and the largest bonus: all scores are finite.
MOST_WEIGHT = 1e9

#: How log-probabilities of homophones make one.
AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "max": max,
    "logsumexp": np.logaddexp.reduce,
}

#: A candidate: a word, or several spellings of one.
Word = str | Sequence[str]

#: Sets of tokens that may follow a text: those at which a word has ended, and those that end all.
BOUNDARY, END = 0, 1

#: What a token begins with that does not go on with a word.
BEGINNINGS = (*string.whitespace, *CLOSING, *QUOTES)


@dataclass(frozen=True)
class TokenScore:
    """A token of a word: its id, its text as it is shown, its log-probability in nats, and its
    UTF-8 as integers."""

    id: int
    text: str
    logprob: float
    bytes: list[int]


@dataclass(frozen=True)
class CandidateScore:
    """What a candidate's score is made of.

    Args:
        word: as it was scored, in its case; of homophones the most probable one.
        score: weight x logprob + word_insertion_bonus.
        logprob: natural log-probability of the word given its context, corrections included; of
            homophones what they were aggregated to.
        context: as it was scored, in the case that truecasing gave it; all of it, also where the
            model was given its last tokens only.
        tokens: that were scored: the word's, and before them what the context by itself would
            have been cut into otherwise.
        boundary: what ``trailing_space_correction`` added to the tokens' log-probabilities.
        replaced: log-probability of the context's own tokens that the word has changed, which was
            taken off; None if it has changed none.
        variants: the homophones' own scores, in the order given.
    """

    word: str
    score: float
    logprob: float
    context: str
    tokens: list[TokenScore]
    boundary: float | None = None
    replaced: float | None = None
    variants: list["CandidateScore"] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The score as JSON-ready data."""
        return asdict(self)


def reader_of(
    model: nn.Module | PositionedModel,
    max_kv_bytes: int,
    chunk_size: int,
    sets: Sequence[Sequence[int]],
) -> Reader:
    """What reads texts with a model: as branches of one trie, or in full passes."""
    try:
        return PrefixTreeScorer(PositionedModel.of(model), max_kv_bytes, chunk_size, sets)
    except UnsupportedModelError:
        return BatchScorer(PlainModel(model).model, chunk_size, sets)


class ContinuationScorer:
    """Scores words in contexts with a language model.

        score = weight x sum of log p(token | all before it) + word_insertion_bonus

    over the tokens of the word, in nats. A start stands before every context, the empty one, too.
    Context and word are joined by a space; by nothing where :mod:`.joining` says so. Where both
    together are cut into other tokens than the context by itself, the sum begins with the first
    token that differs, and the log-probabilities of the context's own tokens from there on are
    taken off. So the chain rule holds: log P of a text is the sum over its words.

    Texts are read as one trie of tokens that is kept from call to call: what was read before is
    not read again.

    Args:
        model: as ``load`` returns it. One that cannot hold branches in one sequence state is read
            in full passes, see :attr:`.ScoringStats.method`.
        tokenizer: mlx-lm's tokenizer wrapper.
        weight: factor on log-probabilities, [-1e9, 1e9].
        word_insertion_bonus: added for every word, [-1e9, 1e9]; not multiplied by ``weight``.
        truecase: None, "english" (needs the extra ``truecase``), or a function text -> text that
            changes the case of letters only. Each candidate is cased together with its context.
        max_context_tokens: the last ones of a context that are kept, at least 1; None keeps all.
        start: stands before every context, once: token ids, a text, or None. "auto" is what the
            model's recipe says; else what its tokenizer puts before every text, its BOS token, or
            the token that ends a text.
        separator: stands between context and word: " ", or "" for Chinese, Japanese, Thai, and for
            contexts that bring their own.
        keep_blanks: whether blanks behind a context and around a word count. There is then no
            separator beside a blank.
        trailing_space_correction: add log P(the word ends here) - log P(the context ended), where a
            text ends before a token that begins with a space or with one of the marks above, or
            that ends the text. A tokenizer that puts the space before a word leaves its end to the
            next token. (Oh and Schuler 2024, "Leading Whitespaces of Language Models' Subword
            Vocabulary Pose a Confound for Calculating Word Probabilities".)
        aggregate: "max" or "logsumexp", of the homophones' log-probabilities where a candidate is
            a list of spellings; those that come to the same tokens count once.
        max_kv_bytes: bytes that may be held, recurrent states included; what was used longest ago
            makes room. None is half of the memory that is left. A model that is read in full
            passes holds nothing.
        chunk_size: tokens of a forward pass, at least 1.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        model: nn.Module | PositionedModel,
        tokenizer: Any,
        weight: float = 1.0,
        word_insertion_bonus: float = 0.0,
        truecase: str | Callable[[str], str] | None = None,
        max_context_tokens: int | None = None,
        *,
        start: Start = OWN_START,
        separator: str = " ",
        keep_blanks: bool = False,
        trailing_space_correction: bool = False,
        aggregate: str = "max",
        max_kv_bytes: int | None = None,
        chunk_size: int = CHUNK_SIZE,
    ):
        case = check_options(
            weight,
            word_insertion_bonus,
            truecase,
            max_context_tokens,
            separator=separator,
            keep_blanks=keep_blanks,
            trailing_space_correction=trailing_space_correction,
            aggregate=aggregate,
            max_kv_bytes=max_kv_bytes,
            chunk_size=chunk_size,
        )
        plain = PlainModel(model)
        require_tokenizer(tokenizer)
        self.weight, self.word_insertion_bonus = float(weight), float(word_insertion_bonus)
        self.aggregate = aggregate
        self.trailing_space_correction = trailing_space_correction
        self._plain = plain.model
        self._vocabulary = Vocabulary(tokenizer)
        own = getattr(plain.model, "start_of_text", None)
        self._texts = Texts(
            tokenizer,
            case,
            max_context_tokens,
            plain.context_length,
            plain.vocabulary_size,
            start_tokens(tokenizer, start, own, plain.vocabulary_size),
            Joining(separator, keep_blanks),
        )
        ends = self._vocabulary.end_tokens
        begins = self._vocabulary.beginning(BEGINNINGS) if trailing_space_correction else set()
        # A tokenizer may know tokens that no model's logits are of.
        known = range(plain.vocabulary_size)
        sets = [[id for id in known if id in ids] for ids in (begins | ends, ends)]
        self._reader = reader_of(model, max_kv_bytes or default_budget(), chunk_size, sets)

    def score_continuations(
        self,
        contexts: Sequence[str],
        candidate_words: Sequence[Sequence[Word]],
        *,
        end: bool = False,
    ) -> list[list[float]]:
        """Scores of the candidate words of each context; the higher, the more probable.

        Args:
            contexts: texts; duplicates cost nothing.
            candidate_words: for each context its candidates: words, or lists of spellings.
            end: add weight x log P that the text ends behind the word, in the same pass.

        Returns:
            a score for each candidate, nested and ordered as they are.

        Raises:
            ValueError: for a word that is empty or no text, named by its index; if there are not
                as many lists of words as contexts; or if a text is too long for the model.
            CacheBudgetError: if a text alone needs more than ``max_kv_bytes``.
        """
        nested = self._candidates(contexts, candidate_words)
        logprobs = {c: parts.total for c, parts in self._read(nested, end).items()}
        return [
            [self._score(self._aggregated(word, [logprobs[c] for c in word])) for word in words]
            for words in nested
        ]

    def score_details(
        self, contexts: Sequence[str], candidate_words: Sequence[Sequence[Word]]
    ) -> list[list[CandidateScore]]:
        """As :meth:`score_continuations`, with what each score is made of."""
        nested = self._candidates(contexts, candidate_words)
        parts = self._read(nested)
        return [
            [
                self._detail(word, own, [self._spelling(c, parts[c]) for c in own])
                for word, own in zip(words, each, strict=True)
            ]
            for words, each in zip(candidate_words, nested, strict=True)
        ]

    def score_texts(
        self,
        texts: Sequence[str],
        context: str | Sequence[str] = "",
        end: bool | str = False,
        normalize: str | None = None,
    ) -> list[TextScore]:
        """Log-probabilities of whole texts, such as hypotheses; weight and bonus do not count.

        Args:
            texts: duplicates cost nothing. An empty one is log P(end), or 0.
            context: what stands before them, joined as a word is; one for all or one for each.
            end: add log P that the text ends here. Marks such as ".?!" add instead
                log (P(end) + sum over the marks of P(mark and then end)), for texts without
                punctuation; a text that ends with one of the marks is followed by no other.
            normalize: None, "words" or "tokens": what ``total`` is divided by.

        Raises:
            ValueError: for a text that is no text or too long, named by its index.
            CacheBudgetError: if a text alone needs more than ``max_kv_bytes``.
        """
        _require_list(texts, "texts")
        check_end(end)
        check_normalizer(normalize)
        contexts = [context] * len(texts) if isinstance(context, str) else context
        if len(_require_list(contexts, "context")) != len(texts):
            raise TempoError(
                f"context must be one text, or one for each of {len(texts)} texts, got "
                f"{len(contexts)}"
            )
        candidates = []
        for i, (before, text) in enumerate(zip(contexts, texts, strict=True)):
            check_text(f"texts[{i}]", text)
            check_text(f"context[{i}]", before)
            with _naming(f"texts[{i}]"):
                candidates.append(self._texts.text(before, text))
        marks = end if isinstance(end, str) else ""
        asked = {
            c: _Asked(c, bool(end), self._texts.ended(c, marks)) for c in dict.fromkeys(candidates)
        }
        answers = self._answers([each for one in asked.values() for each in one.questions])
        scores = {c: self._text_score(one, answers, normalize) for c, one in asked.items()}
        return [scores[c] for c in candidates]

    def log_p_end(self, contexts: Sequence[str]) -> list[float]:
        """log P that each context is followed by a token that ends the text, in nats.

        Args:
            contexts: texts; duplicates cost nothing.

        Raises:
            ValueError: for a context that is no text or too long, named by its index.
        """
        questions = []
        for i, context in enumerate(_require_list(contexts, "contexts")):
            check_text(f"contexts[{i}]", context)
            with _naming(f"contexts[{i}]"):
                questions.append(_after(self._texts.context(context)))
        answers = self._answers(questions)
        return [float(_behind(answers[question])[END]) for question in questions]

    @property
    def start_length(self) -> int:
        """Tokens that stand before every text."""
        return len(self._texts.start)

    def joined(self, context: str, word: str) -> str:
        """A context and a word as the one text that is scored."""
        return self._texts.joining.join(context, word)

    def stats(self) -> ScoringStats:
        """What scoring has cost since the scorer was made, and what is held."""
        return self._reader.stats

    def reset(self) -> None:
        """Let go of all that is held."""
        self._reader.reset()

    def _candidates(
        self, contexts: Sequence[str], candidate_words: Sequence[Sequence[Word]]
    ) -> list[list[list[Candidate]]]:
        """The spellings of each candidate of each context, as tokens."""
        _require_list(contexts, "contexts")
        _require_list(candidate_words, "candidate_words")
        if len(contexts) != len(candidate_words):
            raise TempoError(
                f"candidate_words must have a list for each of {len(contexts)} contexts, "
                f"got {len(candidate_words)}"
            )
        nested = []
        for i, (context, words) in enumerate(zip(contexts, candidate_words, strict=True)):
            check_text(f"contexts[{i}]", context)
            own = []
            for j, word in enumerate(_require_list(words, f"candidate_words[{i}]")):
                name = f"candidate_words[{i}][{j}]"
                spellings = [word] if isinstance(word, str) else word
                if not isinstance(spellings, (list, tuple)) or not spellings:
                    raise TempoError(
                        f"{name} must be a word or a list of spellings, got {shown(word)}"
                    )
                for spelling in spellings:
                    check_text(name, spelling)
                    if not spelling.strip():
                        raise TempoError(f"{name} is empty; give a word of at least one letter")
                with _naming(name):
                    own.append([self._texts.candidate(context, each) for each in spellings])
            nested.append(own)
        return nested

    def _read(
        self, nested: list[list[list[Candidate]]], end: bool = False
    ) -> dict[Candidate, "_Parts"]:
        """Log-probabilities of candidates, each read once; with that of the end if it counts."""
        unique = dict.fromkeys(c for words in nested for spellings in words for c in spellings)
        correct = self.trailing_space_correction
        asked = {c: ScoreRequest(c.tokens, c.start, after=correct or end) for c in unique}
        before = {c: _after(c.context_tokens) for c in unique if correct and c.context}
        replaced = {c: ScoreRequest(c.replaced, c.start) for c in unique if c.replaced}
        answers = self._answers([*asked.values(), *before.values(), *replaced.values()])
        parts = {}
        for c, question in asked.items():
            answer = answers[question]
            changed = float(answers[replaced[c]].logprobs.sum()) if c in replaced else None
            boundary = None
            if correct:
                boundary = float(_behind(answer)[BOUNDARY])
                if c in before:
                    boundary -= float(_behind(answers[before[c]])[BOUNDARY])
            over = float(_behind(answer)[END]) if end else None
            parts[c] = _Parts(answer.logprobs, boundary, changed, over)
        return parts

    def _text_score(
        self, asked: "_Asked", answers: dict[ScoreRequest, TokenLogprobs], normalize: str | None
    ) -> TextScore:
        c = asked.candidate
        logprobs = answers[asked.whole].logprobs
        pieces = [self._vocabulary.bytes_of(id) for id in c.tokens[c.start :]]
        end = asked.log_p_end(answers) if asked.end else None
        replaced = 0.0 if asked.replaced is None else float(answers[asked.replaced].logprobs.sum())
        logprob = float(logprobs.sum()) - replaced + (end or 0.0)
        words = word_sums(c.word, pieces, logprobs)
        units = {None: 1, "words": len(words), "tokens": len(logprobs)}
        total = logprob / max(1, units[normalize])
        return TextScore(
            c.word, total, logprob, len(words), len(logprobs), words, logprobs, end, replaced
        )

    def _answers(self, questions: Sequence[ScoreRequest]) -> dict[ScoreRequest, TokenLogprobs]:
        answers = {question: TokenLogprobs(np.zeros(0)) for question in questions}
        asked = [question for question in answers if question.asks]
        with wired_limit(self._plain, cast(Any, [generation_stream])):
            return answers | dict(zip(asked, self._reader.answer(asked), strict=True))

    def _score(self, logprob: float) -> float:
        return self.weight * logprob + self.word_insertion_bonus

    def _aggregated(self, spellings: list[Candidate], logprobs: list[float]) -> float:
        """The log-probability of a word; spellings of the same tokens are one event."""
        distinct = dict(zip(((c.tokens, c.start) for c in spellings), logprobs, strict=True))
        return float(AGGREGATES[self.aggregate](list(distinct.values())))

    def _spelling(self, candidate: Candidate, parts: "_Parts") -> CandidateScore:
        ids, vocabulary = candidate.tokens[candidate.start :], self._vocabulary
        tokens = [
            TokenScore(id, vocabulary.text(id), float(logprob), list(vocabulary.bytes_of(id)))
            for id, logprob in zip(ids, parts.logprobs, strict=True)
        ]
        total = parts.total
        return CandidateScore(
            candidate.word,
            self._score(total),
            total,
            candidate.context,
            tokens,
            parts.boundary,
            parts.replaced,
        )

    def _detail(
        self, word: Word, candidates: list[Candidate], spellings: list[CandidateScore]
    ) -> CandidateScore:
        if isinstance(word, str):
            return spellings[0]
        best = max(spellings, key=lambda each: each.logprob)
        total = self._aggregated(candidates, [each.logprob for each in spellings])
        return replace(best, score=self._score(total), logprob=total, variants=spellings)


def check_options(
    weight: float = 1.0,
    word_insertion_bonus: float = 0.0,
    truecase: str | Callable[[str], str] | None = None,
    max_context_tokens: int | None = None,
    *,
    separator: str = " ",
    keep_blanks: bool = False,
    trailing_space_correction: bool = False,
    aggregate: str = "max",
    max_kv_bytes: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Callable[[str], str] | None:
    """Check the options of a :class:`ContinuationScorer`; returns what truecases, or None.

    Raises:
        TempoError: for an argument out of range, or if the package that truecases is missing.
    """
    for name, number in (("weight", weight), ("word_insertion_bonus", word_insertion_bonus)):
        given = number.item() if isinstance(number, np.number) else number
        check_range(name, given, -MOST_WEIGHT, MOST_WEIGHT, words="finite, ")
    Joining(separator, keep_blanks)
    check_count("chunk_size", chunk_size)
    if max_context_tokens is not None:
        check_count("max_context_tokens", max_context_tokens)
    if max_kv_bytes is not None:
        check_count("max_kv_bytes", max_kv_bytes, most=MOST_BYTES)
    check_choice("aggregate", aggregate, AGGREGATES)
    if not isinstance(trailing_space_correction, bool):
        raise TempoError(
            f"trailing_space_correction must be True or False, got "
            f"{shown(trailing_space_correction)}"
        )
    if truecase == "english":
        from .truecase import english

        return english()
    if truecase is not None and (isinstance(truecase, str) or not callable(truecase)):
        raise TempoError(f'truecase must be "english" or a function, got {shown(truecase)}')
    return truecase


@dataclass(frozen=True, eq=False)
class _Parts:
    """Log-probabilities of a candidate's tokens, the correction for where it ends, the
    log-probability of tokens that it has replaced, and that of the text's end."""

    logprobs: np.ndarray
    boundary: float | None
    replaced: float | None
    end: float | None = None

    @property
    def total(self) -> float:
        added = (self.boundary or 0.0) - (self.replaced or 0.0) + (self.end or 0.0)
        return float(self.logprobs.sum()) + added


class _Asked:
    """What is asked about a text.

    Args:
        candidate: the text.
        end: whether its end is asked for.
        marked: the text with each mark that may follow it, as candidates after the text.
    """

    def __init__(self, candidate: Candidate, end: bool, marked: list[Candidate]):
        c = self.candidate = candidate
        self.end = end
        self.whole = ScoreRequest(c.tokens, c.start, after=end)
        self.replaced = ScoreRequest(c.replaced, c.start) if c.replaced else None
        self._marked = [
            (
                ScoreRequest(each.tokens, each.start, after=True),
                ScoreRequest(each.replaced, each.start) if each.replaced else None,
            )
            for each in marked
        ]

    @property
    def questions(self) -> list[ScoreRequest]:
        pairs = [(self.whole, self.replaced), *self._marked]
        return [each for pair in pairs for each in pair if each is not None]

    def log_p_end(self, answers: dict[ScoreRequest, TokenLogprobs]) -> float:
        """log P that the text ends, with one of the marks or without."""
        ways = [_behind(answers[self.whole])[END]]
        for marked, replaced in self._marked:
            way = answers[marked].logprobs.sum() + _behind(answers[marked])[END]
            ways.append(way - (answers[replaced].logprobs.sum() if replaced else 0.0))
        return float(np.logaddexp.reduce(ways))


def _after(tokens: tuple[int, ...]) -> ScoreRequest:
    """What follows these tokens?"""
    return ScoreRequest(tokens, len(tokens), after=True)


def _behind(answer: TokenLogprobs) -> np.ndarray:
    assert answer.after is not None
    return answer.after


def _require_list(value: Any, name: str) -> Any:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TempoError(f"{name} must be a list, got {shown(value)}")
    return value


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say which of many an error is about."""
    try:
        yield
    except TempoError as error:
        raise TempoError(f"{name}: {error}") from error
