"""Texts as branches of one trie, in a store of slots."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from ..decode.decoder import CacheBudgetError
from ..models import PositionedModel
from .chains import chain_passes, chains
from .passes import Segment, passes, visible
from .prefix_tree import PrefixTree, shared
from .requests import ScoreRequest, ScoringStats, TokenLogprobs
from .vocabulary_rows import VocabularyRows

#: States of one text: the one that it continues, and those behind its context and at its end.
STATES_OF_TEXT = 3

#: Passes' worth of tokens that are taken at once where a pass cannot read all that is new anyway.
PASSES_OF_PART = 8


def room(model: PositionedModel, max_kv_bytes: int) -> tuple[int, int]:
    """Slots and states that the bytes have room for.

    States get half of the bytes at most, and are no more than slots.

    Raises:
        CacheBudgetError: if a token has no room.
    """
    slot = model.slot_bytes + model.hidden_bytes
    n_states = 0
    if model.is_recurrent:
        each = model.state_bytes + max(slot, model.state_bytes)
        n_states = max(STATES_OF_TEXT, max_kv_bytes // each)
    states = n_states * model.state_bytes
    if states + slot > max_kv_bytes:
        what = f"{STATES_OF_TEXT} states and one token" if n_states else "one token"
        raise CacheBudgetError(
            f"max_kv_bytes must be at least {states + slot:,}, the bytes of {what}, "
            f"got {max_kv_bytes:,}"
        )
    return (max_kv_bytes - states) // slot, n_states


class PrefixTreeScorer:
    """Reads texts as branches of one trie, in a store of slots that is kept across calls.

    What texts share is read once. The tokens that are new go through the layers in one pass, in
    rows of texts that share much; each sees the slots of its own text. Only tokens whose next
    token is asked about go through the vocabulary layer.

    Recurrent layers take several passes, see :func:`.chain_passes`. Their states are kept where
    texts end or branch, as long as there is room. A text that goes on elsewhere is read from the
    last state before that.

    Args:
        model: reads the tokens.
        max_kv_bytes: bytes that the store may take, states included.
        chunk_size: tokens of a forward pass.
        sets: K sets of token ids that a text may be asked about.
    """

    def __init__(
        self,
        model: PositionedModel,
        max_kv_bytes: int,
        chunk_size: int,
        sets: Sequence[Sequence[int]],
    ):
        self._limits = limit, n_states = room(model, max_kv_bytes)
        self.model = model
        self.stats = ScoringStats("tree")
        self._slot_bytes = model.slot_bytes + model.hidden_bytes
        self._chunk_size = chunk_size
        self._part_size = chunk_size * (PASSES_OF_PART if n_states else 1)
        self._vocabulary = VocabularyRows(model.logits, sets, self.stats)
        self.reset()

    def reset(self) -> None:
        """Let go of all slots."""
        store = self.model.make_cache()
        store.keeps_states = True
        store.capacity_limit, store.states.limit = self._limits
        self._trie = PrefixTree(store, *self._limits)
        self._note()

    def answer(self, questions: Sequence[ScoreRequest]) -> list[TokenLogprobs]:
        answers: dict[int, TokenLogprobs] = {}
        # Texts that share a beginning stand side by side.
        waiting = sorted(range(len(questions)), key=lambda i: questions[i].read)[::-1]
        with mx.stream(generation_stream), self._whole():
            while waiting:
                part, segments, marks = self._take(questions, waiting)
                for nodes, rows in self._passes(segments, marks):
                    self._read(nodes, rows)
                asked = [(questions[i], self._trie.slot[path].tolist()) for i, path in part]
                store = self._trie.store
                found = self._vocabulary.answer(asked, store.outputs, store.state)
                answers |= zip((i for i, _ in part), found, strict=True)
                self._note()
        return [answers[i] for i in range(len(questions))]

    def _take(
        self, questions: Sequence[ScoreRequest], waiting: list[int]
    ) -> tuple[list[tuple[int, list[int]]], list[Segment], set[int]]:
        """Take questions off the list until there is enough to read.

        Returns:
            their paths, what is to be read, and the ends of their contexts.
        """
        trie = self._trie
        trie.clock += 1
        part: list[tuple[int, list[int]]] = []
        segments: list[Segment] = []
        marks: set[int] = set()
        new: set[int] = set()
        before: list[int] = []
        while waiting:
            question = questions[waiting[-1]]
            tokens = question.read
            known = trie.find(tokens)
            start = self._start(known, len(tokens), new)
            if part and len(new) + len(tokens) - start > self._part_size:
                break
            if trie.n_states and STATES_OF_TEXT * (len(segments) + 1) > trie.n_states:
                break
            nodes = trie.extend(known, tokens[len(known) :])
            if nodes is None and part:
                break
            if nodes is None:
                beside = " beside recurrent states" if trie.n_states else ""
                raise CacheBudgetError(
                    f"a text of {len(tokens)} tokens needs {len(tokens) * self._slot_bytes:,} "
                    f"bytes, max_kv_bytes allows {trie.limit * self._slot_bytes:,}{beside}; raise "
                    "it, or set max_context_tokens"
                )
            path = known + nodes
            part.append((waiting.pop(), path))
            self.stats.tokens_reused += start
            if start < len(path):
                segments.append(Segment(path[start:], len(path), shared(before, path)))
                marks.add(path[question.start - 1])
                new.update(path[start:])
                before = path
        return part, segments, marks

    def _start(self, known: list[int], n: int, new: set[int]) -> int:
        """How many of a text's n tokens are not read: those that are known, or known up to its last
        state where the text goes on behind them."""
        start = len(known)
        if self._trie.n_states and start < n:
            has = self._trie.have_states(known)
            while start and known[start - 1] not in new and not has[start - 1]:
                start -= 1
        return start

    def _passes(
        self, segments: list[Segment], marks: set[int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if self._trie.n_states:
            found = chains(segments, marks, self._trie)
            return chain_passes(found, self._trie, self._chunk_size)
        return passes(segments, self._chunk_size)

    def _read(self, nodes: np.ndarray, rows: np.ndarray) -> None:
        """One forward pass over new nodes, each in one of the rows 0 .. B - 1."""
        trie = self._trie
        trie.place(nodes)
        seen, mask = visible(trie.chains(nodes), rows)
        hidden = self.model(
            mx.array(trie.token[nodes].astype(np.int32))[None],
            trie.depth[nodes][None],
            mx.array(mask)[None, None],
            trie.store,
            rows=rows,
            return_hidden=True,
            parents=trie.slots_of(trie.parent[nodes]),
            reads=trie.slot[seen],
        )
        trie.store.keep_outputs(hidden[0])
        mx.async_eval(trie.store.state)
        self.stats.passes += 1
        self.stats.tokens_computed += len(nodes)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What fails half-way leaves slots that were never written: they are all dropped."""
        try:
            yield
        except BaseException:
            self.reset()
            raise

    def _note(self) -> None:
        trie = self._trie
        self.stats.slots = len(trie)
        self.stats.dropped, trie.dropped = self.stats.dropped + trie.dropped, 0
        self.stats.states, self.stats.bytes = trie.store.n_states, trie.store.nbytes
