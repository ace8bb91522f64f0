"""Results are stored as they finish and survive whatever kills the run, however often."""

import contextlib
import errno
import fcntl
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from tempo_mlx.io import files
from tempo_mlx.io import resumable_jsonl as results_file
from tempo_mlx.io.resumable_jsonl import ResultsFile, row_key

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

N = 5
KEYS = ["a", "b", "a", "ç", "e"]
orders = st.permutations(range(N))


def record(row):
    # Lengths differ, so that a line of one row never fits the place of another.
    return {"text": "ü\n\u2028" * row, "n": row}


def written(order):
    """The bytes of the output after these rows, spelled out."""
    return "".join(map(line, order)).encode()


def line(row):
    text = "ü\\n\\u2028" * row
    return f'{{"row": {row}, "key": "{KEYS[row]}", "text": "{text}", "n": {row}}}\n'


def pending(path):
    return path.with_name(f".{path.name}.pending")


def rows_in(path):
    """Rows of a file of whole lines, in its order."""
    data = path.read_bytes()
    assert data[-1:] in (b"", b"\n")
    return [json.loads(line)["row"] for line in data.splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


@contextlib.contextmanager
def new_path():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "out.jsonl"


class Killed(BaseException):
    """In place of a death: nothing reaches the disk from here on."""


class DyingDisk:
    """os, until so many bytes and calls that change a file are spent; then every one of them dies.

    Args:
        budget: bytes written, plus one for each other call.
    """

    def __init__(self, budget):
        self.left = budget

    def __getattr__(self, name):
        return getattr(os, name)

    def pwrite(self, fd, data, offset):
        # In pieces, as the system may write them.
        piece = data[: min(7, self.left)]
        if not piece:
            raise Killed
        self.left -= len(piece)
        return os.pwrite(fd, piece, offset)

    def _counted(self, call, *arguments):
        if self.left <= 0:
            raise Killed
        self.left -= 1
        return call(*arguments)

    def ftruncate(self, fd, size):
        return self._counted(os.ftruncate, fd, size)

    def replace(self, old, new):
        return self._counted(os.replace, old, new)

    def fsync(self, fd):
        return self._counted(lambda fd: None, fd)


def dying_disk(budget):
    """The disk of both modules that write."""
    stack, disk = contextlib.ExitStack(), DyingDisk(budget)
    for module in (results_file, files):
        stack.enter_context(mock.patch.object(module, "os", disk))
    return stack


@settings(max_examples=60)
@given(orders)
def test_lines_come_in_order_of_completion_with_their_row(order):
    with new_path() as path:
        with ResultsFile(path, KEYS) as results:
            for count, row in enumerate(order, 1):
                results.add(row, record(row))
                assert results.done == set(order[:count])
                assert path.read_bytes() == written(order[:count])
        assert rows_in(path) == order
        assert os.listdir(path.parent) == [path.name]


@settings(max_examples=150)
@given(orders, st.lists(st.integers(0, 350), max_size=8))
def test_a_kill_at_any_byte_loses_no_row_that_was_stored(order, budgets):
    with new_path() as path:
        stored = []
        for budget in [*budgets, 10**6]:
            results = None
            with dying_disk(budget), contextlib.suppress(Killed):
                results = ResultsFile(path, KEYS)
                assert set(stored) <= results.done
                # A line may be whole before the kill that nobody was told of.
                stored = rows_in(path)
                for row in order:
                    if row not in results.done:
                        results.add(row, record(row))
                        stored.append(row)
            if results is not None:
                results.close()
            assert path.read_bytes().startswith(written(stored))
        assert path.read_bytes() == written(stored) and set(stored) == set(range(N))
        assert os.listdir(path.parent) == [path.name]


@settings(max_examples=150)
@given(orders, st.integers(0, N), st.data())
def test_whole_lines_survive_a_cut_at_any_byte(order, n, data):
    with new_path() as path:
        with ResultsFile(path, KEYS) as results:
            for row in order[:n]:
                results.add(row, record(row))
        kept = path.read_bytes()
        kept = kept[: data.draw(st.integers(0, len(kept)))]
        os.truncate(path, len(kept))
        whole = kept.count(b"\n")
        with ResultsFile(path, KEYS) as results:
            assert results.done == set(order[:whole])
            assert path.read_bytes() == written(order[:whole])
            for row in reversed(range(N)):
                if row not in results.done:
                    results.add(row, record(row))
        assert rows_in(path)[:whole] == order[:whole] and set(rows_in(path)) == set(range(N))
        assert os.listdir(path.parent) == [path.name]


# The package's own __init__, which imports mlx and takes seconds, is left out.
WORKER = """
import importlib, sys, types
package = types.ModuleType("tempo_mlx")
package.__path__ = [sys.argv[1]]
sys.modules["tempo_mlx"] = package
module = importlib.import_module("tempo_mlx.io.resumable_jsonl")
from pathlib import Path
n = int(sys.argv[3])
with module.ResultsFile(Path(sys.argv[2]), [str(row) for row in range(n)]) as results:
    print("open", flush=True)
    for row in sorted(range(n), key=lambda row: (row % 7, row)):
        if row not in results.done:
            results.add(row, {"text": str(row) * 40_000})
            print(row, flush=True)
            # It goes on when it is told to.
            sys.stdin.readline()
"""


def worker(path, n):
    package = os.path.dirname(importlib.util.find_spec("tempo_mlx").origin)
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(package), str(path), str(n)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_sigkill_loses_no_row_that_was_stored(path):
    n, told, kills = 40, set(), 0
    keys = [str(row) for row in range(n)]
    for wanted in itertools.count(4):
        with worker(path, n) as process:
            assert process.stdout.readline() == "open\n"
            for line in itertools.islice(iter(process.stdout.readline, ""), wanted):
                told.add(int(line))
                process.stdin.write("go on\n")
                process.stdin.flush()
            # In the middle of the next row, or after it.
            process.kill()
            told |= {int(line) for line in process.stdout.read().splitlines()}
        kills += process.returncode == -signal.SIGKILL
        with ResultsFile(path, keys) as results:
            assert told <= results.done
            if len(results.done) == n:
                break
    assert kills >= 3
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(record["row"] for record in records) == list(range(n))
    assert all(record["text"] == str(record["row"]) * 40_000 for record in records)
    assert os.listdir(path.parent) == [path.name]


def test_a_second_process_is_refused_until_the_first_dies(path):
    with worker(path, 3) as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match="out.jsonl is in use by another run"):
            ResultsFile(path, ["0"])
        process.kill()
    ResultsFile(path, ["0", "1", "2"]).close()


