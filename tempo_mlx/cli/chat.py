"""``tempo-mlx chat``: a conversation in the terminal."""

import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from ..arguments import check_text
from ..conversation import Conversation
from ..errors import TempoError
from ..io.console import Console
from ..settings import Settings
from ..text.vocabulary import add_end_token
from ..weights import load
from .chat_session import HELP, KEYS, ChatSession, SessionEnd
from .chat_template import template_config
from .effects import require_effect, setting_needs
from .options import AdapterPath, ExtraEosToken, MaxKvSize, Model, TemplateConfig
from .setting_options import SettingsCommand, with_settings

DEFAULTS = Settings()

PROMPT = "> "


def register(app: typer.Typer) -> None:
    typed = [f"[bold]{command}[/bold]  {meaning}" for command, meaning in HELP.items()]
    epilog = "\n\n".join(["While it runs, you may type:", *typed, KEYS])
    app.command("chat", cls=SettingsCommand, epilog=epilog)(with_settings(Settings)(chat))


def chat(
    context: typer.Context,
    model: Model = "smollm2-135m",
    adapter_path: AdapterPath = None,
    system_prompt: Annotated[str | None, typer.Option(help="System message.")] = None,
    no_chat: Annotated[
        bool,
        typer.Option(
            "--no-chat", help="Continue the text without a template, for models that have none."
        ),
    ] = False,
    chat_template_config: TemplateConfig = None,
    settings: Settings = DEFAULTS,
    extra_eos_token: ExtraEosToken = None,
    max_kv_size: MaxKvSize = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="After each answer, say how fast it came and what was read."
        ),
    ] = False,
) -> None:
    """Chat with a model; each answer shows its parallel sets as they are generated.

    A message that begins with a slash is a command; they are listed at the end of this help.

    What the cache holds of the conversation is not read again.
    """
    require_effect(context, setting_needs(), settings.values())
    if settings.branching == "replicate":
        raise TempoError("chat keeps one cache, and --branching replicate has none to keep")
    if system_prompt is not None:
        check_text("--system-prompt", system_prompt)
    if no_chat and chat_template_config is not None:
        raise TempoError("--chat-template-config has no effect with --no-chat; leave one out")
    config = template_config(chat_template_config)
    out, notes = (Console(stderr=err, highlight=False, soft_wrap=True) for err in (False, True))
    for note in settings.notes():
        notes.print(f"note: {note}", style="yellow")
    language_model, tokenizer = load(model, adapter_path=adapter_path)
    for token in extra_eos_token or ():
        add_end_token(tokenizer, token)
    conversation = Conversation(
        language_model, tokenizer, settings, system_prompt, not no_chat, config
    )
    session = ChatSession(conversation, out, notes, verbose)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        notes.print(f"{conversation.model.name or model}: /help lists the commands", style="dim")
    lines = _typed(notes) if on_terminal else (line.rstrip("\n") for line in sys.stdin)
    try:
        for line in lines:
            session.take(line)
    except SessionEnd:
        pass


def _typed(notes: Console) -> Iterator[str]:
    """Lines that are typed at a terminal; ends with Ctrl-D, or with Ctrl-C twice."""
    from prompt_toolkit import PromptSession

    ask: Callable[[str], str] = PromptSession().prompt
    interrupted = False
    while True:
        try:
            line = ask(PROMPT)
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            notes.print("Ctrl-C once more, or Ctrl-D, ends the session", style="dim")
            continue
        interrupted = False
        yield line
