"""``tempo-mlx score``: candidate words of many contexts, scored and ranked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..arguments import parse_bytes
from ..errors import TempoError
from ..io.console import Console
from ..io.files import STANDARD_INPUT, replaceable
from ..io.resumable_jsonl import ResultsFile
from ..needs import Need, Needs
from ..scoring import ContinuationScorer, ScoringStats
from ..scoring.batch_scorer import FULL_PASSES
from ..scoring.rows import Row, key_of, ranked, read_rows
from ..scoring.scorer import AGGREGATES, CHUNK_SIZE, check_options
from ..scoring.texts import OWN_START
from ..text.chat import chat_text
from ..weights import load
from ..weights.fingerprint import identify
from .chat_template import SystemPrompt, Template, template_config
from .effects import require_effect, typed
from .options import (
    NO_START,
    AdapterPath,
    KeepBlanks,
    Model,
    Overwrite,
    Separator,
    StartOfText,
    TemplateConfig,
    at_least,
    output_file,
    start_of,
)
from .outputs import Output, check_outputs, is_standard_output, say_written
from .prompts import RESULTS, RecordStream, results_sink, saying_how_to_resume
from .score_output import Tables, TextFile, TextStream, is_text

_AS_IT_IS = (Need("chat", absent=True),)

#: What options need to have an effect: a template says itself what stands before a word.
OPTIONS: Needs = {
    **dict.fromkeys(("start", "separator", "keep_blanks", "truecase"), _AS_IT_IS),
    "max_context_tokens": _AS_IT_IS,
    "system_prompt": (Need("chat"),),
    "chat_template_config": (Need("chat"),),
}

#: Endings of the names of files, and the format of each.
FORMATS = {".jsonl": "jsonl", ".tsv": "tsv", ".txt": "tsv"}

#: Candidates up to which a terminal gets a table.
TABLE_SIZE = 100

#: Seconds before a progress bar shows.
PATIENCE = 1.0


def register(app: typer.Typer) -> None:
    app.command("score")(score)


def score(
    context: typer.Context,
    file: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help='.jsonl, lines such as {"context": "He is", "candidates": ["happy", "sad"]}; or '
            ".tsv or .txt, lines of context, tab, word; the words of one context are ranked "
            "together, wherever they are. A first line 'context', tab, 'word' is skipped. '-' "
            "reads standard input.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            parser=output_file,
            help="Write the results here, in the format of the input; text gives JSON where this "
            "ends in .jsonl. Rerun the same command to resume an interrupted run. '-' is standard "
            "output.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="jsonl|tsv",
            show_default="by the ending of INPUT; jsonl for standard input",
            help="Format of the input.",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Score each word as what the model answers to its context, behind the model's "
            "chat template.",
        ),
    ] = False,
    system_prompt: SystemPrompt = None,
    chat_template_config: TemplateConfig = None,
    model: Model = "smollm2-135m",
    adapter_path: AdapterPath = None,
    weight: Annotated[
        float, typer.Option(help="Factor on the log-probability of a word, in nats.")
    ] = 1.0,
    word_insertion_bonus: Annotated[
        float, typer.Option(help="Added to the score of each word; not multiplied by the weight.")
    ] = 0.0,
    truecase: Annotated[
        str | None,
        typer.Option(
            metavar="english",
            help="Give context and word the case that they have in print, before they are scored.",
        ),
    ] = None,
    max_context_tokens: Annotated[
        int | None, typer.Option(help="Keep the last tokens of a context, this many at most.")
    ] = None,
    start: StartOfText = OWN_START,
    separator: Separator = " ",
    keep_blanks: KeepBlanks = False,
    trailing_space_correction: Annotated[
        bool,
        typer.Option(
            "--trailing-space-correction",
            help="Score that the word ends where it does, too, instead of the word before it.",
        ),
    ] = False,
    aggregate: Annotated[
        str,
        typer.Option(
            metavar="|".join(AGGREGATES),
            help="How to combine the log-probabilities of the spellings of one candidate.",
        ),
    ] = "max",
    max_kv_bytes: Annotated[
        str | None,
        typer.Option(
            help="Memory for what was read and may be needed again, such as 800MB or 2GiB. Half "
            "of what the model leaves, by default."
        ),
    ] = None,
    chunk_size: Annotated[
        int, typer.Option(help="Tokens in one forward pass; smaller needs less memory.")
    ] = CHUNK_SIZE,
    batch_size: Annotated[
        int,
        typer.Option(
            callback=at_least(1), help="Rows of the input that are scored at once, at least 1."
        ),
    ] = 64,
    details: Annotated[
        bool, typer.Option("--details", help="Add what each score is made of, token by token.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Say what it took: passes, tokens, memory.")
    ] = False,
) -> None:
    """Score and rank words that may follow contexts.

    score = weight x log-probability of the word given its context + word insertion bonus

    A row that cannot be scored becomes a record with its "error" in JSON, and a line on standard
    error where the output is text; the others are scored. Exit code 1 if a row failed.
    """
    require_effect(context, OPTIONS)
    template = None
    if chat:
        template = Template(system_prompt, None, template_config(chat_template_config))
        # The template says what stands before the word, to the last blank.
        start, separator, keep_blanks = NO_START, "", True
    if truecase not in (None, "english"):
        raise TempoError(f"--truecase must be english, got {truecase!r}")
    kv_bytes = parse_bytes(max_kv_bytes) if max_kv_bytes is not None else None
    kind = input_format(file, format)
    kind_out = kind if output is None else output_format(output, kind)
    check_outputs(
        [Output("--output", output, RESULTS if kind_out == "jsonl" else is_text)],
        {"INPUT": STANDARD_INPUT if file == "-" else Path(file)},
        overwrite,
    )
    if is_standard_output(output):
        output = None
    rows = read_rows(file, kind)
    out, notes = Console(highlight=False), Console(stderr=True, highlight=False, soft_wrap=True)
    settings: dict[str, Any] = {
        "weight": weight,
        "word_insertion_bonus": word_insertion_bonus,
        "truecase": truecase,
        "max_context_tokens": max_context_tokens,
        "separator": separator,
        "keep_blanks": keep_blanks,
        "trailing_space_correction": trailing_space_correction,
        "aggregate": aggregate,
    }
    sizes: dict[str, Any] = {"max_kv_bytes": kv_bytes, "chunk_size": chunk_size}
    check_options(**settings, **sizes)
    settings["start"] = start_of(start)
    spellings = any(isinstance(each, list) for row in rows for each in row.candidates)
    if "aggregate" in typed(context) and not spellings:
        notes.print("note: --aggregate has no effect: no candidate is a list", style="yellow")
    language_model, tokenizer = load(model, adapter_path=adapter_path)
    if template is not None:
        rows = [answered(row, template, tokenizer) for row in rows]
    scorer = ContinuationScorer(language_model, tokenizer, **settings, **sizes)
    if max_kv_bytes is not None and scorer.stats().method == FULL_PASSES:
        notes.print(
            "note: --max-kv-bytes has no effect: this model is read in full passes, and nothing is "
            "held",
            style="yellow",
        )
    name = identify(language_model, tokenizer)
    keys = [key_of(row, {**settings, "details": details}, name) for row in rows]
    sink: ResultsFile | RecordStream | TextFile | TextStream | Tables
    if output is None and out.is_terminal and sum(len(r.candidates) for r in rows) <= TABLE_SIZE:
        sink = Tables(out)
    elif kind_out == "jsonl":
        sink = results_sink(output, keys, overwrite)
    elif output is not None and replaceable(output):
        sink = TextFile(output, keys, overwrite)
    else:
        sink = TextStream(output)
    failed: dict[int, str] = {}
    with sink, saying_how_to_resume(output, sink, f"{len(rows)} rows"):
        if sink.done:
            notes.print(f"{len(sink.done)} of {len(rows)} rows are done already", style="dim")
        todo = [number for number in range(len(rows)) if number not in sink.done]
        with patient_progress(notes, len(rows), len(sink.done)) as advance:
            for first in range(0, len(todo), batch_size):
                numbers = todo[first : first + batch_size]
                results = scored(scorer, [rows[number] for number in numbers], details)
                for number, data in zip(numbers, results, strict=True):
                    sink.add(number, data)
                    if "error" in data:
                        failed[number] = data["error"]
                    advance()
    if output is not None:
        say_written(output, notes)
    if stats:
        notes.print(summary(scorer.stats()), style="dim")
    if failed:
        records = isinstance(sink, ResultsFile | RecordStream)
        for number in () if records else sorted(failed):
            notes.print(f"not scored: {failed[number]}", style="yellow", markup=False)
        where = ", see their records" if records else ""
        notes.print(f"{len(failed)} of {len(rows)} rows failed{where}", style="yellow")
        raise typer.Exit(1)


def answered(row: Row, template: Template, tokenizer: Any) -> Row:
    """The row with its context as a user's message, put through the chat template."""
    if row.error is not None:
        return row
    chat = template.asking(row.context)
    try:
        return replace(row, context=chat_text(tokenizer, chat, chat.config))
    except TempoError as error:
        return replace(row, error=str(error))


