"""``tempo-mlx rescore``: hypotheses of a decoder, ranked again; and weights for that, tuned."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from typer.core import TyperGroup

from ..arguments import check_count, check_seed, parse_bytes
from ..errors import TempoError
from ..io.console import Console
from ..io.files import STANDARD_INPUT
from ..io.inputs import HYPHEN, PROMPT_BYTES, object_of, read_bytes, read_lines, text_of
from ..io.resumable_jsonl import row_key
from ..scoring import ContinuationScorer
from ..scoring.lattice_files import read_kaldi_lattices, read_openfst, read_slf, read_words
from ..scoring.nbest_files import READERS, Entry
from ..scoring.rescoring import NBest, Weights, rescore
from ..scoring.scorer import CHUNK_SIZE, check_options
from ..scoring.text_scores import check_end
from ..scoring.texts import OWN_START
from ..scoring.tuning import Judged, normalized, tune, word_errors
from ..scoring.word_lattices import paths_of, rescore_in_one_pass
from ..weights import load
from ..weights.fingerprint import identify
from .options import (
    AdapterPath,
    KeepBlanks,
    Model,
    Overwrite,
    Separator,
    StartOfText,
    at_least,
    output_file,
    start_of,
)
from .outputs import (
    Output,
    check_outputs,
    is_standard_output,
    json_where,
    say_written,
    write_json,
)
from .prompts import RESULTS, results_sink, saying_how_to_resume
from .score import patient_progress, summary

#: Version of the records.
SCHEMA = 1

#: Endings of the names of files, and the format of each.
FORMATS = {".jsonl": "jsonl", ".tsv": "tsv", ".txt": "tsv"}

#: Formats of lattices -> what reads them, and whether it takes a symbol table.
LATTICES: dict[str, tuple[Callable[..., Iterator[Entry]], bool]] = {
    "slf": (read_slf, False),
    "kaldi-lattice": (read_kaldi_lattices, True),
    "openfst": (read_openfst, True),
}

#: How the end of a text is asked for.
ENDS: dict[str, bool | str] = {"yes": True, "no": False}


class RunByDefault(TyperGroup):
    """A group whose command "run" may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="rescore",
    cls=RunByDefault,
    help="Rerank the hypotheses of a decoder: n-best lists, lattices, tuning. The word "
    "'run' may be left out: tempo-mlx rescore FILE.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


def register(parent: typer.Typer) -> None:
    parent.add_typer(app)


File = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help='.jsonl, lines such as {"utt": "a", "nbest": [{"text": "he is", "ac": -5.1, '
        '"lm": -3.2}], "context": "how is he"}; .tsv, lines of utt, ac, lm, text, or with a first '
        "line that names the columns; or in another --format. '-' reads standard input.",
    ),
]

Format = Annotated[
    str | None,
    typer.Option(
        metavar="|".join([*READERS, *LATTICES]),
        show_default="by the ending of FILE; jsonl for standard input",
        help="Format of FILE, which is a folder for kaldi and may be one for srilm and lattices.",
    ),
]

Beams = Annotated[
    int | None, typer.Option(help="Lines of an utterance, at least 1, for --format nemo.")
]

Words = Annotated[
    Path | None,
    typer.Option("--words", metavar="FILE", help="Words of the labels of a lattice (words.txt)."),
]

Paths = Annotated[
    int,
    typer.Option(callback=at_least(1), help="Texts of a lattice that are scored, the best ones."),
]

End = Annotated[
    str,
    typer.Option(
        metavar="yes|no|MARKS",
        help="Whether the end of a text counts; marks such as '.?!' may stand before it.",
    ),
]


