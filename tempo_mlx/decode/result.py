"""What a run returns: its lattice, its text, its paths, and one schema for JSON.

A result is data. What runs the model says so.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import check_count, shown
from ..errors import MissingExtraError, TempoError
from ..lattice.lattice import Lattice
from ..models import PlainModel, PositionedModel
from ..plots.lattice import plot_lattice
from ..rules.posterior import viterbi
from ..settings import Settings
from ..text.vocabulary import Vocabulary
from ..view import page, snippet
from .verification import Verification, received_attention, replayed_attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

#: Version of the dictionary that :meth:`GenerationResult.to_dict` returns.
SCHEMA = 2

#: Columns of :meth:`GenerationResult.to_frame`.
FRAME_COLUMNS = (
    *("step", "position", "threshold", "kind", "id", "text", "probability"),
    *("slot", "parent", "logprob", "pruned_at", "pruned_by", "score"),
)

#: Hypotheses that the search for the best paths keeps at each step, at least.
BEAM = 8


@dataclass(frozen=True)
class Path:
    """One text through the lattice.

    Args:
        text: the path's text, without the prompt; it ends before the first stop text.
        tokens: its ids, those that spell a stop text included.
        logprob: log-probability of the tokens given the prompt, in nats, at temperature 1.
        ended: whether an end token followed, whose log-probability is included then.
    """

    text: str
    tokens: list[int]
    logprob: float
    ended: bool = False


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention weights of a run: how much the row of each slot attended to each slot.

    Args:
        weights: [L, H, T, S], fp32; T queries and S keys are the run's slots, the prompt's first.
            Each row sums to 1, or to less where the model has attention sinks.
        layers: number of each layer, [L].
        slots: the text of each slot, [S].
    """

    weights: np.ndarray
    layers: tuple[int, ...]
    slots: list[str]

    #: names of the axes of ``weights``
    axes = ("layer", "head", "query", "key")


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text in it; all of it where there is none."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


@dataclass
class Statistics:
    """Seconds of a run; peak memory, in 10^9 bytes, since it or its batch began; and tokens."""

    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    peak_memory_gb: float = 0.0
    #: of the prompt, read before
    cached_tokens: int = 0
    #: drafted, and those of them that the run became
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class _End:
    """Where a text of the run ends.

    Args:
        slot: of its last token; None where it has none.
        logprob: of the text, an end token included, in nats.
        length: tokens, an end token left out.
        ended: whether an end token followed.
    """

    slot: int | None
    logprob: float
    length: int
    ended: bool