def test_a_refused_second_opener_leaves_the_first_at_work(path):
    with ResultsFile(path, KEYS) as first:
        first.add(1, record(1))
        with pytest.raises(ValueError, match="in use"):
            ResultsFile(path, KEYS)
        first.add(0, record(0))
        assert path.read_bytes() == written([1, 0])


def test_a_file_that_was_replaced_between_opening_and_locking_is_in_use(path, monkeypatch):
    class Late:
        LOCK_EX, LOCK_NB = fcntl.LOCK_EX, fcntl.LOCK_NB

        @staticmethod
        def flock(fd, how):
            path.with_name("new").touch()
            os.replace(path.with_name("new"), path)
            fcntl.flock(fd, how)

    monkeypatch.setattr(results_file, "fcntl", Late)
    with pytest.raises(ValueError, match="in use by another run"):
        ResultsFile(path, KEYS)


LINE_0 = b'{"row": 0, "key": "a"}\n'


@pytest.mark.parametrize(
    ("output", "journal", "message"),
    [
        (b'{"row": 0, "key": "x"}\n', None, r"out\.jsonl, line 1 is of another input"),
        (LINE_0 + b'{"row": 1, "key": "a"}\n', None, r"out\.jsonl, line 2 is of another input"),
        (b'{"row": true, "key": "b"}\n', None, "line 1 is not the result of a row"),
        (b"[0]\n", None, "line 1 is not the result of a row"),
        (LINE_0 + b"text\n", None, r"out\.jsonl, line 2 is not JSON"),
        (b"\xff\n", None, "line 1 is not JSON"),
        (b"\n", None, "line 1 is not JSON"),
        (b"a text without a line end", None, r"out\.jsonl, line 1 is of another input"),
        (b'{"row": 0, "key": "x", "te', None, r"out\.jsonl, line 1 is of another input"),
        (b'{"row": 9', None, r"out\.jsonl, line 1 is of another input"),
        (LINE_0, b'{"row": 3, "key": "d"}\n', r"\.out\.jsonl\.pending, line 1 is of another"),
        (LINE_0, b'{"row": 5, "key": "d"}\n', r"pending, line 1 is of row 5, but the input"),
        (LINE_0, b'{"row": 1, "key": "b"}\n{"a": 1}\n', r"pending, line 2 is not the result"),
        (LINE_0, b"{\n", r"pending, line 1 is not JSON"),
        (LINE_0, b'{"row": 2, "key": "b', r"pending, line 1 is of another input"),
    ],
)
def test_files_of_another_run_are_refused_and_left_alone(path, output, journal, message):
    path.write_bytes(output)
    if journal is not None:
        pending(path).write_bytes(journal)
    with pytest.raises(ValueError, match=message) as error:
        ResultsFile(path, KEYS)
    assert "choose another --output or delete that file" in str(error.value)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == output
    assert journal is None or pending(path).read_bytes() == journal
    # The lock is released.
    path.write_bytes(b"")
    pending(path).unlink(missing_ok=True)
    ResultsFile(path, KEYS).close()


