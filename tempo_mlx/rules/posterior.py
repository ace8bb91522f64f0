"""Forward-backward and Viterbi over the transitions of a lattice.

The row of logits after token i of one set already has p_i(x_j), the probability of each token j of
the next set. These transitions make the sets a Markov chain: the probability of a path is the
probability of its first token times its transitions. The chain equals the model's distribution only
if each token had one context. In a shared sequence it is the evidence in the rows.

Source: Rabiner, "A Tutorial on Hidden Markov Models", Proc. IEEE 1989, sections III.A and III.B.
"""

from collections.abc import Sequence

import numpy as np


def _normalised(values: np.ndarray) -> np.ndarray:
    total = values.sum()
    # After underflow there is no evidence, and all tokens count equally.
    return values / total if total > 0 else np.full(len(values), 1 / len(values))


def forward(initial: np.ndarray, transitions: Sequence[np.ndarray]) -> list[np.ndarray]:
    """alpha_s(j) ~ sum_i alpha_{s-1}(i) p_i(x_j), normalised at each step.

    Args:
        initial: weights of the first set's tokens, [n_0].
        transitions: p_i(x_j) from each set to the next, [n_s, n_{s+1}].

    Returns:
        one array [n_s] for each set.
    """
    alphas = [_normalised(initial)]
    for transition in transitions:
        alphas.append(_normalised(alphas[-1] @ transition))
    return alphas


def backward(last: int, transitions: Sequence[np.ndarray]) -> list[np.ndarray]:
    """beta_s(i) = sum_j p_i(x_j) beta_{s+1}(j), scaled at each step; 1 for the last set.

    Args:
        last: size of the last set.
        transitions: as in :func:`forward`.
    """
    betas = [np.ones(last)]
    for transition in reversed(transitions):
        betas.append(_normalised(transition @ betas[-1]))
    return betas[::-1]


def posteriors(initial: np.ndarray, transitions: Sequence[np.ndarray]) -> list[np.ndarray]:
    """gamma_s(i) ~ alpha_s(i) beta_s(i), the posterior of each token in its set; sums to 1."""
    alphas = forward(initial, transitions)
    betas = backward(len(alphas[-1]), transitions)
    return [_normalised(a * b) for a, b in zip(alphas, betas, strict=True)]


def viterbi(initial: np.ndarray, transitions: Sequence[np.ndarray]) -> tuple[list[int], float]:
    """The most probable chain: one index for each set, and its log-probability in nats.

    Args:
        initial: probabilities of the first set's tokens, [n_0]; not renormalised.
        transitions: as in :func:`forward`.
    """
    with np.errstate(divide="ignore"):
        score = np.log(initial)
        logs = [np.log(transition) for transition in transitions]
    parents = []
    for log in logs:
        joint = score[:, None] + log
        parents.append(joint.argmax(axis=0))
        score = joint.max(axis=0)
    chain = [int(score.argmax())]
    for parent in reversed(parents):
        chain.append(int(parent[chain[-1]]))
    return chain[::-1], float(score.max())


class SetPosteriors:
    """Posteriors of the sets of a running generation, over a window of recent steps.

    Sets are identified by their step. A set that leaves the window keeps its last posterior.

    Args:
        lookback: most transitions that a posterior looks ahead, at least 1.
    """

    def __init__(self, lookback: int):
        self._lookback = lookback
        self._first = 0  # step of the first set in the window
        self._initial = np.zeros(0)
        self._transitions: list[np.ndarray] = []
        self._live: list[np.ndarray] = []
        self._gammas: dict[int, np.ndarray] = {}

    def extend(
        self, probabilities: np.ndarray, transition: np.ndarray | None, replace: bool = False
    ) -> None:
        """Add a set, or replace the last one.

        Args:
            probabilities: the tokens' selection probabilities, [n].
            transition: p_i(x_j) from the previous set, [m, n]; None for the first set.
        """
        if replace:
            self._live.pop()
            if self._transitions:
                self._transitions.pop()
        if transition is None:
            self._initial = probabilities
        else:
            self._transitions.append(transition)
        self._live.append(np.ones(len(probabilities), bool))
        while len(self._transitions) > self._lookback:
            self._initial = forward(*self._alive())[1]
            del self._transitions[0], self._live[0]
            self._first += 1
        self._update()

    def prune(self, step: int, pruned: np.ndarray) -> None:
        """Exclude the pruned tokens [n] of a set from all paths; no effect before the window."""
        if step >= self._first:
            self._live[step - self._first] &= ~pruned
            self._update()

    def posterior(self, step: int) -> np.ndarray:
        """gamma of the set of ``step``, [n]; 0 for pruned tokens."""
        return self._gammas[step]

    def _alive(self) -> tuple[np.ndarray, list[np.ndarray]]:
        initial = self._initial * self._live[0]
        pairs = zip(self._transitions, self._live[1:], strict=True)
        return initial, [transition * live for transition, live in pairs]

    def _update(self) -> None:
        gammas = posteriors(*self._alive())
        for i, (gamma, live) in enumerate(zip(gammas, self._live, strict=True)):
            gamma = gamma * live
            total = gamma.sum()
            # Without evidence all live tokens are equal. A dropped set has no live tokens.
            even = live / max(live.sum(), 1)
            self._gammas[self._first + i] = gamma / total if total > 0 else even