@app.command("run")
def run(
    file: File,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            parser=output_file,
            help="Write the results here, as JSON lines. A run that was interrupted goes on where "
            "it was.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    format: Format = None,
    beams: Beams = None,
    words: Words = None,
    paths: Paths = 100,
    one_pass: Annotated[
        bool,
        typer.Option(
            "--one-pass",
            help="Score each arc of a lattice once, behind the best text that leads to it: an "
            "approximation for lattices with more paths than can be read.",
        ),
    ] = False,
    model: Model = "smollm2-135m",
    adapter_path: AdapterPath = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights as 'rescore tune' writes them."),
    ] = None,
    acoustic_scale: Annotated[
        float | None, typer.Option(show_default="1", help="Factor on ac.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(show_default="0.5", help="Factor on the new score; lm has what is left of 1."),
    ] = None,
    word_bonus: Annotated[
        float | None, typer.Option(show_default="0", help="Nats for every word.")
    ] = None,
    token_penalty: Annotated[
        float | None,
        typer.Option(show_default="0", help="Nats for every token; a penalty is negative."),
    ] = None,
    end: End = "yes",
    truecase: Annotated[
        str | None,
        typer.Option(metavar="english", help="Give texts the case that they have in print."),
    ] = None,
    start: StartOfText = OWN_START,
    separator: Separator = " ",
    keep_blanks: KeepBlanks = False,
    max_context_tokens: Annotated[
        int | None, typer.Option(help="Keep the last tokens of a context, this many at most.")
    ] = None,
    max_kv_bytes: Annotated[
        str | None, typer.Option(help="Memory for what was read, such as 800MB or 2GiB.")
    ] = None,
    chunk_size: Annotated[int, typer.Option(help="Tokens in one forward pass.")] = CHUNK_SIZE,
    batch_size: Annotated[
        int, typer.Option(callback=at_least(1), help="Lists that are scored at once, at least 1.")
    ] = 64,
    stats: Annotated[
        bool, typer.Option("--stats", help="Say what it took: passes, tokens, memory.")
    ] = False,
) -> None:
    """Rank the hypotheses of each list.

    total = acoustic scale x ac + (1 - alpha) x lm + alpha x new + word bonus x words
    + token penalty x tokens

    A list that cannot be scored becomes a record with its "error"; the others are scored. Exit
    code 1 if one failed.
    """
    check_outputs(
        [Output("--output", output, RESULTS)],
        {"FILE": STANDARD_INPUT if file == HYPHEN else Path(file), "--weights": weights},
        overwrite,
    )
    if is_standard_output(output):
        output = None
    given = {
        "acoustic_scale": acoustic_scale,
        "alpha": alpha,
        "word_bonus": word_bonus,
        "token_penalty": token_penalty,
    }
    chosen = weights_of(weights, given)
    how_it_ends = end_of(end)
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    settings: dict[str, Any] = {
        "truecase": truecase,
        "max_context_tokens": max_context_tokens,
        "separator": separator,
        "keep_blanks": keep_blanks,
    }
    sizes: dict[str, Any] = {
        "max_kv_bytes": parse_bytes(max_kv_bytes) if max_kv_bytes is not None else None,
        "chunk_size": chunk_size,
    }
    check_options(**settings, **sizes)
    settings["start"] = start_of(start)
    entries = read(file, format, beams, words)
    if one_pass and all(entry.lattice is None for entry in entries):
        raise TempoError("--one-pass is for lattices; FILE has none")
    if not one_pass:
        entries = [with_paths(entry, chosen, paths) for entry in entries]
    language_model, tokenizer = load(model, adapter_path=adapter_path)
    scorer = ContinuationScorer(language_model, tokenizer, **settings, **sizes)
    name = identify(language_model, tokenizer)
    options = {**settings, "end": how_it_ends, **chosen.to_dict()}
    if one_pass:
        options["paths"] = paths
    keys = [row_key(SCHEMA, entry.content(), options, name) for entry in entries]
    sink = results_sink(output, keys, overwrite)
    failed = 0
    with sink, saying_how_to_resume(output, sink, f"{len(entries)} lists"):
        if sink.done:
            notes.print(f"{len(sink.done)} of {len(entries)} lists are done already", style="dim")
        todo = [number for number in range(len(entries)) if number not in sink.done]
        with patient_progress(notes, len(entries), len(sink.done)) as advance:
            for first in range(0, len(todo), batch_size):
                numbers = todo[first : first + batch_size]
                part = [entries[number] for number in numbers]
                found = records(scorer, part, chosen, how_it_ends, paths)
                for number, record in zip(numbers, found, strict=True):
                    sink.add(number, record)
                    failed += "error" in record
                    advance()
    if output is not None:
        say_written(output, notes)
    if stats:
        notes.print(summary(scorer.stats()), style="dim")
    if failed:
        notes.print(f"{failed} of {len(entries)} lists failed, see their records", style="yellow")
        raise typer.Exit(1)


