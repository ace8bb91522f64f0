"""A chat as a user types it: messages, and commands that begin with a slash."""

import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.text import Text

from ..conversation import PATHS, Conversation
from ..errors import TempoError
from ..generation import StepResponse
from ..io.console import Console
from ..lattice.rendering import StepWriter, plain
from ..text.printable import quoted, running
from .display import coloured, report
from .outputs import Output, check_outputs, json_where, say_written, write_json

#: An end of the text among the tokens of /why.
END = "<end>"

HELP = {
    "/threshold 0.2": "the threshold of the next answers; alone, what it is",
    "/paths": f"the {PATHS} best paths of the last answer, with their log-probability",
    "/pick 3": "make the third path the answer; the conversation goes on from it",
    "/continue": "go on with the last answer where it ended",
    "/why": "the last set of the last answer, with probabilities",
    "/undo": "take the last message and its answer back",
    "/system TEXT": "the system message; alone, what it is; '-' removes it",
    "/settings": "the settings, and how much of the conversation was read",
    "/save FILE": "write the conversation with its sets as JSON",
    "/help": "these commands",
    "/quit": "end the session, as Ctrl-D does",
}

KEYS = "Ctrl-C ends an answer, twice the session; Ctrl-D ends the session."

#: Recognises a file that /save wrote.
is_conversation = json_where(lambda data: data.keys() >= {"messages", "answers", "settings"})


class SessionEnd(Exception):
    """The user ends the session."""


