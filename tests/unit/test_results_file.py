"""Results come out in input order and complete, whatever kills the run and however often."""

import contextlib
import errno
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


def undisturbed(rows=N):
    """The bytes of the output after so many rows, spelled out."""
    return "".join(line(row) for row in range(rows)).encode()


def line(row):
    text = "ü\\n\\u2028" * row
    return f'{{"row": {row}, "key": "{KEYS[row]}", "text": "{text}", "n": {row}}}\n'


def pending(path):
    return path.with_name(f".{path.name}.pending")


def rows_in_files(path):
    """Rows that both files hold, all of them as whole lines."""
    data = b"".join(file.read_bytes() for file in (path, pending(path)) if file.exists())
    assert data[-1:] in (b"", b"\n")
    return {json.loads(line)["row"] for line in data.splitlines()}


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

    def unlink(self, path):
        return self._counted(os.unlink, path)

    def fsync(self, fd):
        return self._counted(lambda fd: None, fd)


@settings(max_examples=60)
@given(orders)
def test_output_is_in_input_order_for_every_order_of_completion(order):
    with new_path() as path:
        with ResultsFile(path, KEYS) as results:
            for count, row in enumerate(order, 1):
                results.add(row, record(row))
                assert results.done == set(order[:count])
                in_turn = next(i for i in range(N + 1) if i == N or i not in results.done)
                assert path.read_bytes() == undisturbed(in_turn)
                assert pending(path).exists() == (len(results.done) > in_turn)
        assert path.read_bytes() == undisturbed()
        assert os.listdir(path.parent) == [path.name]


@settings(max_examples=150)
@given(orders, st.lists(st.integers(0, 350), max_size=8))
def test_a_kill_at_any_byte_loses_no_row_that_was_stored(order, budgets):
    with new_path() as path:
        stored = set()
        for budget in [*budgets, 10**6]:
            results = None
            with (
                mock.patch.object(results_file, "os", DyingDisk(budget)),
                contextlib.suppress(Killed),
            ):
                results = ResultsFile(path, KEYS)
                assert stored <= results.done
                for row in order:
                    if row not in results.done:
                        results.add(row, record(row))
                    stored.add(row)
            if results is not None:
                results.close()
            assert undisturbed().startswith(path.read_bytes())
        assert path.read_bytes() == undisturbed()
        assert os.listdir(path.parent) == [path.name]


@settings(max_examples=150)
@given(orders, st.integers(0, N), st.booleans(), st.data())
def test_whole_lines_survive_a_cut_at_any_byte_of_either_file(order, n, of_journal, data):
    with new_path() as path:
        with ResultsFile(path, KEYS) as results:
            for row in order[:n]:
                results.add(row, record(row))
        file = pending(path) if of_journal and pending(path).exists() else path
        kept = file.read_bytes()
        kept = kept[: data.draw(st.integers(0, len(kept)))]
        os.truncate(file, len(kept))
        whole = [
            json.loads(line)["row"]
            for each in (path, pending(path))
            if each.exists()
            for line in each.read_bytes().splitlines(keepends=True)
            if line.endswith(b"\n")
        ]
        with ResultsFile(path, KEYS) as results:
            assert results.done == set(whole)
            for each in (path, pending(path)):
                assert not each.exists() or each.read_bytes()[-1:] in (b"", b"\n")
            for row in reversed(range(N)):
                if row not in results.done:
                    results.add(row, record(row))
        assert path.read_bytes() == undisturbed()
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
    file = os.path.dirname(importlib.util.find_spec("tempo_mlx.io.resumable_jsonl").origin)
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, file, str(path), str(n)],
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
    with ResultsFile(path.with_name("other"), keys) as results:
        for row in range(n):
            results.add(row, {"text": str(row) * 40_000})
    assert path.read_bytes() == path.with_name("other").read_bytes()
    assert sorted(os.listdir(path.parent)) == ["other", path.name]


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
        assert path.read_bytes() == undisturbed(2)


LINE_0 = b'{"row": 0, "key": "a"}\n'


