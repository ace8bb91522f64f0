"""Files of n-best lists: JSON lines, tables, SRILM's, Kaldi's and NeMo's."""

import gzip
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import TempoError
from ..io.inputs import name_of, object_of, read_lines, text_of
from .rescoring import Hypothesis, NBest, nbest_of
from .word_lattices import WordLattice

EXAMPLE = '{"utt": "a", "nbest": [{"text": "he is", "ac": -5.1, "lm": -3.2}]}'

#: Nats of a unit of SRILM's scores: logarithms to base 10, and Decipher's bytelogs.
BASE_10 = math.log(10)
BYTELOG = 1024 / 10000.5

#: What stands for no word in the output of decoders, beside <sil>, [NOISE] and ++UM++.
NO_WORDS = {"!NULL", "!SENT_START", "!SENT_END", "!ENTER", "!EXIT", "SIL", "sil", "-pau-", "#0"}
NOISE = re.compile(r"\+\+.+\+\+|\[.+\]|<(?!unk>).+>", re.IGNORECASE)

#: Columns of a table that has no header, by their number.
COLUMNS = {
    2: ("utt", "text"),
    3: ("utt", "ac", "text"),
    4: ("utt", "ac", "lm", "text"),
}

#: Files of a folder of Kaldi's n-best lists: texts, and costs, by what each may be called.
KALDI_TEXTS = ("words_text", "text")
KALDI_COSTS = {"ac": ("acwt", "ac_cost"), "lm": ("lmwt.withlm", "lmwt", "lm_cost")}


@dataclass(frozen=True)
class Entry:
    """A list or a lattice of a file, or why there is none.

    Args:
        where: file and line, for messages.
        nbest: the list.
        error: why there is none.
        given: all that its row has, to be kept where there is an error.
        utt, lattice: name and lattice of an utterance, in place of a list.
    """

    where: str
    nbest: NBest | None = None
    error: str | None = None
    given: dict[str, Any] | None = None
    utt: str = ""
    lattice: WordLattice | None = None

    def content(self) -> list[Any]:
        """What decides the result, JSON-ready."""
        nbest = None if self.nbest is None else asdict(self.nbest)
        lattice = None if self.lattice is None else self.lattice.content()
        return [nbest, self.error, self.given, self.utt, lattice]


def spoken(words: list[str]) -> str:
    """The words that are no fillers, with blanks between them."""
    return " ".join(word for word in words if word not in NO_WORDS and not NOISE.fullmatch(word))


def read_jsonl(file: str) -> Iterator[Entry]:
    """JSON lines, a list each; see :func:`.rescoring.nbest_of`."""
    for number, line in read_lines(file):
        where = f"{name_of(file)}, line {number}"
        given: dict[str, Any] = {}
        try:
            given = object_of(line, EXAMPLE)
            yield Entry(where, nbest_of(given, str(number)))
        except TempoError as error:
            yield Entry(where, error=str(error), given=given)


def read_tsv(file: str) -> Iterator[Entry]:
    """Lines of columns between tabs: what a first line names, or utt [ac [lm]] text.

    The lines of one utterance are its list, wherever they stand.
    """
    header: tuple[str, ...] | None = None
    lists: dict[str, tuple[str, list[Hypothesis], str]] = {}
    for i, (number, line) in enumerate(read_lines(file)):
        where = f"{name_of(file)}, line {number}"
        try:
            cells = text_of(line).split("\t")
            if i == 0 and {"utt", "text"} <= set(cells):
                header = tuple(cells)
                continue
            names = header or COLUMNS.get(len(cells))
            if names is None or len(names) != len(cells):
                wanted = ", ".join(header) if header else "utt, [ac, [lm,]] text"
                raise TempoError(f"must have the columns {wanted}, got {len(cells)} of them")
            row = dict(zip(names, cells, strict=True))
            scores = {name: _number(row.get(name, "0")) for name in ("ac", "lm")}
        except TempoError as error:
            yield Entry(where, error=str(error), given={})
            continue
        other = {key: row[key] for key in row if key not in ("utt", "context", "text", "ac", "lm")}
        own = lists.setdefault(row["utt"], (where, [], row.get("context", "")))
        own[1].append(Hypothesis(row["text"], scores["ac"], scores["lm"], other))
    for utt, (where, hypotheses, context) in lists.items():
        yield Entry(where, NBest(utt, hypotheses, context))


def read_srilm(file: str) -> Iterator[Entry]:
    """SRILM's lists: a file each, which is named after its utterance, or a folder of them.

    Lines of ac, lm, number of words and the words, in logarithms to base 10; or NBestList1.0 and
    2.0 in bytelogs. Files may be compressed (.gz).
    """
    for path in files_of(file):
        try:
            lines = unpacked(path).splitlines()
            kind = lines[0].split()[0] if lines and lines[0].startswith("NBestList") else ""
            if kind not in ("", "NBestList1.0", "NBestList2.0"):
                raise TempoError(f"{kind} is not read; NBestList1.0 and NBestList2.0 are")
            parse = _srilm_line if not kind else _decipher_line
            hypotheses = [parse(line) for line in lines[bool(kind) :] if line.strip()]
            if not hypotheses:
                raise TempoError("no hypotheses")
            yield Entry(str(path), NBest(utterance(path), hypotheses))
        except TempoError as error:
            yield Entry(str(path), error=str(error), given={"utt": utterance(path)})