@pytest.mark.parametrize("torn", [b"", b"{"])
def test_fewer_keys_than_rows_are_refused(path, torn):
    with ResultsFile(path, KEYS) as results:
        for row in range(N):
            results.add(row, record(row))
    with pytest.raises(ValueError, match="line 4 is of row 3, but the input has 3 rows"):
        ResultsFile(path, KEYS[:3])
    # More of them are an input that has grown.
    path.write_bytes(written(range(N)) + torn)
    with ResultsFile(path, [*KEYS, "f"]) as results:
        assert results.done == set(range(N))
    assert path.read_bytes() == written(range(N))


def test_overwriting_drops_the_lines_of_other_runs_and_no_others(path):
    foreign = b'{"row": 2, "key": "x", "n": 1}\n'
    for rest in (foreign, b"text\n", b"text", b'{"row": 7, "key": "a"}\n'):
        path.write_bytes(written([1]) + rest)
        with ResultsFile(path, KEYS, overwrite=True) as results:
            assert results.done == {1} and path.read_bytes() == written([1])
            results.add(0, record(0))
        assert path.read_bytes() == written([1, 0])


def test_of_two_lines_of_a_row_the_last_counts(path):
    path.write_bytes(b'{"row": 0, "key": "a", "n": 7}\n' + written([1, 0]))
    with ResultsFile(path, KEYS) as results:
        assert results.done == {0, 1} and sorted(rows_in(path)) == [0, 1]
    assert b'"n": 7' not in path.read_bytes()


def test_rows_of_the_journal_of_an_earlier_version_are_taken_over(path):
    path.write_bytes(written([0, 1]))
    pending(path).write_bytes((line(4) + failed_line(3)).encode() + b'{"row": 2, "ke')
    with ResultsFile(path, KEYS) as results:
        assert results.done == {0, 1, 4}
        results.add(3, record(3))
    assert path.read_bytes() == written([0, 1, 4, 3])
    assert os.listdir(path.parent) == [path.name]


def full_disk(room):
    """os on a disk that has room for so many bytes more; what is cut off makes room again."""

    class FullDisk(DyingDisk):
        def pwrite(self, fd, data, offset):
            try:
                return super().pwrite(fd, data, offset)
            except Killed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None

        def ftruncate(self, fd, size):
            self.left += os.fstat(fd).st_size - size
            os.ftruncate(fd, size)

        def _counted(self, call, *arguments):
            return call(*arguments)

    return mock.patch.object(results_file, "os", FullDisk(room))


@settings(max_examples=150)
@given(orders, st.integers(0, 350), st.booleans())
def test_a_full_disk_loses_nothing_that_was_stored(order, room, goes_on):
    with new_path() as path, contextlib.ExitStack() as stack:
        results = stack.enter_context(ResultsFile(path, KEYS))
        stored = []
        with full_disk(room):
            for row in order:
                try:
                    results.add(row, record(row))
                    stored.append(row)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                assert results.done == set(stored)
        assert path.read_bytes() == written(stored)
        if not goes_on:
            results.close()
            results = stack.enter_context(ResultsFile(path, KEYS))
        assert results.done == set(stored)
        rest = [row for row in order if row not in results.done]
        for row in rest:
            results.add(row, record(row))
        assert path.read_bytes() == written(stored + rest)
        assert os.listdir(path.parent) == [path.name]


def test_a_failed_write_that_cannot_be_cut_off_leaves_no_rest(path, monkeypatch):
    class Broken(DyingDisk):
        def fsync(self, fd):
            raise OSError(errno.EIO, "failed")

        def ftruncate(self, fd, size):
            if os.fstat(fd).st_size > size:
                raise OSError(errno.EIO, "failed")

    with ResultsFile(path, KEYS) as results:
        with mock.patch.object(results_file, "os", Broken(10**6)), pytest.raises(OSError):
            results.add(0, {"text": "long" * 100})
        results.add(0, record(0))
    assert path.read_bytes() == written([0])


def test_misuse_is_named(path, tmp_path):
    with ResultsFile(path, KEYS) as results:
        results.add(0, record(0))
        for row, given_, message in (
            (0, {}, "row 0 is stored already"),
            (5, {}, r"row must be in \[0, 5\), got 5"),
            (-1, {}, r"row must be in \[0, 5\), got -1"),
            (1, {"key": 1}, '"row" and "key"'),
        ):
            with pytest.raises(ValueError, match=message):
                results.add(row, given_)
        with pytest.raises(TypeError):
            results.add(1, {"path": path})
        assert results.done == {0}
    results.close()
    with pytest.raises(ValueError, match="closed"):
        results.add(1, {})
    assert path.read_bytes() == written([0])
    for target, message in (
        (tmp_path, "cannot be written: Is a directory"),
        (tmp_path / "none" / "x", "cannot be written: No such file"),
        (Path("/dev/null"), "is not a regular file"),
    ):
        with pytest.raises(ValueError, match=message):
            ResultsFile(target, KEYS)