@pytest.mark.parametrize(
    ("output", "journal", "message"),
    [
        (b'{"row": 0, "key": "x"}\n', None, r"out\.jsonl, line 1 is of another input"),
        (LINE_0 + b'{"row": 1, "key": "a"}\n', None, r"out\.jsonl, line 2 is of another input"),
        (LINE_0 + LINE_0, None, r"out\.jsonl, line 2 is not the result of a row"),
        (b'{"row": true, "key": "b"}\n', None, "line 1 is not the result of a row"),
        (b"[0]\n", None, "line 1 is not the result of a row"),
        (LINE_0 + b"text\n", None, r"out\.jsonl, line 2 is not JSON"),
        (b"\xff\n", None, "line 1 is not JSON"),
        (b"\n", None, "line 1 is not JSON"),
        (b"a text without a line end", None, r"out\.jsonl, line 1 is of another input"),
        (b'{"row": 0, "key": "x", "te', None, r"out\.jsonl, line 1 is of another input"),
        (b'{"row": 1', None, r"out\.jsonl, line 1 is of another input"),
        (LINE_0, b'{"row": 3, "key": "d"}\n', r"\.out\.jsonl\.pending, line 1 is of another"),
        (LINE_0, b'{"row": 5, "key": "d"}\n', r"pending, line 1 is of row 5, the input has 5 rows"),
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
    with pytest.raises(ValueError, match="line 4 is of row 3, the input has 3 rows"):
        ResultsFile(path, KEYS[:3])
    # More of them are an input that has grown.
    path.write_bytes(undisturbed() + torn)
    with ResultsFile(path, [*KEYS, "f"]) as results:
        assert results.done == set(range(N))
    assert path.read_bytes() == undisturbed()
    path.write_bytes(undisturbed() + b"{")
    with pytest.raises(ValueError, match="line 6 is of another input"):
        ResultsFile(path, KEYS)


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
        with full_disk(room):
            for row in order:
                before = set(results.done)
                try:
                    results.add(row, record(row))
                    assert results.done == before | {row}
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    assert results.done in (before, before | {row})
        assert rows_in_files(path) == results.done
        assert undisturbed().startswith(path.read_bytes())
        stored = results.done
        if not goes_on:
            results.close()
            results = stack.enter_context(ResultsFile(path, KEYS))
        assert results.done == stored
        for row in order:
            if row not in results.done:
                results.add(row, record(row))
                assert rows_in_files(path) == results.done
        # Where all rows were stored before the last could be moved, opening moves them.
        results.close()
        with ResultsFile(path, KEYS) as results:
            assert results.done == set(range(N))
        assert path.read_bytes() == undisturbed()
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
    assert path.read_bytes() == undisturbed(1)


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
    assert path.read_bytes() == undisturbed(1)
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
def test_rows_that_failed_are_made_again_and_come_out_in_order(order, failed, data):
    with new_path() as path:
        with ResultsFile(path, KEYS) as results:
            for row in order:
                results.add(row, FAILED if row in failed else record(row))
            assert results.done == set(range(N))
        assert path.read_bytes() == with_failures(failed)
        still = data.draw(st.sets(st.sampled_from(sorted(failed))))
        with ResultsFile(path, KEYS) as results:
            assert results.done == set(range(N)) - failed
            for row in data.draw(st.permutations(sorted(failed))):
                results.add(row, FAILED if row in still else record(row))
        assert path.read_bytes() == with_failures(still)
        assert os.listdir(path.parent) == [path.name]


@settings(deadline=None, max_examples=150)
@given(orders, failures, st.lists(st.integers(0, 400), max_size=8))
def test_a_kill_while_failures_are_made_again_loses_no_other_row(order, failed, budgets):
    with new_path() as path:
        path.write_bytes(with_failures(failed))
        stored = set(range(N)) - failed
        for budget in [*budgets, 10**6]:
            results = None
            with (
                mock.patch.object(results_file, "os", DyingDisk(budget)),
                contextlib.suppress(Killed),
            ):
                results = ResultsFile(path, KEYS)
                assert stored <= results.done
                for row in order:
                    if row not in results.done:
                        results.add(row, record(row))
                        stored.add(row)
            for file in (results._output, results._journal) if results is not None else ():
                # A process that is killed does nothing in its last moment.
                if file is not None:
                    file.close()
        assert path.read_bytes() == undisturbed()
        assert os.listdir(path.parent) == [path.name]


@settings(deadline=None, max_examples=60)
@given(failures, st.data())
def test_a_run_that_is_stopped_early_leaves_the_failures_that_it_did_not_reach(failed, data):
    with new_path() as path:
        path.write_bytes(with_failures(failed))
        again = data.draw(st.sets(st.sampled_from(sorted(failed))))
        with ResultsFile(path, KEYS) as results:
            for row in again:
                results.add(row, record(row))
        assert path.read_bytes() == with_failures(failed - again)
        assert os.listdir(path.parent) == [path.name]


def test_a_failure_that_waited_for_its_turn_is_made_again(path):
    path.write_bytes(line(0).encode())
    pending(path).write_text(failed_line(2) + line(3) + line(2))
    with ResultsFile(path, KEYS) as results:
        assert results.done == {0, 2, 3}
    pending(path).write_text(failed_line(2) + line(3))
    with ResultsFile(path, KEYS) as results:
        assert results.done == {0, 3}


@settings(deadline=None, max_examples=100)
@given(failures, st.integers(0, 400))
def test_a_full_disk_keeps_what_is_there_when_failures_are_made_again(failed, room):
    with new_path() as path:
        path.write_bytes(with_failures(failed))
        with full_disk(room):
            try:
                results = ResultsFile(path, KEYS)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                assert path.read_bytes() == with_failures(failed)
            else:
                results.close()
        with ResultsFile(path, KEYS) as results:
            assert results.done == set(range(N)) - failed


def test_a_failed_row_may_be_corrected(path):
    path.write_text(line(0) + failed_line(1) + line(2))
    with ResultsFile(path, ["a", "corrected", "a"]) as results:
        assert results.done == {0, 2}
        results.add(1, {"n": 1})
    records = [json.loads(each) for each in path.read_text().splitlines()]
    assert [each["key"] for each in records] == ["a", "corrected", "a"]
    with pytest.raises(ValueError, match="line 1 is of another input"):
        ResultsFile(path, ["other", "corrected", "a"])


def test_rows_that_waited_for_an_output_which_was_deleted_are_gone(path):
    with ResultsFile(path, KEYS) as results:
        results.add(3, record(3))
    with ResultsFile(path, KEYS) as results:
        assert results.done == {3}
    path.unlink()
    with ResultsFile(path, KEYS) as results:
        assert results.done == set()
    assert os.listdir(path.parent) == [path.name]


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
