"""``tempo-mlx generate --prompts-file``: many prompts in one batch, one result for each line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..decode.prompt_cache import JoinedPrompt, PromptCache
from ..decode.prompt_files import PromptRow, row_settings
from ..decode.result import SCHEMA, GenerationResult
from ..decode.scheduler import BatchStatus
from ..errors import Interrupted, TempoError
from ..generation import Failure, stream_batch_generate
from ..io.console import Console
from ..io.files import Stream, replaceable
from ..io.resumable_jsonl import ResultsFile, row_key
from ..models import PositionedModel
from ..settings import Settings
from ..text.chat import Chat
from ..text.printable import finite, json_text
from ..text.vocabulary import is_chat
from ..weights.fingerprint import identify
from .chat_template import Template
from .outputs import beginning

#: Recognises files that :class:`ResultsFile` continues or refuses with a reason.
RESULTS = beginning(b'{"row": ')


@dataclass(frozen=True)
class Job:
    """A row of the file that can be run.

    Args:
        number: of the row.
        prompt: as passed to the model.
        settings: of the row.
        joined: the prompt joined to the prompt cache, if there is one.
    """

    number: int
    prompt: Any
    settings: Settings
    joined: JoinedPrompt | None


def runnable(rows: list[PromptRow], defaults: Settings) -> list[Settings]:
    """The settings of the rows that can be run."""
    return [settings for _, settings in _runnable(rows, defaults)]


def notes_on(rows: list[PromptRow], defaults: Settings) -> list[str]:
    """Notes on settings: those that apply to all rows, and those of some rows only."""
    found: dict[str, list[PromptRow]] = {}
    common: list[set[str]] = []
    for row, settings in _runnable(rows, defaults):
        common.append(set(settings.notes(defaults.changed())))
        for note in settings.notes(row.own_settings()):
            found.setdefault(note, []).append(row)
    shared = sorted(set.intersection(*common)) if common else []
    for note, given in found.items():
        others = f" and {len(given) - 1} more" if len(given) > 1 else ""
        shared.append(f"{given[0].path}, line {given[0].line}{others}: {note}")
    return shared


def _runnable(rows: list[PromptRow], defaults: Settings) -> Iterator[tuple[PromptRow, Settings]]:
    for row in rows:
        with suppress(TempoError):
            yield row, row_settings(row, defaults)


def generate_from_file(
    rows: list[PromptRow],
    defaults: Settings,
    model: Any,
    tokenizer: Any,
    notes: Console,
    output: Path | None,
    template: Template | None = None,
    paths: int = 1,
    verify: bool = False,
    batch_size: int = 32,
    max_kv_bytes: int | None = None,
    prompt_cache: PromptCache | None = None,
    overwrite: bool = False,
) -> int:
    """Generate from every row that is not in the output yet, and retry failed rows.

    Returns:
        how many rows failed.
    """
    positioned = PositionedModel.of(model)
    failed: dict[int, str] = {}
    jobs: dict[int, Job] = {}
    for number, row in enumerate(rows):
        prompt: Any = row.prompt
        if template is not None and isinstance(prompt, str):
            prompt = template.asking(prompt)
        elif template is not None and is_chat(prompt):
            prompt = Chat(prompt, template.config)
        try:
            settings = row_settings(row, defaults)
        except TempoError as error:
            failed[number] = str(error)  # with file and line
            continue
        joined = None
        try:
            if prompt_cache is not None:
                joined = prompt_cache.join(positioned, tokenizer, prompt)
        except TempoError as error:
            failed[number] = row.told(error)
            continue
        jobs[number] = Job(number, prompt, settings, joined)
    common = [identify(positioned.model, tokenizer), max(1, paths), verify]
    keys = [key_of(rows[i], jobs.get(i), common) for i in range(len(rows))]
    with (
        results_sink(output, keys, overwrite) as sink,
        saying_how_to_resume(output, sink, f"{len(rows)} prompts"),
    ):
        if sink.done:
            notes.print(f"{len(sink.done)} of {len(rows)} prompts are done already", style="dim")
        for number, why in failed.items():
            sink.add(number, record(rows[number], Failure(rows[number].prompt or "", why)))
        todo = [job for number, job in jobs.items() if number not in sink.done]
        failures = len(failed)
        joins = [job.joined for job in todo if job.joined is not None]
        if prompt_cache is not None and joins:
            notes.print(join_note(prompt_cache, joins), style="dim")
        with _progress(notes) as progress:
            before = len(rows) - len(todo)
            bar = progress.add_task("", total=len(rows), completed=before, told="")

            def tell(status: BatchStatus) -> None:
                progress.update(bar, completed=before + status.done, told=summary(status))

            outcomes = stream_batch_generate(
                positioned,
                tokenizer,
                [job.prompt for job in todo],
                [job.settings for job in todo],
                batch_size=batch_size,
                max_kv_bytes=max_kv_bytes,
                prompt_cache=prompt_cache,
                paths=max(1, paths),
                verify=verify,
                progress=tell,
            )
            for i, outcome in outcomes:
                number = todo[i].number
                if isinstance(outcome, Failure):
                    failures += 1
                    outcome = replace(outcome, error=rows[number].told(outcome.error))
                sink.add(number, record(rows[number], outcome, max(1, paths)))
    return failures


def key_of(row: PromptRow, job: Job | None, common: Sequence[Any]) -> str:
    """The key that identifies a row's result.

    Args:
        row: of the file.
        job: for the row; None if the row cannot be run.
        common: everything else that determines the results of all rows.
    """
    if job is None:
        return row_key(SCHEMA, row.id, row.prompt, row.error, *common)
    prompt: Any = job.prompt
    if job.joined is not None and job.joined.appended:
        prompt = [job.joined.tokens, job.joined.text]
    if isinstance(prompt, Chat) and prompt.config:
        prompt = [*prompt, prompt.config]
    return row_key(SCHEMA, row.id, prompt, job.settings.identity(), *common)


def join_note(cache: PromptCache, joined: Sequence[JoinedPrompt]) -> str:
    """One line on how prompts, at least one, use a prompt cache."""
    n = len(cache.tokens)
    appended = sum(prompt.appended for prompt in joined)
    if len(joined) == 1 and appended:
        return f"prompt cache: the prompt is appended to its {n} tokens"
    if len(joined) == 1:
        known = cache.covers(joined[0].tokens)
        return f"prompt cache: the prompt begins with its text; {known} of its {n} tokens are used"
    return (
        f"prompt cache: {len(joined) - appended} of {len(joined)} prompts begin with its text, "
        f"{appended} are appended to its {n} tokens"
    )


def record(row: PromptRow, outcome: GenerationResult | Failure, paths: int = 1) -> dict[str, Any]:
    """The line of a result, or of a failure that names file and line."""
    named = {} if row.id is None else {"id": row.id}
    if isinstance(outcome, GenerationResult):
        return {**named, **outcome.to_dict(paths)}
    return {**named, **outcome.to_dict()}


def summary(status: BatchStatus) -> str:
    """One line on the speed and memory of a batch."""
    seconds = status.seconds or 1.0
    parts = [
        f"{status.running} running",
        f"{status.passes / seconds:.1f} steps/s",
        f"{status.tokens / seconds:.1f} tokens/s",
        f"cache {status.cache_bytes / 1e6:.0f} MB",
    ]
    if status.waiting_for_memory:
        parts.append(f"{status.waiting} wait for memory")
    if status.failed:
        parts.append(f"{status.failed} failed")
    return ", ".join(parts)


def results_sink(
    output: Path | None, keys: list[str], overwrite: bool
) -> "ResultsFile | RecordStream":
    """Where to write the records of rows: a resumable file if possible, otherwise a stream.

    Args:
        output: None for standard output.
        keys, overwrite: as for :class:`ResultsFile`.
    """
    if output is not None and replaceable(output):
        return ResultsFile(output, keys, overwrite)
    return RecordStream(output)


class HasDone(Protocol):
    """What takes records, and knows of which rows it has them."""

    @property
    def done(self) -> set[int]:
        """Numbers of the rows."""


@contextmanager
def saying_how_to_resume(output: Path | None, sink: HasDone, total: str) -> Iterator[None]:
    """While this is open, Ctrl-C ends in a line that says what is saved and how to go on.

    Args:
        output: None for standard output, of which nothing is saved.
        sink: takes the records.
        total: all that there are, such as "12 prompts".
    """
    try:
        yield
    except KeyboardInterrupt:
        if output is None or not replaceable(output):
            raise
        raise Interrupted(
            f"interrupted: {len(sink.done)} of {total} are done and saved; rerun the same command "
            "to go on"
        ) from None


class RecordStream(Stream):
    """Prints records as rows finish, each with the number of its row."""

    def __init__(self, path: Path | None = None):
        super().__init__(path)
        self.done: set[int] = set()

    def add(self, row: int, data: dict[str, Any]) -> None:
        self.write(json_text(finite({"row": row, **data})) + "\n")


def _progress(notes: Console) -> Progress:
    return Progress(
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("prompts, {task.fields[told]}"),
        TimeRemainingColumn(),
        console=notes,
        disable=not notes.is_terminal,
    )
