"""The command line whatever its streams are: closed, or of another encoding."""

import os
import subprocess
import sys

from tests.sweeps import mostly_slow

import pytest


def tempo(*arguments, redirect="", **environment):
    """Run the command in a shell, with redirections that Python's subprocess cannot make."""
    quoted = " ".join(f"'{argument}'" for argument in arguments)
    return subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m tempo_mlx {quoted} {redirect}"],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_lose_what_is_printed_and_nothing_else(folder, tmp_path, redirect):
    output = tmp_path / "out.json"
    done = tempo(
        "generate", "a", "--model", folder, "-m", "2", "-o", str(output), redirect=redirect
    )
    assert done.returncode == 0 and output.stat().st_size > 0
    assert b"Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("encoding", mostly_slow(["ascii", "latin-1"], ["ascii"]))
def test_characters_that_an_encoding_lacks_are_escaped(folder, encoding):
    done = tempo("generate", "今天", "--model", folder, "-m", "2", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and rb"\u4eca\u5929" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("bench",), ("experiment",), ("models", "--help")])
def test_help_is_no_error(run, arguments):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "") and "Usage: " in out