FAILED = {"prompt": "x", "error": "no room"}


def failed_line(row):
    return f'{{"row": {row}, "key": "{KEYS[row]}", "prompt": "x", "error": "no room"}}\n'


def with_failures(failed):
    """The bytes of a whole output in which some rows failed."""
    return "".join(failed_line(i) if i in failed else line(i) for i in range(N)).encode()


failures = st.sets(st.integers(0, N - 1), min_size=1)


@settings(deadline=None, max_examples=60)
@given(orders, failures, st.data())
def test_rows_that_failed_are_dropped_and_made_again(order, failed, data):
    with new_path() as path:
        with ResultsFile(path, KEYS) as results:
            for row in order:
                results.add(row, FAILED if row in failed else record(row))
            assert results.done == set(range(N))
        good = [row for row in order if row not in failed]
        again = data.draw(st.permutations(sorted(failed)))
        with ResultsFile(path, KEYS) as results:
            assert results.done == set(good) and path.read_bytes() == written(good)
            for row in again:
                results.add(row, record(row))
        assert path.read_bytes() == written(good + again)
        assert os.listdir(path.parent) == [path.name]


@settings(deadline=None, max_examples=150)
@given(orders, failures, st.lists(st.integers(0, 400), max_size=8))
def test_a_kill_while_failures_are_made_again_loses_no_other_row(order, failed, budgets):
    with new_path() as path:
        path.write_bytes(with_failures(failed))
        stored = set(range(N)) - failed
        for budget in [*budgets, 10**6]:
            results = None
            with dying_disk(budget), contextlib.suppress(Killed):
                results = ResultsFile(path, KEYS)
                assert stored <= results.done
                for row in order:
                    if row not in results.done:
                        results.add(row, record(row))
                        stored.add(row)
            if results is not None:
                results.close()
        assert sorted(rows_in(path)) == list(range(N))
        assert path.read_bytes() == written(rows_in(path))


@settings(deadline=None, max_examples=30)
@given(failures)
def test_a_full_disk_keeps_what_is_there_when_failures_are_dropped(failed):
    class FullDisk:
        def __getattr__(self, name):
            return getattr(os, name)

        def fsync(self, fd):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with new_path() as path:
        path.write_bytes(with_failures(failed))
        with mock.patch.object(files, "os", FullDisk()), pytest.raises(OSError) as raised:
            ResultsFile(path, KEYS)
        assert raised.value.errno == errno.ENOSPC
        assert path.read_bytes() == with_failures(failed)
        with ResultsFile(path, KEYS) as results:
            assert results.done == set(range(N)) - failed


def test_a_failed_row_may_be_corrected(path):
    path.write_text(line(0) + failed_line(1) + line(2))
    with ResultsFile(path, ["a", "corrected", "a"]) as results:
        assert results.done == {0, 2}
        results.add(1, {"n": 1})
    records = [json.loads(each) for each in path.read_text().splitlines()]
    assert [each["key"] for each in records] == ["a", "a", "corrected"]
    with pytest.raises(ValueError, match="line 1 is of another input"):
        ResultsFile(path, ["other", "corrected", "a"])


def test_numbers_that_json_does_not_have_become_null(path):
    with ResultsFile(path, KEYS) as results:
        results.add(0, {"scores": [1.0, {"deep": float("nan")}], "least": -float("inf")})
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert record["scores"] == [1.0, {"deep": None}] and record["least"] is None


def test_keys_tell_rows_apart():
    same = row_key({"a": 1, "b": [2]}, "m")
    assert same == row_key({"b": [2], "a": 1}, "m") and len(same) == 16
    others = [row_key({"a": 1, "b": [2]}, "n"), row_key({"a": 1, "b": [3]}, "m"), row_key("m")]
    assert len({same, *others}) == 4


def test_half_a_surrogate_pair_comes_back_as_it_was(path):
    with ResultsFile(path, ["a"]) as results:
        results.add(0, {"text": "x\ud83d", "smile": "😀"})
    raw = path.read_bytes()
    assert json.loads(raw.decode())["text"] == "x\ud83d" and "😀".encode() in raw


def test_no_rows_are_all_done(path):
    with ResultsFile(path, []) as results:
        assert results.done == set()
    assert path.read_bytes() == b""