def scored(scorer: ContinuationScorer, rows: list[Row], details: bool) -> list[dict[str, Any]]:
    """The record of each row; {"error": ...} beside what the row has where it cannot be scored."""
    good = [row for row in rows if row.error is None]
    try:
        records = iter(_records(scorer, good, details))
    except TempoError:
        # One of them at least. Alone, each says for itself whether it is the one.
        records = (_record(scorer, row, details) for row in good)
    return [next(records) if row.error is None else failure(row, row.error) for row in rows]


def _records(scorer: ContinuationScorer, rows: list[Row], details: bool) -> list[dict[str, Any]]:
    contexts, words = [row.context for row in rows], [row.candidates for row in rows]
    if not details:
        scores = scorer.score_continuations(contexts, words)
        return [{**row.given, **ranked(row, own)} for row, own in zip(rows, scores, strict=True)]
    found = scorer.score_details(contexts, words)
    return [
        {
            **row.given,
            **ranked(row, [each.score for each in own]),
            "details": [each.to_dict() for each in own],
        }
        for row, own in zip(rows, found, strict=True)
    ]


def _record(scorer: ContinuationScorer, row: Row, details: bool) -> dict[str, Any]:
    try:
        return _records(scorer, [row], details)[0]
    except TempoError as error:
        message = str(error).replace("candidate_words[0]", "candidates")
        return failure(row, message.replace("contexts[0]", "context"))


