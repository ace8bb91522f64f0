"""Forward-backward and Viterbi over the transitions of a lattice.

A row of logits after token i of one set gives p_i(x_j), the probability of each token j of the next
set, at no extra cost. They make the sets a Markov chain: the probability of a path is its first
token's probability times its transitions. (The chain is the model's only where each token had one
context; in a shared sequence it is the evidence that the rows hold.)

Source: Rabiner, "A Tutorial on Hidden Markov Models", Proc. IEEE 1989, sections III.A and III.B.
"""

from collections.abc import Sequence

import numpy as np


def _normalised(values: np.ndarray) -> np.ndarray:
    total = values.sum()
    # Underflow leaves no evidence: all live tokens are alike then.
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
        last: tokens in the last set.
        transitions: as in :func:`forward`.
    """
    betas = [np.ones(last)]
    for transition in reversed(transitions):
        betas.append(_normalised(transition @ betas[-1]))
    return betas[::-1]


def posteriors(initial: np.ndarray, transitions: Sequence[np.ndarray]) -> list[np.ndarray]:
    """gamma_s(i) ~ alpha_s(i) beta_s(i): how well each token explains the others; sums to 1."""
    alphas = forward(initial, transitions)
    betas = backward(len(alphas[-1]), transitions)
    return [_normalised(a * b) for a, b in zip(alphas, betas, strict=True)]


def viterbi(
    initial: np.ndarray, transitions: Sequence[np.ndarray]
) -> tuple[list[int], float]:
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
