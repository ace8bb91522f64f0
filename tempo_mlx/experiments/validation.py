"""Cross-validation: compare stored runs with the same runs made alone."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import mlx.core as mx
import numpy as np

from ..doctor.checks import rounds_fp32_products
from ..models import PositionedModel
from .running import Record, run_group
from .store import Store, read_run

#: Largest difference of a probability, and of attention received, by dtype of the activations.
#: Entropies may differ by as much times their largest value. In fp32 a batch sums in another order
#: than a run alone; that was seen to move probabilities by 1e-5.
TOLERANCE = {mx.float32: 1e-4, mx.float16: 0.02, mx.bfloat16: 0.1}

#: Arrays that must be equal, and arrays that may differ within the tolerance.
EXACT = ("query_step", "slot", "queries", "entropy_step")
COMPARED = ("next_probabilities", "received", "entropy")


@dataclass(frozen=True)
class Validation:
    """The result of a cross-validation.

    Args:
        runs: how many were compared.
        tolerance: as in :data:`TOLERANCE`.
        differences: largest difference over all runs, by what was compared.
        mismatches: by run id, one line that says what differs.
    """

    runs: int
    tolerance: float
    differences: dict[str, float]
    mismatches: dict[str, str]


def tolerance(model: PositionedModel) -> float:
    """The :data:`TOLERANCE` for a model on this device."""
    if model.dtype == mx.float32 and rounds_fp32_products():
        return TOLERANCE[mx.float16]
    return TOLERANCE[model.dtype]


def cross_validate(
    model: PositionedModel,
    tokenizer: Any,
    store: Store,
    share: float,
    tell: Callable[[str], None] = lambda run_id: None,
) -> Validation:
    """Repeat a share of the done runs, each alone, and compare.

    Args:
        model, tokenizer: that made the runs.
        store: holds them.
        share: of the runs, (0, 1]; at least one, and always the same ones.
        tell: called with the id of each run before it is repeated.
    """
    done = sorted(store.done)
    n = min(len(done), ceil(share * len(done)))
    chosen = np.random.default_rng(0).permutation(len(done))[:n]
    allowed = tolerance(model)
    worst: dict[str, float] = {}
    mismatches = {}
    for run_id in [done[i] for i in sorted(chosen)]:
        tell(run_id)
        [again] = run_group(model, tokenizer, [store.runs[run_id]]).runs
        if isinstance(again, str):
            mismatches[run_id] = f"fails alone: {again}"
            continue
        why, differences = compare(read_run(store.folder, run_id), again, allowed)
        if why is not None:
            mismatches[run_id] = why
        for name, value in differences.items():
            worst[name] = max(worst.get(name, 0.0), value)
    return Validation(n, allowed, worst, mismatches)


def compare(one: Record, other: Record, allowed: float) -> tuple[str | None, dict[str, float]]:
    """Compare two records of a run.

    Args:
        one, other: the records.
        allowed: largest difference of probabilities and attention; for entropies, relative to
            their largest value.

    Returns:
        One line that says what differs, or None; and the largest differences by name.
    """
    for step in range(max(one.n_steps, other.n_steps)):
        here, there = (
            [id for s, id in zip(r.tokens["step"], r.tokens["id"], strict=True) if s == step]
            for r in (one, other)
        )
        if here != there:
            return f"step {step} has the tokens {here}, and {there} alone", {}
    if one.tokens["pruned_at"] != other.tokens["pruned_at"]:
        return "not the same tokens are pruned alone", {}
    for name in EXACT:
        if not np.array_equal(one.arrays.get(name, 0), other.arrays.get(name, 0)):
            return f"{name} differs alone", {}
    found: dict[str, tuple[Any, Any]] = {
        "probability": (one.tokens["probability"], other.tokens["probability"]),
        **{name: (one.arrays[name], other.arrays[name]) for name in COMPARED if name in one.arrays},
    }
    why, differences = None, {}
    for name, (here, there) in found.items():
        a, b = np.asarray(here, np.float64), np.asarray(there, np.float64)
        scale = max(1.0, float(np.abs(b).max(initial=0.0))) if name == "entropy" else 1.0
        difference = float(np.abs(a - b).max(initial=0.0))
        differences[name] = difference
        if not difference <= allowed * scale and why is None:
            why = f"{name} differs by {difference:.2g}, more than {allowed * scale:.2g}"
    return why, differences
