"""Softmax and log-probabilities whose accuracy does not depend on the vocabulary's size."""

import math

import mlx.core as mx
import numpy as np

LOG2_E = math.log2(math.e)

#: Rows of logits that fit into a processor's cache during NumPy's several passes over them.
CACHED_ROWS = 8

#: Numbers that are added up one by one.
RUN = 256


def softmax(logits: mx.array) -> mx.array:
    """Softmax over the last axis, fp32; log p is exact to 1e-5 nats for any vocabulary size.

    It uses powers of 2, because mlx's exp takes 2.7 times as long on x86. It sums in runs, because
    the CPU's sum in mlx and in the reference BLAS is sequential and is off by 1e-4 for 50,000
    tokens.
    """
    _, exponentials, total = powers(logits)
    return exponentials / total


def tempered(logits: mx.array, temps: mx.array | float) -> mx.array:
    """Logits [..., V] divided by temperatures, after subtracting the maximum to keep precision."""
    return (logits - logits.max(axis=-1, keepdims=True)) / temps


def log_softmax(logits: mx.array) -> mx.array:
    """log p over the last axis, as exact as :func:`softmax`."""
    shifted, _, total = powers(logits)
    return shifted - mx.log(total)


def log_softmax_at(logits: mx.array, ids: mx.array) -> mx.array:
    """log p of the tokens ids [..., K] in rows of logits [..., V], as exact as :func:`softmax`."""
    shifted, _, total = powers(logits)
    return mx.take_along_axis(shifted, ids, axis=-1) - mx.log(total)


def log_p_at(
    logits: mx.array, rows: np.ndarray, ids: np.ndarray, sets: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """log p of single tokens and of sets of tokens, evaluated.

    On a CPU, NumPy computes them: its exp takes a ninth of the time of mlx's, and it sums in
    float64 whatever mlx's BLAS is.

    Args:
        logits: [R, V], fp32.
        rows, ids: row and id of each token, [n] each.
        sets: 1 for the tokens of each of K sets and 0 for others, [V, K], fp32.

    Returns:
        log p of the tokens [n] and of each set in each row [R, K], float64.
    """
    if mx.default_device().type == mx.cpu:
        return _log_p_at_on_cpu(np.array(logits, copy=False), rows, ids, sets)
    shifted, exponentials, total = powers(logits)
    at = mx.array(rows.astype(np.int32)), mx.array(ids.astype(np.int32))
    found = shifted[at] - mx.log(total[at[0], 0])
    masses = None
    if sets is not None:
        masses = mx.log(exponentials @ mx.array(sets)) - mx.log(total)
    mx.eval(found, *([] if masses is None else [masses]))
    return np.array(found, np.float64), None if masses is None else np.array(masses, np.float64)


def _log_p_at_on_cpu(
    logits: np.ndarray, rows: np.ndarray, ids: np.ndarray, sets: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    R, V = logits.shape
    normalizer = np.empty(R)
    masses = None if sets is None else np.empty((R, sets.shape[1]))
    block = np.empty((CACHED_ROWS, V), np.float32)
    # Empty sets have log 0. Callers check for logits that are not finite.
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, R, CACHED_ROWS):
            part = slice(start, min(start + CACHED_ROWS, R))
            top = logits[part].max(axis=1)
            powers = np.subtract(logits[part], top[:, None], out=block[: len(top)])
            np.exp(powers, out=powers)
            normalizer[part] = top + np.log(powers.sum(axis=1, dtype=np.float64))
            if sets is not None and masses is not None:
                masses[part] = np.log(powers @ sets) + top[:, None]
    if masses is not None:
        masses -= normalizer[:, None]
    return logits[rows, ids] - normalizer[rows], masses


def powers(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Logits minus their maximum, the exp of that, and the sum of the exp [..., 1]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    exponentials = mx.power(2.0, shifted * LOG2_E)
    return shifted, exponentials, _total(exponentials)


def _total(values: mx.array) -> mx.array:
    """Sum over the last axis, [..., 1], run by run and then of the runs."""
    n = values.shape[-1] // RUN * RUN
    rest = values[..., n:].sum(axis=-1, keepdims=True)
    if n == 0:
        return rest
    runs = values[..., :n].reshape(*values.shape[:-1], n // RUN, RUN)
    return runs.sum(axis=-1).sum(axis=-1, keepdims=True) + rest
