"""What a run knows of its sets afterwards: posteriors, verdicts, and weights as keys."""

import numpy as np

from ..lattice.lattice import Lattice
from ..rules.posterior import SetPosteriors
from ..rules.pruning import Evidence, Pruner
from ..settings import Settings


class RetroactivePruner:
    """Looks back at earlier sets after each selection, for one run.

    Args:
        lattice: the run's record; verdicts and weights are written into it.
        settings: pruning, weighting, seed and length of the run.
        n_layers: attention layers of the model.
    """

    def __init__(self, lattice: Lattice, settings: Settings, n_layers: int):
        self._lattice = lattice
        self._settings = settings
        pruning = settings.pruning
        seed = settings.seed or 0
        self._pruner: Pruner | None = None
        if pruning is not None:
            self._pruner = Pruner(pruning, settings.max_tokens, seed, settings.is_sampled)
        self._lookback = settings.lookback
        self._posteriors = SetPosteriors(self._lookback)
        self._n_layers = n_layers
        self._layers: tuple[int, ...] = ()
        if pruning and pruning.scoring.needs_attention:
            self._layers = pruning.chosen_layers(n_layers)
        self._received = np.zeros(0)
        self._attended = np.zeros(0, np.int64)

    def capture(self, probabilities: np.ndarray) -> np.ndarray | None:
        """Weights [layers, n] of the next pass's rows in the attention that earlier slots receive.

        None where no attention is wanted.

        Args:
            probabilities: selection probabilities of the rows' tokens, [n].
        """
        if not self._layers:
            return None
        pruning = self._settings.pruning
        assert pruning is not None
        rows = np.full(len(probabilities), 1 / len(probabilities))
        if pruning.query_weights == "probability":
            rows = probabilities / probabilities.sum()
        weights = np.zeros((self._n_layers, len(rows)), np.float32)
        weights[list(self._layers)] = pruning.weights_of_layers(len(self._layers))[:, None] * rows
        return weights

    def attend(self, received: np.ndarray, held: np.ndarray) -> None:
        """Take the attention [S] that the slots ``held`` received, weighted by :meth:`capture`."""
        self._received, self._attended = received, held

    def select(
        self, probabilities: np.ndarray, transitions: np.ndarray, again: bool = False
    ) -> None:
        """A set was selected after the last step in the lattice; it is evidence on earlier sets.

        Args:
            probabilities: its tokens' selection probabilities, [N].
            transitions: p_i(x_j) from the tokens of the last set, [M, N].
            again: it replaces the set that was selected before.
        """
        first = not self._lattice.steps
        self._posteriors.extend(probabilities, None if first else transitions, replace=again)

    def prune(self) -> list[int]:
        """Judge the recent sets; returns the slots that were pruned, ascending."""
        if self._pruner is None:
            return []
        lattice, pruner = self._lattice, self._pruner
        now = len(lattice.steps)  # the step just selected; the last forward pass was of now - 1
        # Attention was paid by the rows of the last pass, other evidence is the selection itself.
        latest = now - 1 if pruner.pruning.scoring.needs_attention else now
        received = np.zeros(lattice.n_slots)
        received[self._attended] = self._received
        fallen: list[int] = []
        for step in range(max(0, latest - self._lookback), now):
            live = lattice.steps[step].live
            if len(live) < 2 or not pruner.wants(latest - step):
                continue
            chosen = [token.pruned_at is None for token in lattice.steps[step].tokens]
            slots = np.array([token.slot for token in live])
            evidence = Evidence(
                np.array([token.probability for token in live]),
                slots,
                received[slots],
                self._posteriors.posterior(step)[chosen],
                pruner.seed,
            )
            verdict = pruner.judge(now - 1, step, evidence)
            lattice.apply(verdict, pruner.pruning.scoring.name)
            if any(verdict.pruned):
                pruned = np.zeros(len(chosen), bool)
                pruned[np.flatnonzero(chosen)[verdict.pruned]] = True
                self._posteriors.prune(step, pruned)
                fallen += slots[verdict.pruned].tolist()
        return fallen

    def weigh(self) -> None:
        """Set the weights of the recent sets' tokens as keys, the last set's included."""
        if self._settings.weighting == "none":
            return
        lattice = self._lattice
        for step in lattice.steps[-self._lookback - 2 :]:
            live = step.live
            if not live:
                continue
            if self._settings.weighting == "prior":
                weights = np.array([token.probability for token in live])
            else:
                chosen = [token.pruned_at is None for token in step.tokens]
                weights = self._posteriors.posterior(step.step)[chosen]
            if weights.sum() > 0:
                lattice.weigh([token.slot for token in live], weights)