class ChatSession:
    """What a chat does with each line that is typed.

    Args:
        conversation: that is carried on.
        out: for answers and what commands show.
        notes: for everything else.
        verbose: say after each answer how fast it came and how much was read.
    """

    def __init__(
        self, conversation: Conversation, out: Console, notes: Console, verbose: bool = False
    ):
        self.conversation = conversation
        self.out, self.notes, self.verbose = out, notes, verbose
        self._commands: dict[str, Callable[[str], None]] = {
            "/threshold": self._threshold,
            "/paths": self._paths,
            "/pick": self._pick,
            "/continue": self._continue,
            "/why": self._why,
            "/undo": self._undo,
            "/system": self._system,
            "/settings": self._settings,
            "/save": self._save,
            "/help": self._help,
            "/quit": self._quit,
        }

    def take(self, line: str) -> None:
        """Answer a message, or obey a command; what is wrong with it is said in a line.

        Raises:
            SessionEnd: if it ends the session.
        """
        try:
            if line.startswith("/"):
                name, _, rest = line.partition(" ")
                if name not in self._commands:
                    raise TempoError(f"there is no command {quoted(name)}; /help lists them")
                self._commands[name](rest.strip())
            elif line.strip():
                self._answer(self.conversation.ask(line))
        except (TempoError, OSError) as error:
            self.notes.print(Text(" ".join(str(error).split()), style="red"))

    def _answer(self, responses: Generator[StepResponse, None, None]) -> None:
        """Show an answer as it comes; Ctrl-C ends it, and twice the session."""
        writer, streamed = StepWriter(), ""
        done = 0
        with self._interrupts() as pressed:
            try:
                for response in responses:
                    done += 1
                    spans = list(writer.write(response.step))
                    streamed += plain(spans)
                    self.out.print(coloured(spans), end="")
            except KeyboardInterrupt:
                responses.close()
                if len(pressed) > 1:
                    raise SessionEnd from None
        if not done:
            self._note("interrupted before the first token: the message is not kept")
            return
        self.out.print(coloured(writer.finish()))
        turn = self.conversation.turns[-1]
        if streamed != running(turn.path.text):
            self.out.print(Text.assemble(("best path: ", "bold"), turn.path.text))
        if turn.result.finish_reason == "interrupted":
            self._note("interrupted: the answer so far is kept; /continue goes on with it")
        elif turn.result.finish_reason == "length":
            self._note(f"ended after {done} steps (--max-tokens); /continue goes on")
        elif turn.result.finish_reason == "context":
            self._note("the model's context is full; /undo makes room")
        reading = self.conversation.reading
        if reading is not None and reading.reread_because is not None:
            self._note(f"the conversation was read again: {reading.reread_because}")
        if self.verbose:
            report(turn.result, self.notes)
            self._note(self._read())

    @contextmanager
    def _interrupts(self) -> Iterator[list[int]]:
        """Ctrl-C ends the answer behind its present step; a second one interrupts at once."""
        pressed: list[int] = []

        def press(number: int, frame: FrameType | None) -> None:
            pressed.append(number)
            self.conversation.stop()
            if len(pressed) > 1:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, press)
        try:
            yield pressed
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, text: str) -> None:
        self.notes.print(text, style="dim")

    def _threshold(self, given: str) -> None:
        settings = self.conversation.settings
        if given:
            settings = replace(settings, threshold=_number("/threshold", given))
            self.conversation.settings = settings
        self.out.print(f"threshold {settings.threshold:g}")

    def _paths(self, given: str) -> None:
        _require_nothing("/paths", given)
        chosen = self.conversation.turns[-1].path if self.conversation.turns else None
        for number, path in enumerate(self.conversation.paths(), 1):
            self.out.print(
                Text.assemble(
                    f"{number} ",
                    (f"{path.logprob:9.3f} nats ", "cyan"),
                    (path.text, "bold" if path == chosen else ""),
                )
            )

    def _pick(self, given: str) -> None:
        if not given.isdecimal():
            raise TempoError("/pick needs the number of a path; /paths shows them")
        path = self.conversation.pick(int(given))
        self.out.print(Text.assemble(("the answer now: ", "bold"), path.text))

    def _continue(self, given: str) -> None:
        _require_nothing("/continue", given)
        self._answer(self.conversation.go_on())

    def _why(self, given: str) -> None:
        _require_nothing("/why", given)
        step = self.conversation.last_set()
        if step is None:
            self.out.print("no step of the answer had more than one token")
            return
        self.out.print(f"step {step.step}, threshold {step.threshold:g}")
        rows = [(token.probability, quoted(token.text)) for token in step.tokens]
        rows += [(ending.probability, END) for ending in step.endings]
        for probability, text in sorted(rows, reverse=True):
            self.out.print(Text.assemble((f"{probability:7.3f}  ", "cyan"), text))

    def _undo(self, given: str) -> None:
        _require_nothing("/undo", given)
        turn = self.conversation.undo()
        self.out.print(f"taken back: {quoted(turn.user)}")

    def _system(self, given: str) -> None:
        if given:
            self.conversation.system = None if given == "-" else given
        system = self.conversation.system
        self.out.print("no system message" if system is None else f"system: {system}")

    def _settings(self, given: str) -> None:
        _require_nothing("/settings", given)
        settings = self.conversation.settings
        shown = dict.fromkeys(["threshold", "max_tokens", "max_parallel", "visibility"])
        stored = settings.to_dict()
        for name in [*shown, *sorted(settings.changed() - shown.keys())]:
            if name in stored:
                self.out.print(f"{name} {stored[name]}")
        self.out.print(self._read())

    def _save(self, given: str) -> None:
        if not given:
            raise TempoError("/save needs the name of a file")
        path = Path(given)
        check_outputs([Output("/save", path, is_conversation)], {}, overwrite=False)
        write_json(path, self.conversation.to_dict())
        say_written(path, self.notes)

    def _help(self, given: str) -> None:
        width = max(map(len, HELP))
        for command, meaning in HELP.items():
            self.out.print(Text.assemble((f"{command:{width}}  ", "bold"), meaning))
        self.out.print(KEYS)

    def _quit(self, given: str) -> None:
        raise SessionEnd

    def _read(self) -> str:
        """What reading the latest prompt took, in a line."""
        reading = self.conversation.reading
        if reading is None:
            return "nothing read yet"
        return f"{reading.read} tokens read, {reading.kept} kept"


def _require_nothing(command: str, given: str) -> None:
    if given:
        raise TempoError(f"{command} takes nothing behind it, got {quoted(given)}")


def _number(command: str, given: str) -> float:
    try:
        return float(given)
    except ValueError:
        raise TempoError(f"{command} needs a number, got {quoted(given)}") from None
