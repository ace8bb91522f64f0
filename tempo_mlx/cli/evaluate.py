"""``tempo-mlx evaluate``: tasks of lm-evaluation-harness."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..arguments import check_count, check_seed, parse_bytes
from ..errors import TempoError
from ..io.console import Console
from ..weights import load
from .options import AdapterPath, Model, Overwrite, output_file
from .outputs import Output, check_outputs, json_where, say_written, write_json


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(
    tasks: Annotated[
        str, typer.Option(help="Tasks or groups of lm-evaluation-harness, separated by commas.")
    ],
    model: Model = "smollm2-135m",
    adapter_path: AdapterPath = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of further tasks, in the harness's YAML.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="Solved examples before each question, at least 0; the task's own."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions of each task at most, at least 1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of examples, at least 0.")] = 0,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template", help="Put each question through the model's chat template."
        ),
    ] = False,
    max_kv_bytes: Annotated[
        str | None,
        typer.Option(
            help="Memory for what has been read, such as 800MB or 2GiB. Half of what the model "
            "leaves, by default."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", parser=output_file, help="JSON file of the results."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Evaluate a model with lm-evaluation-harness, each shared beginning read once.

    Examples before the questions and what a question's choices have in common go through the model
    once; the numbers are those of reading each choice alone.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise TempoError("--tasks names no task")
    if num_fewshot is not None:
        check_count("--num-fewshot", num_fewshot, 0)
    if limit is not None:
        check_count("--limit", limit)
    check_seed(seed)
    if find_spec("lm_eval") is None:
        raise TempoError("evaluate needs lm-eval: pip install 'tempo-mlx[eval]'")
    if include_path is not None and not include_path.is_dir():
        raise TempoError(f"--include-path {include_path} is not a folder")
    kv_bytes = None if max_kv_bytes is None else parse_bytes(max_kv_bytes)
    if output is not None:
        ours = json_where(lambda data: {"harness", "results"} <= data.keys())
        check_outputs([Output("--output", output, ours)], {}, overwrite)

    from ..evaluation.harness import evaluate as run
    from ..evaluation.model import TempoLM

    loaded, tokenizer = load(model, adapter_path=adapter_path)
    found = run(
        TempoLM(loaded, tokenizer, kv_bytes),
        names,
        include_path,
        num_fewshot,
        limit,
        seed,
        apply_chat_template,
    )
    table = Table("task", "metric", "value", "stderr")
    for task, row in found["results"].items():
        for metric, value in row.items():
            name, _, rest = metric.partition(",")
            if not name.endswith("_stderr"):
                error = row.get(f"{name}_stderr,{rest}")
                table.add_row(task, name, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    console = Console(highlight=False)
    console.print(table)
    if output is not None:
        write_json(output, {"model": model, **found})
        say_written(output, console)
