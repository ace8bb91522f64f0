"""Files and standard input of users: read whole and as text, or refused with a line."""

import io
import sys

from tempo_mlx.errors import TempoError
from tempo_mlx.io import inputs
from tempo_mlx.io.inputs import HYPHEN, object_of, read_lines, read_text

import pytest

TEXTS = [
    (b"one", "one"),
    (b"one\n", "one"),
    (b"one\r\n", "one"),
    (b"one\n\n", "one\n"),
    (b"one\n\r\n", "one\n"),
    (b"one\r", "one\r"),
    (b"\n", ""),
    (b"", ""),
    (b" one \n two \n", " one \n two "),
    (b"\xef\xbb\xbfone\n", "one"),
    (b"\xef\xbb\xbf\xef\xbb\xbfone", "\ufeffone"),
    (b"one\xef\xbb\xbf", "one\ufeff"),
    ("café \u2028".encode(), "café \u2028"),
]


@pytest.mark.parametrize(("data", "text"), TEXTS)
def test_a_text_loses_one_mark_and_one_newline(tmp_path, monkeypatch, data, text):
    path = tmp_path / "prompt.txt"
    path.write_bytes(data)
    assert read_text(path) == text
    # The encoding of the place does not matter.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
    assert read_text(HYPHEN) == text


@pytest.mark.parametrize("data", [b"caf\xe9", "one".encode("utf-16"), b"\xed\xa0\x80", b"\x80" * 9])
def test_text_that_is_not_utf8_is_refused(tmp_path, monkeypatch, data):
    path = tmp_path / "prompt.txt"
    path.write_bytes(data)
    with pytest.raises(TempoError, match=r"^--prompt-file .*prompt\.txt is not UTF-8 text$"):
        read_text(path, "--prompt-file ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    with pytest.raises(TempoError, match=r"^standard input is not UTF-8 text$"):
        read_text(HYPHEN)


class Endless(io.RawIOBase):
    """A stream that never ends, as `yes` writes one."""

    def readable(self):
        return True

    def readinto(self, buffer):
        buffer[:] = b"y\n" * (len(buffer) // 2) + b"y" * (len(buffer) % 2)
        return len(buffer)


def test_endless_input_is_refused(monkeypatch):
    monkeypatch.setattr(inputs, "ROWS_BYTES", 3 * 2**20)
    monkeypatch.setattr(inputs, "PROMPT_BYTES", 2**20)
    for read, most in ((read_text, 1), (read_lines, 3)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
        with pytest.raises(TempoError, match=f"^standard input has more than {most} MiB"):
            read(HYPHEN)
        with pytest.raises(TempoError, match=f"^/dev/zero has more than {most} MiB"):
            read("/dev/zero")


def test_the_bound_itself_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "PROMPT_BYTES", 4)
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"abcd")
    assert read_text(path) == "abcd"
    path.write_bytes(b"abcde")
    with pytest.raises(TempoError, match="has more than"):
        read_text(path)


def test_standard_input_that_is_closed_is_named(monkeypatch):
    closed = io.TextIOWrapper(io.BytesIO(b"x"))
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(TempoError, match="^standard input is closed"):
            read_text(HYPHEN)
        with pytest.raises(TempoError, match="^standard input is closed"):
            read_lines(HYPHEN)


def test_files_that_cannot_be_read_are_named(tmp_path):
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(TempoError, match=f"^{path} cannot be read: {why}"):
            read_text(path)


def test_lines_are_those_of_bytes(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes("\ufeffone\r\n\r\n \t\n\x0ctwo\u2028two\rthree".encode())
    assert read_lines(path) == [(1, b"one"), (4, "\x0ctwo\u2028two".encode()), (5, b"three")]


def test_objects_follow_the_json_standard():
    line = '{"a": [1, -2.5e-3, true, null, {"é": "\\ud83d\\ude00"}], "b": 1e308}'.encode()
    assert object_of(line, "{}") == {"a": [1, -0.0025, True, None, {"é": "😀"}], "b": 1e308}
    assert object_of(b'{"a": ' + b"[" * 98 + b"]" * 98 + b"}", "{}")
    assert object_of(b'{"a": {"a": 1}, "b": {"a": 1}}', "{}") == {"a": {"a": 1}, "b": {"a": 1}}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"a": 1, "a": 1}', 'key "a" occurs twice'),
        ('{"a": 1, "\\u0061": 2}', 'key "a" occurs twice'),
        ('{"x": [{"a": 1, "b": 2, "a": 3}]}', 'key "a" occurs twice'),
        ('{"a": NaN}', "NaN is not a number in JSON"),
        ('{"a": [Infinity]}', "Infinity is not a number in JSON"),
        ('{"a": -1e309}', "-1e309 is too large"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ('{"\\udfff": 1}', "half a surrogate pair"),
        ('{"a": 1} {"b": 2}', "not JSON: Extra data at column 10"),
        ("{'a': 1}", "not JSON"),
        ("[1]", "not a JSON object such as {}"),
        ('{"a": ' + "[" * 101 + "]" * 101 + "}", "more than 100 levels"),
        ('{"a": ' * 101 + "1" + "}" * 101, "more than 100 levels"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON that can be read"),
    ],
)
def test_an_object_that_json_does_not_have_is_refused(line, words):
    with pytest.raises(TempoError) as caught:
        object_of(line.encode(), "{}")
    assert words in str(caught.value) and len(str(caught.value)) < 200
