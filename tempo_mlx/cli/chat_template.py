"""What commands put through a model's chat template, and the options for it."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from ..arguments import check_text
from ..errors import TempoError
from ..needs import Need, Needs
from ..text.chat import Chat

UseChat = Annotated[
    bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")
]

SystemPrompt = Annotated[
    str | None, typer.Option(help="System message for the chat template; needs --chat.")
]

PrefillResponse = Annotated[
    str | None,
    typer.Option(help="What the answer begins with; the model goes on from there. Needs --chat."),
]

#: What these options need to have an effect.
NEEDS: Needs = {
    name: (Need("chat"),) for name in ("system_prompt", "prefill_response", "chat_template_config")
}


@dataclass(frozen=True)
class Template:
    """What goes through the template beside the user's message.

    Args:
        system: the system message, if there is one.
        prefill: what the answer begins with.
        config: further arguments of the template.
    """

    system: str | None = None
    prefill: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.system is not None:
            check_text("--system-prompt", self.system)
        if self.prefill is not None:
            check_text("--prefill-response", self.prefill)

    def asking(self, text: str) -> Chat:
        """The user's message with all of that."""
        return Chat.asking(text, self.system, self.prefill, self.config)


def template_config(given: str | None) -> dict[str, Any]:
    """What --chat-template-config says.

    Raises:
        TempoError: if it is no JSON object.
    """
    if given is None:
        return {}
    try:
        config = json.loads(given)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise TempoError(
            "--chat-template-config must be a JSON object such as '{\"enable_thinking\": false}', "
            f"got {given}"
        )
    return config
