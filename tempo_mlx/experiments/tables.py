"""The results of a suite as tables, which the analysis reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TempoError

if TYPE_CHECKING:
    from pandas import DataFrame

    from .running import Record


@dataclass(frozen=True, eq=False)
class Tables:
    """The done runs of one suite.

    Args:
        runs: one row for each run: run_id, prompt_id ("narrative-1"), category, prompt, seed
            (integer, or NA if selection is deterministic), visibility, condition (a label of
            everything that the grid varies, "isolated" or "visible, combine=mean"), one column for
            each grid setting, n_steps, n_tokens (in all sets), text, finish_reason, seconds.
        tokens: one row for each generated token: run_id, step, position, slot, id, text,
            probability, set_size, pruned_at (NA if it never was).
        entries: one row for each run, query step and key slot that was captured: run_id,
            query_step, slot, key_step (negative: of the prompt), distance (query_step - key_step,
            logical positions), is_prompt, is_first (first token of the prompt), set_size (of the
            key's set; 1 for the prompt), probability (of the key token when it was selected; 1.0
            for prompt tokens), queries (tokens of the query set that were averaged over).
        received: float32 [entries, layers, heads], the attention that the slot got from the query
            step's tokens, mean over these tokens; a query token's attention over all slots sums
            to 1.
        entropy: run_id, step, layer, head, entropy (nats; of a query token's attention, mean over
            the step's tokens).
        next_tokens: run_id, step, rank (0..19), id, text, probability: the combined distribution
            that the step's set was selected from.
        kl: prompt_id, category, seed, step, condition_a, condition_b, kl_ab, kl_ba (nats):
            distributions of two runs that differ in visibility only, at the same step. After
            step 0 their sets may differ.
        suite: the suite as resolved.
        manifest: versions, device, model, command, dates.
    """

    runs: "DataFrame"
    tokens: "DataFrame"
    entries: "DataFrame"
    received: np.ndarray
    entropy: "DataFrame"
    next_tokens: "DataFrame"
    kl: "DataFrame"
    suite: dict[str, Any]
    manifest: dict[str, Any]


def load_tables(folder: Path) -> Tables:
    """The done runs in a suite's folder.

    Args:
        folder: of ``tempo-mlx experiment run``, complete or not.

    Raises:
        TempoError: if it holds no suite, no run is done, or a file of one is damaged.
    """
    import pandas as pd

    from .store import read_configurations, read_manifest, read_pairs, read_run, read_suite_file

    suite, manifest = read_suite_file(folder), read_manifest(folder)
    configurations = read_configurations(folder)
    if not configurations:
        raise TempoError(f"{folder} holds no run that is done; run the suite first")
    runs, parts = [], []
    for run_id, configuration in configurations.items():
        record = read_run(folder, run_id)
        parts.append(_of_run(run_id, record))
        runs.append(
            {
                "run_id": run_id,
                "prompt_id": configuration["prompt_id"],
                "category": configuration["category"],
                "prompt": configuration["prompt"],
                "seed": configuration["settings"]["seed"],
                "visibility": configuration["settings"]["visibility"],
                "condition": configuration["condition"],
                **{name: _cell(value) for name, value in configuration["varied"].items()},
                "n_steps": record.n_steps,
                "n_tokens": len(record.tokens["id"]),
                "text": record.text,
                "finish_reason": record.finish_reason,
                "seconds": record.seconds,
            }
        )
    frames: list[tuple[DataFrame, ...]] = list(zip(*(part[:4] for part in parts), strict=True))
    tokens, entries, entropy, next_tokens = (pd.concat(each, ignore_index=True) for each in frames)
    # A run of one step has none, in a shape without layers and heads.
    received = [part[4] for part in parts if len(part[4])]
    tokens["pruned_at"] = tokens["pruned_at"].astype("Int64")
    pairs = []
    place = {run_id: i for i, run_id in enumerate(configurations)}
    found = read_pairs(folder, place)
    for a, b, table in sorted(found, key=lambda pair: (place[pair[0]], place[pair[1]])):
        first, second = configurations[a], configurations[b]
        frame = table.to_pandas()
        frame.insert(0, "prompt_id", first["prompt_id"])
        frame.insert(1, "category", first["category"])
        frame.insert(2, "seed", _integers([first["settings"]["seed"]] * len(frame)))
        frame.insert(4, "condition_a", first["condition"])
        frame.insert(5, "condition_b", second["condition"])
        pairs.append(frame)
    names = (
        "prompt_id",
        "category",
        "seed",
        "step",
        "condition_a",
        "condition_b",
        "kl_ab",
        "kl_ba",
    )
    kl = pd.concat(pairs, ignore_index=True) if pairs else pd.DataFrame(columns=list(names))
    frame = pd.DataFrame(runs)
    return Tables(
        runs=frame.assign(seed=_integers([run["seed"] for run in runs])),
        tokens=tokens,
        entries=entries,
        received=np.concatenate(received) if received else np.zeros((0, 0, 0), np.float32),
        entropy=entropy,
        next_tokens=next_tokens,
        kl=kl.assign(seed=kl["seed"].astype("Int64")),
        suite=suite,
        manifest=manifest,
    )


def _integers(values: list[int | None]) -> Any:
    """A column of integers, exact beyond 2^53, some of which may be missing."""
    import pandas as pd

    return pd.array(values, dtype="Int64")


def _cell(value: Any) -> Any:
    """A grid value that a column can hold."""
    return json.dumps(value) if isinstance(value, dict | list) else value


def _of_run(
    run_id: str, record: "Record"
) -> "tuple[DataFrame, DataFrame, DataFrame, DataFrame, np.ndarray]":
    """Tokens, entries, entropy and next tokens of one run, and the attention of its entries."""
    import pandas as pd

    arrays, length = record.arrays, len(record.prompt_tokens)
    tokens = pd.DataFrame({"run_id": run_id, **record.tokens})
    # By slot; those of the prompt come first.
    slots = np.array(record.tokens["slot"], int)
    n = max(length, int(slots.max(initial=-1)) + 1)
    steps, sizes, probabilities = np.arange(n) - length, np.ones(n, int), np.ones(n)
    steps[slots] = record.tokens["step"]
    sizes[slots] = record.tokens["set_size"]
    probabilities[slots] = record.tokens["probability"]
    slot = arrays.get("slot", np.zeros(0, np.int32))
    query_step = arrays.get("query_step", np.zeros(0, np.int32))
    entries = pd.DataFrame(
        {
            "run_id": run_id,
            "query_step": query_step,
            "slot": slot,
            "key_step": steps[slot],
            "distance": query_step - steps[slot],
            "is_prompt": slot < length,
            "is_first": slot == 0,
            "set_size": sizes[slot],
            "probability": probabilities[slot],
            "queries": arrays.get("queries", np.zeros(0, np.int32)),
        }
    )
    values = arrays.get("entropy", np.zeros((0, 0, 0), np.float32))
    at, layer, head = np.indices(values.shape).reshape(3, -1)
    entropy = pd.DataFrame(
        {
            "run_id": run_id,
            "step": arrays.get("entropy_step", np.zeros(0, np.int32))[at],
            "layer": layer,
            "head": head,
            "entropy": values.reshape(-1),
        }
    )
    ids = arrays.get("next_ids", np.zeros((0, 0), np.int32))
    step, rank = np.indices(ids.shape).reshape(2, -1)
    next_tokens = pd.DataFrame(
        {
            "run_id": run_id,
            "step": step,
            "rank": rank,
            "id": ids.reshape(-1),
            "text": [record.texts[id] for id in ids.reshape(-1).tolist()],
            "probability": arrays.get("next_probabilities", np.zeros((0, 0))).reshape(-1),
        }
    )
    received = arrays.get("received", np.zeros((0, 0, 0), np.float32))
    return tokens, entries, entropy, next_tokens, received