@app.command("tune")
def tune_weights(
    file: File,
    references: Annotated[
        Path,
        typer.Option(
            "--references",
            metavar="REF",
            help='What was said: .jsonl, lines such as {"utt": "a", "text": "he is"}; or lines of '
            "utt, tab or blank, text.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the weights here, for 'rescore --weights', and the error rates.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            show_default="utt",
            help='Key of the lists, such as "speaker", that cross-validation does not split.',
        ),
    ] = None,
    as_written: Annotated[
        bool,
        typer.Option("--as-written", help="Compare texts with their case and punctuation."),
    ] = False,
    format: Format = None,
    beams: Beams = None,
    words: Words = None,
    paths: Paths = 100,
    model: Model = "smollm2-135m",
    adapter_path: AdapterPath = None,
    end: End = "yes",
    truecase: Annotated[
        str | None,
        typer.Option(metavar="english", help="Give texts the case that they have in print."),
    ] = None,
    start: StartOfText = OWN_START,
    separator: Separator = " ",
    folds: Annotated[
        int, typer.Option(callback=at_least(2), help="Parts of cross-validation, at least 2.")
    ] = 5,
    restarts: Annotated[
        int, typer.Option(callback=at_least(0), help="Random weights to begin with, at least 0.")
    ] = 10,
    seed: Annotated[int, typer.Option(help="Of folds, restarts and intervals.")] = 0,
) -> None:
    """Find the weights that make the fewest word errors.

    The search along each weight is exact. Error rates of "decoder" and "rescored" are of lists that
    had no part in the choice of their weights. Lists that hold new scores, as rescore writes them,
    are not scored again. Where the new scores do not help, their weight is 0.
    """
    check_outputs(
        [Output("--output", output, json_where(lambda data: "weights" in data))],
        {"FILE": STANDARD_INPUT if file == HYPHEN else Path(file), "--references": references},
        overwrite,
    )
    check_seed(seed)
    how_it_ends = end_of(end)
    settings: dict[str, Any] = {"truecase": truecase, "separator": separator}
    check_options(**settings)
    entries = [with_paths(e, Weights(), paths) for e in read(file, format, beams, words)]
    said = references_of(references)
    lists = [e.nbest for e in entries if e.nbest is not None and e.nbest.utt in said]
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    if len(lists) < len(entries):
        notes.print(
            f"{len(entries) - len(lists)} of {len(entries)} lists are left out: they are no lists, "
            "or have no reference",
            style="yellow",
        )
    features = known_features(lists)
    if features is None:
        scorer = ContinuationScorer(
            *load(model, adapter_path=adapter_path), start=start_of(start), **settings
        )
        features = []
        with patient_progress(notes, len(lists), 0) as advance:
            for each in lists:
                texts = [h.text for h in each.hypotheses]
                scores = scorer.score_texts(texts, each.context, how_it_ends)
                rows = zip(each.hypotheses, scores, strict=True)
                own = [(h.ac, h.lm, s.logprob, s.n_words, s.n_tokens) for h, s in rows]
                features.append(np.array(own, np.float64))
                advance()
    same = str if as_written else normalized
    judged = []
    for each, own_features in zip(lists, features, strict=True):
        reference = same(said[each.utt])
        texts = [same(h.text) for h in each.hypotheses]
        group = each.utt if group_by is None else str(each.given.get(group_by))
        errors = word_errors([reference] * len(texts), texts)
        judged.append(Judged(own_features, errors, len(reference.split()), group))
    found = tune(judged, folds, restarts, seed=seed)
    table = Table("", "WER %", "95 %")
    for name, rate in (
        ("first of each list", found.first),
        ("decoder's scores, cross-validated", found.decoder),
        ("with new scores, cross-validated", found.rescored),
        ("these weights, on the lists they were tuned on", found.tuned),
        ("best of each list (oracle)", found.oracle),
    ):
        table.add_row(name, f"{rate.wer:.2f}", f"{rate.low:.2f} to {rate.high:.2f}")
    out = Console(highlight=False)
    out.print(table)
    table = Table("weight", "value", "95 %")
    for name, value in found.weights.to_dict().items():
        interval = found.intervals.get(name)
        shown = "fixed" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"
        table.add_row(name, f"{value:.4g}", shown)
    out.print(table)
    if not found.helps:
        notes.print(
            "The new scores help no more than chance; alpha is 0. With them, the weights would be "
            + ", ".join(f"{name} {value:.4g}" for name, value in found.with_new.to_dict().items()),
            style="yellow",
        )
    if output is not None:
        write_json(output, {"schema": SCHEMA, "end": how_it_ends, **found.to_dict()})
        say_written(output, notes)


def references_of(file: Path) -> dict[str, str]:
    """Utterance -> what was said.

    Raises:
        TempoError: for a line that is no utterance and text, or one that is there twice.
    """
    found: dict[str, str] = {}
    for number, line in read_lines(str(file)):
        where = f"{file}, line {number}"
        if file.suffix.lower() == ".jsonl":
            data = object_of(line, '{"utt": "a", "text": "he is"}')
            utt, text = data.get("utt"), data.get("text", data.get("ref"))
            if isinstance(utt, bool) or not isinstance(utt, str | int) or not isinstance(text, str):
                raise TempoError(f'{where} must have "utt" and "text"')
            name = str(utt)
        else:
            name, text = re.split(r"[\t ]", text_of(line) + " ", maxsplit=1)
        if name in found:
            raise TempoError(f"{where}: {name} is there twice")
        found[name] = text.strip()
    return found