def _srilm_line(line: str) -> Hypothesis:
    cells = line.split()
    if len(cells) < 3:
        raise TempoError(f"a line must be ac, lm, number of words, words; got {line[:40]!r}")
    ac, lm, _ = map(_number, cells[:3])
    return Hypothesis(spoken(cells[3:]), ac * BASE_10, lm * BASE_10)


def _decipher_line(line: str) -> Hypothesis:
    match = re.match(r"\s*\(([^)]*)\)(.*)", line)
    if match is None:
        raise TempoError(f"a line must be a score in parentheses and words; got {line[:40]!r}")
    total, rest = _number(match[1]), match[2]
    timed = re.findall(r"(\S+) \( st: \S+ et: \S+ g: (\S+) a: (\S+) \)", rest)
    if not timed:
        return Hypothesis(spoken(rest.split()), total * BYTELOG)
    words, lm, ac = zip(*timed, strict=True)
    sums = (sum(map(_number, each)) * BYTELOG for each in (ac, lm))
    return Hypothesis(spoken(list(words)), next(sums), next(sums))


def read_kaldi(file: str) -> Iterator[Entry]:
    """A folder with texts (words_text or text) and costs (acwt or ac_cost; lmwt or lm_cost).

    Each line begins with the utterance's name, a hyphen and the number of the hypothesis, as
    nbest-to-linear writes it.
    """
    folder = Path(file)
    texts = _kaldi_table(folder, KALDI_TEXTS)
    costs = {name: _kaldi_table(folder, files) for name, files in KALDI_COSTS.items()}
    lists: dict[str, list[Hypothesis]] = {}
    for key, text in texts.items():
        scores = {
            name: -_number(table[key][0]) if table.get(key) else 0.0
            for name, table in costs.items()
        }
        lists.setdefault(key.rpartition("-")[0] or key, []).append(
            Hypothesis(spoken(text), scores["ac"], scores["lm"])
        )
    for utt, hypotheses in lists.items():
        yield Entry(f"{folder}, {utt}", NBest(utt, hypotheses))


def _kaldi_table(folder: Path, names: tuple[str, ...]) -> dict[str, list[str]]:
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        if names == KALDI_TEXTS:
            raise TempoError(f"{folder} has no file {' or '.join(names)}")
        return {}
    rows = [line.split() for line in unpacked(path).splitlines() if line.strip()]
    return {row[0]: row[1:] for row in rows}


def read_nemo(file: str, beams: int) -> Iterator[Entry]:
    """NeMo's beams: lines of text, tab, score; a fixed number of them an utterance.

    Args:
        file: its name.
        beams: of an utterance.
    """
    # An empty text is a hypothesis, too.
    lines = read_lines(file)
    if len(lines) % beams:
        raise TempoError(
            f"{name_of(file)} has {len(lines)} lines, not a multiple of --beams {beams}"
        )
    for first in range(0, len(lines), beams):
        part = lines[first : first + beams]
        where = f"{name_of(file)}, lines {part[0][0]} to {part[-1][0]}"
        try:
            hypotheses = []
            for _, line in part:
                text, tab, score = text_of(line).rpartition("\t")
                if not tab:
                    raise TempoError("must be text, tab, score")
                hypotheses.append(Hypothesis(text.strip(), _number(score)))
            yield Entry(where, NBest(str(first // beams), hypotheses))
        except TempoError as error:
            yield Entry(where, error=str(error), given={"utt": str(first // beams)})


#: Format -> what reads it.
READERS: dict[str, Callable[..., Iterator[Entry]]] = {
    "jsonl": read_jsonl,
    "tsv": read_tsv,
    "srilm": read_srilm,
    "kaldi": read_kaldi,
    "nemo": read_nemo,
}


def files_of(file: str) -> list[Path]:
    """A file, or those of a folder in the order of their names."""
    path = Path(file)
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.iterdir() if each.is_file() and each.name[0] != ".")
    if not found:
        raise TempoError(f"{path} has no files")
    return found


def utterance(path: Path) -> str:
    """The name of the utterance that a file is named after."""
    return path.name.removesuffix(".gz").partition(".")[0]


def unpacked(path: Path) -> str:
    """The text of a file, compressed or not; TempoError if it cannot be read."""
    try:
        data = path.read_bytes()
        return text_of(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (OSError, EOFError) as error:
        raise TempoError(f"{path} cannot be read: {error}") from error


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise TempoError(f"{text!r} is not a number") from error
    if not math.isfinite(value):
        raise TempoError(f"the score {text} is not finite")
    return value
