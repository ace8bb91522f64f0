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
from ..plots import check_plot
from ..rules.own import load_object
from ..search import SearchError, SearchResult, SearchSettings, stream_search
from ..search.environment import Batched
from ..search.settings import NEEDS
from ..text.printable import quoted
from ..weights import load
from .chat_template import NEEDS as CHAT_NEEDS
from .chat_template import PrefillResponse, SystemPrompt, Template, UseChat, template_config
from .effects import PRINTED, require_effect, typed
from .one_prompt import AS_IN_AN_EDITOR, read_prompt
from .options import AdapterPath, Model, Overwrite, TemplateConfig, output_file
from .outputs import (
    PAGE,
    Output,
    Written,
    beginning,
    check_outputs,
    check_page,
    is_standard_output,
    json_where,
    picture,
    write_json,
)
from .setting_options import files_of, with_settings

DEFAULTS = SearchSettings()

#: What options need to have an effect.
OPTIONS: Needs = {
    **NEEDS,
    **CHAT_NEEDS,
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
    app.command("search")(with_settings(SearchSettings)(search))


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
    chat: UseChat = False,
    system_prompt: SystemPrompt = None,
    prefill_response: PrefillResponse = None,
    chat_template_config: TemplateConfig = None,
    model: Model = "smollm2-135m",
    adapter_path: AdapterPath = None,
    settings: SearchSettings = DEFAULTS,
    value: Annotated[
        str | None,
        typer.Option(
            help="Your own function instead: FILE.py:NAME, taking (token ids, text) and "
            "returning a number in [0, 1]."
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Print what was tried for each token: visits, values."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the choices into this file (.svg, .png, .pdf).")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a page that shows the choices in a browser, without a server.",
        ),
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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the text.")] = False,
) -> None:
    """Generate text by Monte Carlo tree search over one shared cache.

    For each token, possible continuations are tried and evaluated; the most visited token is kept,
    and the search continues in its subtree.
    """
    require_effect(context, OPTIONS)
    function = load_object(value, "--value") if value is not None else None
    if function is not None and not isinstance(function, Batched) and not callable(function):
        raise TempoError(f"--value {value} must be a function, got {shown(function)}")
    if plot is not None:
        check_plot(plot)
    if html is not None:
        check_page(html)
    check_outputs(
        [
            Output("--output", output, is_result),
            Output("--dot", dot, DOT),
            Output("--html", html, PAGE),
            Output("--plot", plot, picture("search")),
        ],
        {
            "--prompt-file": prompt_file,
            "--value": Path(value.rpartition(":")[0]) if value is not None else None,
            "standard input": STANDARD_INPUT if prompt == "-" else None,
            **files_of(SearchSettings, context.params),
        },
        overwrite,
    )
    text, template = read_prompt(prompt, None, prompt_file), None
    if chat:
        config = template_config(chat_template_config)
        template = Template(system_prompt, prefill_response, config)
    out, notes = (Console(stderr=err, highlight=False, soft_wrap=True) for err in (False, True))
    out.quiet = is_standard_output(output) or is_standard_output(dot)
    notes.quiet = quiet
    for note in settings.notes(typed(context)):
        notes.print(f"note: {note}", style="yellow")
    language_model, tokenizer = load(model, adapter_path=adapter_path)
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
        bar = progress.add_task("Searching", total=settings.simulations)

        def tell(done: int, now: SearchResult) -> None:
            progress.update(bar, completed=done, description=f"Token {len(now.choices) + 1}")

        try:
            for now in stream_search(
                language_model,
                tokenizer,
                text if template is None else template.asking(text),
                value=function,
                progress=tell,
                settings=settings,
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
                "note: the budget ran out before the first token was chosen; raise "
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
    if html is not None:
        with written.output(html):
            write_atomically(html, result.to_html())
    if plot is not None:
        with written.output(plot, "drawn"):
            result.plot(plot)
    written.finish()
    if interrupted:
        raise KeyboardInterrupt


def choices(result: SearchResult) -> Table:
    """What was tried for each token, most visited first."""
    table = Table("position", "token", "", title="children of each root")
    for name in ("visits", "value", "prior"):
        table.add_column(name, justify="right")
    for i, choice in enumerate(result.choices):
        for rank, child in enumerate(choice.children):
            chosen = child["action"] == choice.id
            table.add_row(
                str(i) if rank == 0 else "",
                Text(quoted(child["text"]), "bold green" if chosen else ""),
                "chosen" if chosen else "",
                str(child["visits"]),
                f"{child['value']:.4f}" if child["visits"] else "",
                f"{child['prior']:.4f}",
                end_section=rank == len(choice.children) - 1,
            )
    return table
