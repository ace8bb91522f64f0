"""What a chat does with typed lines, without a terminal."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from dataclasses import replace

from tempo_mlx import Settings, load
from tempo_mlx.cli.chat_session import HELP, KEYS, ChatSession, SessionEnd
from tempo_mlx.cli.chat_template import template_config
from tempo_mlx.conversation import Conversation
from tempo_mlx.errors import TempoError
from tempo_mlx.io.console import Console
from tests.tiny_folder import save_tiny_model

import pytest

LETTERS = {i: -50.0 for i in range(257) if not 64 <= i < 90}
SETTINGS = Settings(max_tokens=6, threshold=0.03, logit_bias=LETTERS)


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture
def session(loaded):
    consoles = [Console(file=io.StringIO(), width=80, soft_wrap=True) for _ in range(2)]
    return ChatSession(Conversation(*loaded, SETTINGS), *consoles)


def take(session, line):
    """What a line shows, and what is noted."""
    for console in (session.out, session.notes):
        console.file.seek(0)
        console.file.truncate()
    session.take(line)
    return session.out.file.getvalue(), session.notes.file.getvalue()


def test_an_answer_shows_its_sets_and_then_its_best_path(session):
    out, notes = take(session, "one")
    turn = session.conversation.turns[0]
    assert out.startswith("[") and f"best path: {turn.answer}" in out
    assert "ended after 6 steps" in notes and "/continue" in notes
    assert take(session, "  ") == ("", "")


def test_commands_show_and_change_the_answer(session):
    assert "no answer yet" in take(session, "/paths")[1]
    take(session, "one")
    lines = take(session, "/paths")[0].splitlines()
    paths = session.conversation.paths()
    assert len(paths) > 2
    assert all(line.endswith(path.text) for line, path in zip(lines, paths, strict=True))
    assert paths[2].text in take(session, "/pick 3")[0]
    assert session.conversation.turns[0].answer == paths[2].text
    for wrong in ("/pick", "/pick x", "/pick 6", "/pick 0"):
        out, notes = take(session, wrong)
        assert out == "" and notes.count("\n") == 1
    why = take(session, "/why")[0].splitlines()
    step = session.conversation.last_set()
    assert len(why) == 1 + len(step.tokens) + len(step.endings)
    assert f"{step.tokens[0].probability:7.3f}" in why[1]
    before = session.conversation.turns[0].answer
    take(session, "/continue")
    assert session.conversation.turns[0].answer.startswith(before)
    assert "taken back: 'one'" in take(session, "/undo")[0]
    assert session.conversation.turns == []


def test_settings_of_the_next_answers(session):
    assert take(session, "/threshold")[0] == "threshold 0.03\n"
    assert take(session, "/threshold 1")[0] == "threshold 1\n"
    assert "must be in (0, 1]" in take(session, "/threshold 2")[1]
    assert "needs a number" in take(session, "/threshold x")[1]
    assert session.conversation.settings == replace(SETTINGS, threshold=1.0)
    assert take(session, "/system")[0] == "no system message\n"
    take(session, "/system Be short.")
    assert session.conversation.messages() == [{"role": "system", "content": "Be short."}]
    assert take(session, "/system -")[0] == "no system message\n"
    assert "nothing read yet" in take(session, "/settings")[0]
    take(session, "one")
    reading = session.conversation.reading
    shown = take(session, "/settings")[0]
    assert "threshold 1.0\n" in shown and f"{reading.read} tokens read, 0 kept" in shown


def test_why_says_where_there_was_no_choice(session):
    take(session, "/threshold 1")
    take(session, "one")
    assert "more than one token" in take(session, "/why")[0]


def test_every_command_is_in_the_help(session):
    shown = take(session, "/help")[0]
    assert {each.split()[0] for each in HELP} == set(session._commands)
    assert all(each in shown for each in HELP)
    assert "no command '/foo'" in take(session, "/foo")[1]
    with pytest.raises(SessionEnd):
        session.take("/quit")


def test_a_conversation_is_saved_and_no_other_file_is_replaced(session, tmp_path):
    take(session, "one")
    path = tmp_path / "talk.json"
    assert str(path) in take(session, f"/save {path}")[1]
    data = json.loads(path.read_text())
    assert data["messages"] == session.conversation.messages()
    take(session, "two")
    take(session, f"/save {path}")
    assert len(json.loads(path.read_text())["answers"]) == 2
    path.write_text("mine")
    assert "/save" in take(session, f"/save {path}")[1] and path.read_text() == "mine"
    assert take(session, "/save")[1]


def interrupt_at(session, step, times=1):
    """Ctrl-C, as often as said, while that step of the next answer is shown."""
    write = session.out.print
    shown = [0]

    def print(*arguments, **options):
        write(*arguments, **options)
        shown[0] += 1
        if shown[0] == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    session.out.print = print


def test_ctrl_c_ends_the_answer_which_is_kept(session):
    handler = signal.getsignal(signal.SIGINT)
    interrupt_at(session, 2)
    notes = take(session, "one")[1]
    turn = session.conversation.turns[0]
    assert turn.result.finish_reason == "interrupted" and len(turn.ids) == 2
    assert "the answer so far is kept" in notes
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_twice_ends_the_session(session):
    interrupt_at(session, 2, times=2)
    with pytest.raises(SessionEnd):
        session.take("one")


def test_lines_come_from_standard_input(run, folder):
    options = ["--model", folder, "-m", 3, "-v"]
    code, out, err = run("chat", *options, stdin=io.StringIO("one\n/settings\n/quit\nnever\n"))
    assert code == 0 and "max_tokens 3" in out and "0 kept" in out
    assert "tokens read, 0 kept" in err and "never" not in out + err


def test_a_model_without_a_template_ends_in_a_line(run, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}
    path.write_text(json.dumps(config))
    code, out, err = run("chat", "--model", folder, stdin=io.StringIO("one\n"))
    assert (code, out) == (2, "") and "--no-chat" in err and err.count("\n") == 1
    code, out, _ = run("chat", "--model", folder, "--no-chat", "-m", 2, stdin=io.StringIO("one\n"))
    assert code == 0 and out


@pytest.mark.parametrize(
    "options",
    [
        ["--no-chat", "--chat-template-config", "{}"],
        ["--chat-template-config", "[]"],
        ["--visibility", "tree", "--branching", "replicate"],
    ],
)
def test_options_that_cannot_be(run, folder, options):
    code, out, err = run("chat", "--model", folder, *options, stdin=io.StringIO(""))
    assert (code, out) == (2, "") and err.count("\n") == 1


def test_the_template_config_is_an_object():
    assert template_config('{"enable_thinking": false}') == {"enable_thinking": False}
    with pytest.raises(TempoError, match="JSON object"):
        template_config("{")


def test_a_terminal_ends_with_ctrl_d(folder):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "tempo_mlx", "chat", "--model", folder, "-m", "2"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        # Bracketed paste is switched on where a line is asked for.
        while b"\x1b[?2004h" not in seen:
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 1000)
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)
    assert b"/help lists the commands" in seen


def test_the_help_lists_what_may_be_typed(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("chat", "--help")
    assert code == 0
    for command, meaning in HELP.items():
        assert f"{command}  {meaning}" in out
    assert KEYS in out
