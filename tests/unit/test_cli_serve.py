"""What ``tempo-mlx serve`` refuses before it loads a model, and how it ends."""

import signal
import socket
import subprocess
import sys

from tests.tiny_folder import save_tiny_model

import pytest

pytest.importorskip("uvicorn")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", 65536], ["--port", "[0, 65535]", "65536"]),
        (["--host", "0.0.0.0"], ["--host 0.0.0.0", "--api-key"]),
        (["--max-queue", -1], ["--max-queue", "at least 0"]),
        (["--batch-size", 0], ["--batch-size", "at least 1"]),
        (["--max-kv-bytes", "5XB"], ["--max-kv-bytes", "800MB", "5XB"]),
        (["--log-level", "loud"], ["--log-level", "loud", "warning"]),
        (["--host", "256.1.1.1", "--api-key", "x"], ["--host 256.1.1.1", "cannot be served"]),
    ],
)
def test_bad_options_are_a_line(run, options, words):
    code, out, err = run("serve", "--model", "nowhere", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in words)


def test_a_port_that_is_taken_is_a_line(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run("serve", "--model", "nowhere", "--port", port)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--port {port}" in err and "free one" in err


def test_ctrl_c_ends_it_without_a_traceback(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    arguments = ["tempo-mlx", "serve", "--port", "0", "--model", str(folder)]
    # A shell's background jobs ignore SIGINT, and so do their children unless they set it.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.argv = {arguments!r}; from tempo_mlx.__main__ import main; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout.readline().startswith("serving model on http://127.0.0.1:")
        while "Started server" not in server.stderr.readline():
            pass
        server.send_signal(signal.SIGINT)
        _, err = server.communicate()
    assert server.returncode == 130 and "Traceback" not in err
