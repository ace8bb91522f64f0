"""Files of word lattices: HTK's standard lattice format, Kaldi's text archives, OpenFst's."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TempoError
from .nbest_files import Entry, files_of, spoken, unpacked, utterance
from .rescoring import FEATURES
from .word_lattices import Arc, WordLattice

MISSING = "OpenFst's lattices need the kaldifst package: pip install 'tempo-mlx[lattices]'"

#: A field of HTK's format; a value with blanks stands in quotes.
FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)')

#: Long names of the fields that are read -> their short ones.
SHORT = {"NODES": "N", "LINKS": "L", "WORD": "W", "START": "S", "END": "E"}
SHORT |= {"acoustic": "a", "language": "l"}


def read_slf(file: str) -> Iterator[Entry]:
    """HTK's lattices: a file each, which is named after its utterance, or a folder of them."""
    for path in files_of(file):
        try:
            yield Entry(str(path), utt=utterance(path), lattice=slf_lattice(unpacked(path)))
        except TempoError as error:
            yield Entry(str(path), error=str(error), given={"utt": utterance(path)})


def slf_lattice(text: str) -> WordLattice:
    """A lattice in HTK's standard lattice format, words on its nodes or links.

    A word of a node belongs to the links that lead to it. Scores are nats, or of the header's
    ``base``; ``acscale`` and ``lmscale`` are not applied.

    Raises:
        TempoError: for a text that is no such lattice.
    """
    header: dict[str, str] = {}
    nodes: dict[int, str] = {}
    links: list[dict[str, str]] = []
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        fields = {SHORT.get(key, key): _unquoted(value) for key, value in FIELD.findall(line)}
        if "I" in fields:
            nodes[_integer(fields["I"])] = fields.get("W", "")
        elif "J" in fields:
            links.append(fields)
        else:
            header |= fields
    if not nodes:
        raise TempoError("no nodes (I=0 ...): this is not HTK's standard lattice format")
    nats = _nats(header.get("base", "e"))
    arcs = []
    for fields in links:
        if "S" not in fields or "E" not in fields:
            raise TempoError(f"link {fields['J']} has no S= or no E=")
        source, target = _integer(fields["S"]), _integer(fields["E"])
        for state in (source, target):
            if state not in nodes:
                raise TempoError(f"link {fields['J']} names node {state}, which is not there")
        word = spoken([fields.get("W") or nodes[target]])
        ac, lm = (nats(fields[name]) if name in fields else 0.0 for name in ("a", "l"))
        arcs.append(_arc(source, target, word, ac, lm))
    sources, targets = {arc.source for arc in arcs}, {arc.target for arc in arcs}
    start = _only("start", header, sorted(set(nodes) - targets))
    end = _only("end", header, sorted(set(nodes) - sources))
    first = spoken([nodes[start]])
    if first and not any("W" in fields for fields in links):
        before = min(nodes) - 1
        arcs.append(_arc(before, start, first, 0.0, 0.0))
        start = before
    return WordLattice(start, arcs, {end: np.zeros(len(FEATURES))})


def read_kaldi_lattices(file: str, words: dict[int, str]) -> Iterator[Entry]:
    """A text archive of Kaldi's lattices, compact or not, as ``lattice-copy ark:- ark,t:-`` writes.

    Args:
        file: its name.
        words: of the labels; where it is empty, labels are words.
    """
    for block in re.split(r"\n[ \t]*\n", unpacked(Path(file))):
        head, *rows = [line.split() for line in block.splitlines() if line.strip()] or [[]]
        if head:
            yield _kaldi_entry(f"{file}, {head[0]}", head[0], rows, words)


def _kaldi_entry(where: str, utt: str, rows: list[list[str]], words: dict[int, str]) -> Entry:
    try:
        arcs, ends = [], {}
        for cells in rows:
            if len(cells) in (1, 2):
                costs = _costs(cells[1]) if len(cells) == 2 else (0.0, 0.0)
                ends[_integer(cells[0])] = _features(-costs[1], -costs[0])
                continue
            # source, target, label, weight; or source, target, two labels, weight
            weighted = "," in cells[-1]
            labels = cells[2:-1] if weighted else cells[2:]
            graph, acoustic = _costs(cells[-1]) if weighted else (0.0, 0.0)
            word = _word(labels[-1], words)
            arcs.append(_arc(_integer(cells[0]), _integer(cells[1]), word, -acoustic, -graph))
        if not rows:
            raise TempoError("no arcs")
        return Entry(where, utt=utt, lattice=WordLattice(_integer(rows[0][0]), arcs, ends))
    except TempoError as error:
        return Entry(where, error=str(error), given={"utt": utt})