@dataclass(eq=False)
class GenerationResult:
    """One run of :func:`tempo_mlx.generate`.

    Args:
        model, vocabulary: what made it; used to rescore paths.
        model_name: recipe, folder or Hub id of the model.
        prompt: the prompt as text.
        lattice: every step with its set.
        settings: how it was made.
        finish_reason: "stop", "length" or "context"; None while it runs or if it was interrupted.
        verification: what the oracle found, if it was asked.
    """

    model: PositionedModel | PlainModel
    vocabulary: Vocabulary
    model_name: str
    prompt: str
    lattice: Lattice
    settings: Settings
    stats: Statistics = field(default_factory=Statistics)
    finish_reason: str | None = None
    verification: Verification | None = None
    #: paths that were found, by which beam, and the slots that there were then
    _found: tuple[list[Path], int, int] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        """Prompt, text and number of steps, a line each."""
        known = self.knows_paths(1) or self.known_best() is not None
        text = shown(self.text) if known else "not known; find_paths finds it"
        return (
            f"GenerationResult of {shown(self.prompt)}\n"
            f"  text: {text}\n"
            f"  {len(self.lattice)} steps, {self.lattice.n_tokens} tokens, "
            f"ended by {self.finish_reason}"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the sets in their places and the lattice, drawn by a script."""
        return snippet(self._data_to_show(), self._as_text())

    def to_html(self) -> str:
        """A page with the picture that a notebook shows; it needs no server and no network."""
        return page(self._data_to_show(), self._as_text())

    def _as_text(self) -> str:
        return self.prompt + self.lattice.as_text()

    def _data_to_show(self) -> dict[str, Any]:
        """:meth:`to_dict` as far as it is known without running the model."""
        known = next((k for k in (5, 1) if self.knows_paths(k)), 0)
        if known or self.known_best() is not None:
            return self.to_dict(known)
        lattice = self.lattice
        steps = {"steps": lattice.steps_to_dict(), "prompt_tokens": lattice.prompt_tokens}
        return {"prompt": self.prompt, "finish_reason": self.finish_reason, **steps}

    @property
    def text(self) -> str:
        """The best path through the lattice, scored exactly; see :meth:`paths`.

        It ends before the first stop text, and holds whole characters only: one that the last
        tokens have begun is left out.

        Raises:
            ValueError: if it is not known.
        """
        ids = self.known_best()
        return self.paths(1)[0].text if ids is None else self.spelled(ids)

    def known_best(self) -> list[int] | None:
        """Ids of the best path where the run knows it without another search."""
        if self.settings.has_parents:
            return self._own_path(self._own_ends()[0]).tokens
        sets = self.lattice.sets
        return [t[0].id for t in sets] if all(len(tokens) == 1 for tokens in sets) else None

    def stops(self, ids: Sequence[int]) -> bool:
        """Whether the text of these tokens contains a stop text."""
        text = self.vocabulary.decode(ids)
        return cut_at_stop(text, self.settings.stop) != text

    def spelled(self, ids: Sequence[int]) -> str:
        """The text of these tokens, up to the first stop text."""
        return cut_at_stop(self.vocabulary.decode(ids), self.settings.stop)

    def paths(self, k: int = 1) -> list[Path]:
        """The k best paths through the lattice's sets, best first.

        A path takes one live token of each set. Its log-probability is the model's for exactly
        that text after the prompt, at temperature 1; no path contains a token that the model
        conditioned on anything else. The search is a beam over the sets: with a beam as wide as the
        number of paths it is exhaustive, with a narrower one a better path may be missed.

        Where tokens have parents (visibility "tree" and "recombined") the run has scored its texts
        already: the paths are those of the last set, and in a tree those that ended, too, with the
        end token's log-probability; under a grammar those that ended, if any did. They differ in
        length there; the best one has the highest log-probability per token, the end token counted.
        Elsewhere they are found as the run ends, by another search, or by :meth:`find_paths`.

        Args:
            k: paths wanted, at least 1.

        Returns:
            at most k paths.

        Raises:
            ValueError: if so many are not known.
        """
        check_count("k", k)
        if self.settings.has_parents:
            return [self._own_path(end) for end in self._own_ends()[:k]]
        if not self.knows_paths(k):
            raise TempoError(
                f"the best {k} paths are not known: a run finds as many as it was asked for with "
                f"paths, before it ends; find_paths({k}) runs the model to find them"
            )
        assert self._found is not None
        return self._found[0][:k]

    def find_paths(self, k: int = 1, beam: int = BEAM) -> list[Path]:
        """As :meth:`paths`; runs the model where that does not know them.

        Args:
            k: paths wanted, at least 1.
            beam: hypotheses kept at each step, at least 1; raised to k.
        """
        from .paths import find_paths

        check_count("k", k)
        check_count("beam", beam)
        find_paths([self], max(k, beam))
        return self.paths(k)

    def knows_paths(self, k: int) -> bool:
        """Whether the best k paths can be told without running the model."""
        if self.settings.has_parents:
            return True
        if self._found is None or self._found[2] != self.lattice.n_slots:
            return False
        paths, beam, _ = self._found
        return k <= beam or len(paths) < beam

    def take_paths(self, found: Sequence[tuple[list[int], float]], beam: int) -> None:
        """Take the paths that a search with this beam found: (ids, log-probability in nats)."""
        paths = [Path(self.spelled(ids), ids, logprob) for ids, logprob in found]
        self._found = paths, beam, self.lattice.n_slots
        if self.finish_reason is not None and self.stops(paths[0].tokens):
            self.finish_reason = "stop"

    def _own_ends(self) -> list["_End"]:
        """Where the texts that the run scored itself end, best first by log-probability per token;
        at least one."""
        steps = self.lattice.steps
        sets = [step for step in steps if step.tokens]
        ends = []
        if self.settings.branches or self.settings.has_grammar:
            # A branch that went on has its end in the last set; one that did not, ended before.
            ends = [
                _End(e.parent, e.logprob or 0.0, step.step, True)
                for step in steps
                for e in step.endings
            ]
        if sets and (sets[-1] is steps[-1] or not self.settings.branches):
            length = sets[-1].step + 1
            last = [_End(t.slot, t.logprob or 0.0, length, False) for t in sets[-1].tokens]
            ends = last + ends
        if self.settings.has_grammar:
            # A text that has not ended is no sentence of the grammar yet.
            ends = [end for end in ends if end.ended] or ends
        ends.sort(key=lambda end: -end.logprob / max(1, end.length + end.ended))
        return ends or [_End(None, 0.0, 0, False)]

    def _own_path(self, end: "_End") -> Path:
        ids = [token.id for token in self.lattice.tokens_to(end.slot)]
        return Path(self.spelled(ids), ids, end.logprob, end.ended)

    def received_attention(self) -> dict[int, np.ndarray]:
        """Attention that each step's rows paid to each slot, [S], by one more pass.

        Raises:
            UnsupportedModelError: if the model's attention cannot be captured, or layers are
                recurrent.
        """
        return received_attention(self._capturing(), self.lattice, self.settings)

    def _capturing(self) -> PositionedModel:
        if not isinstance(self.model, PositionedModel):
            raise TempoError("attention is captured with branching shared")
        return self.model

    def attention(self, layers: Sequence[int] | None = None) -> Attention:
        """Attention weights of every slot to every slot, by one more pass of the model.

        They take 4 L H S^2 bytes: 65 MB for 300 slots in 20 layers of 9 heads.

        Args:
            layers: attention layers by order of execution, from 0; None means all.

        Raises:
            ValueError: for a layer that the model does not have, or branching "replicate".
            UnsupportedModelError: if the model's attention cannot be captured, or layers are
                recurrent.
        """
        model = self._capturing()
        chosen = tuple(range(model.n_layers) if layers is None else layers)
        for layer in chosen:
            check_count("layers", layer, 0, model.n_layers - 1)
        found = replayed_attention(model, self.lattice, self.settings, chosen)
        texts = [self.vocabulary.text(id) for id in self.lattice.prompt_tokens]
        texts += [token.text for step in self.lattice.steps for token in step.tokens]
        weights = np.stack([np.array(found[layer]) for layer in chosen])
        return Attention(weights, chosen, texts)

    def plot(self, path: str | FilePath | None = None, *, attention: bool = False) -> "Figure":
        """Draw the lattice with the best path, as ``tempo-mlx generate --plot`` does.

        Args:
            path: file to save the picture in, ending in .svg, .png or .pdf; None for none.
            attention: draw the strongest attention to earlier sets as arcs, by one more pass.

        Returns:
            Matplotlib's figure, which a notebook shows.

        Raises:
            ValueError: for a path that cannot be written or has another ending.
            ImportError: if Matplotlib is missing.
        """
        best = self.known_best()
        if best is None and self.knows_paths(1):
            best = self.paths(1)[0].tokens
        return plot_lattice(
            self,
            FilePath(path) if path is not None else None,
            best=best if self.lattice.sets else None,
            attention=self.received_attention() if attention else None,
        )

    def to_frame(self) -> "DataFrame":
        """A pandas frame with a row for each token and each possible ending, in order of steps.

        Its columns are those of the JSON's tokens and of their steps: ``step``, ``position``,
        ``threshold``, ``kind`` ("token" or "ending"), ``id``, ``text``, ``probability``, ``slot``,
        ``parent``, ``logprob`` (nats), ``pruned_at``, ``pruned_by``, ``score``. What a row does
        not have is missing.

        Raises:
            ImportError: if pandas is missing.
        """
        try:
            from pandas import DataFrame
        except ModuleNotFoundError as error:
            raise MissingExtraError("to_frame needs pandas: pip install pandas") from error
        rows = []
        for step in self.lattice.steps:
            head = {"step": step.step, "position": step.position, "threshold": step.threshold}
            for token in step.tokens:
                rows.append({**head, "kind": "token", **token.to_dict()})
            for ending in step.endings:
                text = self.vocabulary.text(ending.id)
                rows.append({**head, "kind": "ending", "text": text, **asdict(ending)})
        frame = DataFrame(rows, columns=FRAME_COLUMNS)
        whole = dict.fromkeys(("slot", "parent", "pruned_at"), "Int64")
        return frame.astype(whole | {"logprob": float, "score": float})

    def chain(self) -> Path:
        """The best chain through the transitions that the run saw, without another pass.

        Its ``logprob`` sums log p_i(x_j) along the chain: the text's log-probability where every
        set has one token, elsewhere the evidence of rows whose context held other tokens too.
        """
        if self.settings.has_parents:
            return self.paths(1)[0]
        live = [
            [i for i, token in enumerate(step.tokens) if token.pruned_at is None]
            for step in self.lattice.steps
            if step.live
        ]
        steps = [step for step in self.lattice.steps if step.live]
        if not steps:
            return Path("", [], 0.0)
        initial = np.array([steps[0].tokens[i].probability for i in live[0]])
        transitions = [
            self.lattice.transitions[after.step].astype(float)[np.ix_(here, there)]
            if after.step == before.step + 1
            # The set between was dropped: its rows are no evidence on what follows.
            else np.array([[after.tokens[j].probability for j in there]] * len(here))
            for before, after, here, there in zip(steps, steps[1:], live, live[1:], strict=False)
        ]
        indices, logprob = viterbi(initial, transitions)
        pairs = zip(steps, live, indices, strict=True)
        ids = [step.tokens[tokens[i]].id for step, tokens, i in pairs]
        return Path(self.spelled(ids), ids, logprob)

    def to_dict(self, n_paths: int = 5) -> dict[str, Any]:
        """The result as JSON-ready data, schema version 2.

        Args:
            n_paths: the best paths that it names; 0 for none.

        Raises:
            ValueError: if so many are not known, see :meth:`paths`.
        """
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "model": self.model_name,
            "prompt": self.prompt,
            "prompt_tokens": self.lattice.prompt_tokens,
            "settings": self.settings.to_dict(),
            "steps": self.lattice.steps_to_dict(),
            "text": self.text,
            "paths": [asdict(path) for path in self.paths(n_paths)] if n_paths else [],
            "finish_reason": self.finish_reason,
            "stats": self.rates(),
        }
        if self.verification is not None:
            data["verification"] = asdict(self.verification)
        return data

    def rates(self) -> dict[str, float]:
        """The schema's ``stats``: tokens and steps per second, peak memory in GB, drafts."""
        stats, lattice = self.stats, self.lattice
        seconds = stats.generation_seconds or float("inf")
        return {
            "prompt_tps": len(lattice.prompt_tokens) / (stats.prompt_seconds or float("inf")),
            "steps_per_second": len(lattice) / seconds,
            "tokens_per_second": lattice.n_tokens / seconds,
            "peak_memory_gb": stats.peak_memory_gb,
            "drafted_tokens": stats.drafted_tokens,
            "accepted_tokens": stats.accepted_tokens,
        }