def failure(row: Row, why: str) -> dict[str, Any]:
    """The record of a row that cannot be scored."""
    return {**row.given, "error": f"{row.where}: {why}"}


def summary(stats: ScoringStats) -> str:
    """What scoring took, in a line."""
    named = [f"{name.replace('_', ' ')} {value}" for name, value in stats.to_dict().items()]
    return ", ".join(named)


def input_format(file: str, format: str | None) -> str:
    """The format of the input, jsonl or tsv, as the user says or the file's name does.

    Raises:
        ValueError: if neither does.
    """
    if format is None:
        format = "jsonl" if file == "-" else FORMATS.get(Path(file).suffix.lower())
        if format is None:
            raise TempoError(f"{file} must end in {', '.join(FORMATS)}; or give its --format")
    elif format not in FORMATS.values():
        raise TempoError(f"--format must be jsonl or tsv, got {format!r}")
    return format


def output_format(output: Path, kind: str) -> str:
    """The format of the results in a file.

    Raises:
        ValueError: if it is named as text where the input is JSON.
    """
    named = FORMATS.get(output.suffix.lower(), kind)
    if (kind, named) == ("jsonl", "tsv"):
        raise TempoError(f"--output {output} must end in .jsonl, because the input is JSON")
    return named


@contextmanager
def patient_progress(notes: Console, total: int, done: int) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal, for work that takes long; yields what to call for each row."""
    progress = Progress(
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
        console=notes,
        disable=not notes.is_terminal,
    )
    bar = progress.add_task("", total=total, completed=done)
    timer = Timer(PATIENCE, progress.start)
    timer.start()
    try:
        yield lambda: progress.advance(bar)
    finally:
        timer.cancel()
        timer.join()
        if progress.live.is_started:
            progress.stop()
