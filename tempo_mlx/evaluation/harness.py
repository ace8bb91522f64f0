"""Tasks of lm-evaluation-harness, by name or from a folder, run with one model."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from ..errors import TempoError
from .model import TempoLM

#: Version of what :func:`evaluate` returns.
SCHEMA = 1


def evaluate(
    model: TempoLM,
    tasks: Sequence[str],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    apply_chat_template: bool = False,
) -> dict[str, Any]:
    """Run tasks and return what the harness measured, as JSON-ready data.

    Args:
        model: answers the tasks' requests.
        tasks: names of tasks or groups, at least one.
        include_path: folder with tasks in YAML besides those that the harness has.
        num_fewshot: solved examples before each question; None is what the task says.
        limit: questions of each task at most; None takes all.
        seed: of the choice of examples.
        apply_chat_template: put each question through the model's chat template.

    Returns:
        ``schema``, ``harness`` (its version), ``num_fewshot``, ``limit`` and ``seed`` as given, and
        ``results``: task -> metric -> number, as the harness names them.

    Raises:
        TempoError: for an unknown task.
    """
    # The harness tells of every default that it uses.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in tasks:
        if not manager.match_tasks([name]):
            raise TempoError(
                f"--tasks: {name!r} is not a task; `lm-eval ls tasks` lists those of the harness, "
                "--include-path adds a folder of others"
            )
    found = lm_eval.simple_evaluate(
        model,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        random_seed=seed,
        numpy_random_seed=seed,
        fewshot_random_seed=seed,
        apply_chat_template=apply_chat_template,
        log_samples=False,
        verbosity="ERROR",
    )
    assert found is not None  # None on all but the first of several processes
    results = {
        task: {
            metric: value
            for metric, value in row.items()
            if isinstance(value, (int, float)) and metric != "sample_len"
        }
        for task, row in found["results"].items()
    }
    return {
        "schema": SCHEMA,
        "harness": lm_eval.__version__,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "seed": seed,
        "results": results,
    }