def known_features(lists: list[NBest]) -> list[np.ndarray] | None:
    """Features of lists as rescore writes them, [n, 5] each; None if they have no new scores."""
    if not all({"new", "tokens"} <= h.given.keys() for each in lists for h in each.hypotheses):
        return None
    return [
        np.array(
            [
                (h.ac, h.lm, h.given["new"], len(h.text.split()), h.given["tokens"])
                for h in each.hypotheses
            ],
            np.float64,
        )
        for each in lists
    ]


def read(
    file: str,
    format: str | None = None,
    beams: int | None = None,
    words: Path | None = None,
) -> list[Entry]:
    """The lists of a file.

    Raises:
        TempoError: if its format is not known, or it cannot be read or has no lists.
    """
    if format is None:
        format = "jsonl" if file == HYPHEN else FORMATS.get(Path(file).suffix.lower())
        if format is None:
            raise TempoError(f"{file} must end in {', '.join(FORMATS)}; or give its --format")
    elif format not in READERS and format not in LATTICES:
        allowed = ", ".join([*READERS, *LATTICES])
        raise TempoError(f"--format must be one of {allowed}, got {format!r}")
    if beams is not None:
        check_count("--beams", beams)
    if (beams is None) == (format == "nemo"):
        raise TempoError("--beams goes with --format nemo, which needs it")
    reader, labelled = LATTICES.get(format) or (READERS[format], False)
    if words is not None and not labelled:
        raise TempoError(f"--words has no effect on --format {format}")
    more: dict[str, Any] = {} if beams is None else {"beams": beams}
    if labelled:
        more["words"] = {} if words is None else read_words(words)
    entries = list(reader(file, **more))
    if not entries:
        raise TempoError(f"{file} has no lists")
    return entries


def with_paths(entry: Entry, weights: Weights, n: int) -> Entry:
    """The best texts of a lattice in place of the lattice."""
    if entry.lattice is None:
        return entry
    return replace(entry, nbest=paths_of(entry.utt, entry.lattice, weights, n), lattice=None)


def weights_of(file: Path | None, given: dict[str, float | None]) -> Weights:
    """The weights of a file, those that are given by themselves instead.

    Raises:
        TempoError: for a file that does not hold weights, or a weight out of range.
    """
    found: dict[str, Any] = {}
    if file is not None:
        data = object_of(read_bytes(file, PROMPT_BYTES), json.dumps(Weights().to_dict()))
        found = data.get("weights", data)
        if not isinstance(found, dict) or not found or not found.keys() <= given.keys():
            raise TempoError(f"{file} must have weights named {', '.join(given)}")
    return Weights(**{**found, **{k: v for k, v in given.items() if v is not None}})


def end_of(given: str) -> bool | str:
    """How a text ends, as a user says it."""
    end = ENDS.get(given, given)
    check_end(end)
    return end


def records(
    scorer: ContinuationScorer,
    entries: list[Entry],
    weights: Weights,
    end: bool | str,
    paths: int = 100,
) -> list[dict[str, Any]]:
    """The record of each list; {"error": ...} beside what was given where it cannot be scored.

    Args:
        paths: texts of a lattice that is read in one pass.
    """
    lists = [entry.nbest for entry in entries if entry.nbest is not None]
    try:
        found = iter([each.to_dict() for each in rescore(scorer, lists, weights, end)])
    except TempoError:
        # One of them at least. Alone, each says for itself whether it is the one.
        return [_record(scorer, entry, weights, end, paths) for entry in entries]
    return [
        next(found) if entry.nbest is not None else _record(scorer, entry, weights, end, paths)
        for entry in entries
    ]


def _record(
    scorer: ContinuationScorer, entry: Entry, weights: Weights, end: bool | str, paths: int
) -> dict[str, Any]:
    try:
        if entry.nbest is not None:
            return rescore(scorer, [entry.nbest], weights, end)[0].to_dict()
        if entry.lattice is not None:
            found = rescore_in_one_pass(scorer, entry.utt, entry.lattice, weights, paths, end)
            return found.to_dict()
        return failure(entry, entry.error)
    except TempoError as error:
        return failure(entry, str(error).replace("texts[", "nbest["))


def failure(entry: Entry, why: str | None) -> dict[str, Any]:
    """The record of a list that cannot be scored."""
    given: dict[str, Any] = dict(entry.given or {})
    if entry.nbest is not None:
        given = {**entry.nbest.given, "utt": entry.nbest.utt}
    kept = {name: given[name] for name in given if name not in ("row", "key")}
    return {**kept, "error": f"{entry.where}: {why}"}
