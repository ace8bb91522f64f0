"""``tempo-mlx search``: Monte Carlo tree search for a text."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..arguments import shown
from ..errors import TempoError
from ..io.console import Console
from ..io.files import STANDARD_INPUT, STANDARD_OUTPUT, write_atomically
from ..needs import Need, Needs
from ..plots import check_plot, plot_search
from ..rules.own import load_object
from ..search import SearchError, SearchResult, SearchSettings, stream_search
from ..search.environment import Batched
from ..search.monte_carlo import BACKUPS, SELECTIONS
from ..search.settings import EVALUATIONS, NEEDS
from ..text.printable import quoted
from ..weights import load
from .effects import PRINTED, require_effect, typed
from .one_prompt import AS_IN_AN_EDITOR, read_prompt
from .options import Model, Overwrite, output_file
from .outputs import (
    Output,
    Written,
    beginning,
    check_outputs,
    is_standard_output,
    json_where,
    picture,
    write_json,
)
from .prompts import parse_bytes

DEFAULTS = SearchSettings()

#: What options need to have an effect.
OPTIONS: Needs = {
    **NEEDS,
    "evaluation": (Need("value", absent=True),),
    "explain": (*PRINTED, Need("dot", (STANDARD_OUTPUT,), absent=True)),
}

#: Recognise a result of this command, or of a search that failed; and its tree.
is_result = json_where(
    lambda data: (
        data.keys() >= {"schema", "prompt", "choices", "tree"}
        or data.keys() == {"error", "paths", "tree"}
    )
)
DOT = beginning(b'digraph tree {\n  node [shape=box];\n  0 [label="')


def register(app: typer.Typer) -> None:
    app.command("search")(search)


def search(
    context: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; '-' reads it from standard input, as from --prompt-file."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help=f"Read the prompt from this file (UTF-8). {AS_IN_AN_EDITOR}"),
    ] = None,
    model: Model = "smollm2-135m",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Tokens of the text at most, at least 1.")
    ] = DEFAULTS.max_tokens,
    simulations: Annotated[
        int, typer.Option("--simulations", "-s", help="Simulations for each token, at least 1.")
    ] = DEFAULTS.simulations,
    threshold: Annotated[
        float, typer.Option(help="Tokens with at least this probability are tried, in (0, 1].")
    ] = DEFAULTS.threshold,
    max_parallel: Annotated[
        int, typer.Option(help="Tokens tried after each text at most, at least 1.")
    ] = DEFAULTS.max_parallel,
    selection: Annotated[
        str,
        typer.Option(
            metavar="|".join(SELECTIONS),
            help="uct: value + c sqrt(ln N / n). puct: value + c p sqrt(N) / (1 + n), with the "
            "model's probability p.",
        ),
    ] = str(DEFAULTS.selection),
    exploration: Annotated[
        float, typer.Option("--exploration", "-c", help="The constant c, in [0, 1e9].")
    ] = DEFAULTS.exploration,
    evaluation: Annotated[
        str,
        typer.Option(
            metavar="|".join(EVALUATIONS),
            help="What a text is worth: mean_probability of its tokens, mean_logprob (the "
            "geometric mean of their probabilities), or rollout (the same of it and --depth more "
            "tokens).",
        ),
    ] = str(DEFAULTS.evaluation),
    value: Annotated[
        str | None,
        typer.Option(
            help="A function of your own instead: FILE.py:NAME, taking (token ids, text) and "
            "returning a number in [0, 1]."
        ),
    ] = None,
    backup: Annotated[
        str,
        typer.Option(metavar="|".join(BACKUPS), help="What a node makes of the values below it."),
    ] = str(DEFAULTS.backup),
    depth: Annotated[int, typer.Option(help="Tokens of a rollout, at least 1.")] = DEFAULTS.depth,
    rollout_temp: Annotated[
        float,
        typer.Option(
            help="0 for greedy rollouts, else the temperature they are drawn at, in [1e-6, 1e6]."
        ),
    ] = DEFAULTS.rollout_temp,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = DEFAULTS.seed,
    leaves_per_batch: Annotated[
        int, typer.Option(help="Leaves in one forward pass, at least 1.")
    ] = DEFAULTS.leaves_per_batch,
    max_forward_tokens: Annotated[
        int | None,
        typer.Option(
            help="End when this many tokens, the prompt included, passed through the model; above "
            "the prompt's number."
        ),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(help="End this long after the prompt was read, with what is known."),
    ] = None,
    max_kv_bytes: Annotated[
        str | None, typer.Option(help="Memory for keys, values and states, such as 800MB or 2GiB.")
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Print what was tried for each token: visits, values."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the choices into this file (.svg, .png, .pdf).")
    ] = None,
    dot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=output_file,
            help="Write the tree of the last token for Graphviz; '-' prints it instead of the "
            "text.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            parser=output_file,
            help="Write the search as JSON; '-' prints it instead of the text.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the text and nothing else.")
    ] = False,
) -> None:
    """Search for a text by Monte Carlo tree search over one shared cache.

    For each token, texts that may follow are tried and judged; the token that was visited most is
    kept, with all that is known below it.
    """
    settings = SearchSettings(
        max_tokens=max_tokens,
        simulations=simulations,
        threshold=threshold,
        max_parallel=max_parallel,
        selection=selection,
        exploration=exploration,
        backup=backup,
        leaves_per_batch=leaves_per_batch,
        evaluation=evaluation,
        depth=depth,
        rollout_temp=rollout_temp,
        seed=seed,
        max_forward_tokens=max_forward_tokens,
        max_seconds=max_seconds,
        max_kv_bytes=parse_bytes(max_kv_bytes) if max_kv_bytes is not None else None,
    )
    require_effect(context, OPTIONS)
    function = load_object(value, "--value") if value is not None else None
    if function is not None and not isinstance(function, Batched) and not callable(function):
        raise TempoError(f"--value {value} must be a function, got {shown(function)}")
    if plot is not None:
        check_plot(plot)
    check_outputs(
        [
            Output("--output", output, is_result),
            Output("--dot", dot, DOT),
            Output("--plot", plot, picture("search")),
        ],
        {
            "--prompt-file": prompt_file,
            "--value": Path(value.rpartition(":")[0]) if value is not None else None,
            "standard input": STANDARD_INPUT if prompt == "-" else None,
        },
        overwrite,
    )
    text = read_prompt(prompt, None, prompt_file)
    out, notes = (Console(stderr=err, highlight=False, soft_wrap=True) for err in (False, True))
    out.quiet = is_standard_output(output) or is_standard_output(dot)
    notes.quiet = quiet
    for note in settings.notes(typed(context)):
        notes.print(f"note: {note}", style="yellow")
    language_model, tokenizer = load(model)
    result: SearchResult | None = None
    interrupted = False
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("simulations"),
        TimeElapsedColumn(),
        console=notes,
        transient=True,
        disable=not notes.is_terminal or quiet,
    ) as progress:
        bar = progress.add_task("Searching", total=simulations)

        def tell(done: int, now: SearchResult) -> None:
            progress.update(bar, completed=done, description=f"Token {len(now.choices) + 1}")

        try:
            for now in stream_search(
                language_model, tokenizer, text, value=function, progress=tell, settings=settings
            ):
                result = now
        except KeyboardInterrupt:
            interrupted = True
        except SearchError as error:
            if output is not None:
                data = {"error": str(error), "paths": error.paths, "tree": error.tree.to_dict()}
                write_json(output, data)
                raise TempoError(f"{error}; the tree so far is in {output}") from error
            raise
    if result is None:
        raise KeyboardInterrupt
    if interrupted:
        result.finish_reason = "interrupted"
    if quiet:
        out.print(Text(result.text))
    else:
        out.print(Text.assemble((result.prompt, "dim"), result.text))
        if explain:
            out.print(choices(result))
        rate = result.simulations / (result.seconds or float("inf"))
        notes.print(
            f"{len(result.choices)} tokens, {result.logprob:.3f} nats, ended by "
            f"{result.finish_reason} | {result.simulations} simulations, {rate:.1f}/s | "
            f"{result.forward_tokens} tokens in {result.passes} passes",
            style="dim",
        )
        if result.finish_reason == "budget" and not result.choices:
            notes.print(
                "note: the budget was spent before anything was known of the first token; raise "
                "--max-forward-tokens or --max-seconds",
                style="yellow",
            )
    written = Written(notes)
    if output is not None:
        with written.output(output):
            write_json(output, result.to_dict())
    if dot is not None:
        with written.output(dot):
            write_atomically(dot, result.tree.to_dot(result.label))
    if plot is not None:
        with written.output(plot, "drawn"):
            plot_search(result, plot)
    written.finish()
    if interrupted:
        raise KeyboardInterrupt


def choices(result: SearchResult) -> Table:
    """What was tried for each token, most visited first."""
    table = Table("position", "token", title="children of each root")
    for name in ("visits", "value", "prior"):
        table.add_column(name, justify="right")
    for i, choice in enumerate(result.choices):
        for rank, child in enumerate(choice.children):
            table.add_row(
                str(i) if rank == 0 else "",
                Text(quoted(child["text"]), "bold green" if child["action"] == choice.id else ""),
                str(child["visits"]),
                f"{child['value']:.4f}" if child["visits"] else "",
                f"{child['prior']:.4f}",
                end_section=rank == len(choice.children) - 1,
            )
    return table