def _costs(text: str) -> tuple[float, float]:
    """Graph cost and acoustic cost of a weight; a compact one has states, too."""
    parts = text.split(",")
    if len(parts) < 2:
        raise TempoError(f"a weight must be graph cost, acoustic cost; got {text!r}")
    return _real(parts[0]), _real(parts[1])


def read_openfst(file: str, words: dict[int, str]) -> Iterator[Entry]:
    """OpenFst's binary files: standard arcs, or Kaldi's lattices; one each, or a folder of them.

    Of standard arcs, the weight is all there is: it counts as acoustic.

    Args:
        file: its name.
        words: of the output labels; where it is empty, the file's own symbols.
    """
    try:
        import kaldifst
    except ModuleNotFoundError as error:
        raise TempoError(MISSING) from error
    for path in files_of(file):
        try:
            yield Entry(str(path), utt=utterance(path), lattice=_openfst(kaldifst, path, words))
        except TempoError as error:
            yield Entry(str(path), error=str(error), given={"utt": utterance(path)})


def _openfst(kaldifst: Any, path: Path, words: dict[int, str]) -> WordLattice:
    kind = re.search(rb"(lattice4|standard)", path.read_bytes()[:256])
    if kind is None:
        raise TempoError("not an OpenFst file with arcs of type standard or lattice4")
    standard = kind[1] == b"standard"
    fst = (kaldifst.StdVectorFst if standard else kaldifst.Lattice).read(str(path))
    if fst is None or fst.start < 0:
        raise TempoError("not an FST that can be read, or an empty one")
    symbols = fst.output_symbols
    if not words and symbols is not None:
        keys = map(symbols.get_nth_key, range(symbols.num_symbols()))
        words = {key: symbols.find(key) for key in keys}

    def features(weight: Any) -> tuple[float, float]:
        return (-weight.value, 0.0) if standard else (-weight.value2, -weight.value1)

    # Written as text, costs would lose digits; and there is no public iterator of a lattice's arcs.
    iterate = kaldifst.ArcIterator if standard else _lattice_arcs
    arcs, ends = [], {}
    for state in range(fst.num_states):
        final = features(fst.final(state))
        if all(map(math.isfinite, final)):
            ends[state] = _features(*final)
        for arc in iterate(fst, state):
            word = _word(str(arc.olabel), words)
            arcs.append(_arc(state, arc.nextstate, word, *features(arc.weight)))
    return WordLattice(fst.start, arcs, ends)


def _lattice_arcs(fst: Any, state: int) -> Iterator[Any]:
    """The arcs that leave a state of a kaldifst.Lattice."""
    from kaldifst.lib import _kaldifst

    arcs = _kaldifst._ArcIteratorLattice(fst, state)
    while not arcs.done:
        yield arcs.value
        arcs.next()


def read_words(file: Path) -> dict[int, str]:
    """A symbol table in text, lines of word and number; TempoError if it is not one."""
    table = {}
    for number, line in enumerate(unpacked(file).splitlines(), 1):
        cells = line.split()
        if len(cells) != 2:
            raise TempoError(f"{file}, line {number} must be a word and its number")
        table[_integer(cells[1])] = cells[0]
    return table


def _word(label: str, words: dict[int, str]) -> str:
    if label in ("0", "<eps>"):
        return ""
    if not words:
        return spoken([label])
    number = _integer(label)
    if number not in words:
        raise TempoError(f"label {number} is not in the symbol table")
    return spoken([words[number]])


def _arc(source: int, target: int, word: str, ac: float, lm: float) -> Arc:
    return Arc(source, target, word, _features(ac, lm, len(word.split())))


def _features(ac: float, lm: float, words: int = 0) -> np.ndarray:
    """What is known before a language model has read a word, [5]."""
    found = {"ac": ac, "lm": lm, "words": words}
    return np.array([found.get(name, 0.0) for name in FEATURES], np.float64)


def _only(name: str, header: dict[str, str], states: list[int]) -> int:
    """The state that a header names, or the only one there is."""
    if name in header:
        return _integer(header[name])
    if len(states) != 1:
        raise TempoError(
            f"the lattice has {len(states)} {name} nodes, and its header has no {name}="
        )
    return states[0]


def _nats(base: str) -> Any:
    """What makes nats of a score in this base; 0 means that scores are probabilities."""
    value = math.e if base == "e" else _real(base)
    if value == 0:
        return lambda text: math.log(max(_real(text), 5e-324))
    if value < 0 or value == 1:
        raise TempoError(f"base must be 0 or a base of logarithms, got {base}")
    return lambda text: _real(text) * math.log(value)


def _unquoted(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value[1:-1] if value[:1] == '"' else value)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise TempoError(f"{text!r} is not a number of a state or label") from error


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise TempoError(f"{text!r} is not a number") from error
