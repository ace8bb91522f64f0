"""Chat messages, encoded with a model's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..arguments import check_text, shown
from ..errors import TempoError


class Chat(list[dict[str, Any]]):
    """Chat messages, and further arguments of the template that they go through.

    Args:
        messages, config: as for :func:`encode_chat`.
    """

    def __init__(self, messages: Sequence[dict[str, Any]], config: Mapping[str, Any] | None = None):
        super().__init__(messages)
        self.config = dict(config or {})

    @classmethod
    def asking(
        cls,
        text: str,
        system: str | None = None,
        prefill: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> "Chat":
        """A user's message, as ``mlx_lm.generate`` puts it through the template.

        Args:
            text: of the message.
            system: the system message before it, if there is one.
            prefill: what the answer begins with; it goes on from there.
            config: further arguments of the template.
        """
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        if prefill is None:
            return cls(messages, config)
        messages.append({"role": "assistant", "content": prefill})
        goes_on = {"continue_final_message": True, "add_generation_prompt": False}
        return cls(messages, {**goes_on, **(config or {})})


def encode_chat(
    tokenizer: Any, messages: Sequence[Any], config: Mapping[str, Any] | None = None
) -> list[int]:
    """Encode chat messages with the model's template, ready for the next answer.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        messages: each {"role": text, "content": text, ...}. A list of parts {"type": "text",
            "text": ...} is joined into one text. A message with "tool_calls" needs no content.
        config: further arguments of the template, such as {"enable_thinking": False}.

    Raises:
        TempoError: if a message is malformed, or the tokenizer has no template, or the template
            raises or ignores a message.
    """
    checked, arguments, _ = _through_template(tokenizer, messages, config)
    ids: list[int] = tokenizer.apply_chat_template(checked, **arguments)
    return ids


def chat_text(
    tokenizer: Any, messages: Sequence[Any], config: Mapping[str, Any] | None = None
) -> str:
    """The text whose ids :func:`encode_chat` gives, special tokens as they are written."""
    return _through_template(tokenizer, messages, config)[2]


def _through_template(
    tokenizer: Any, messages: Sequence[Any], config: Mapping[str, Any] | None
) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """The messages, checked; the template's arguments; and the text that it makes of them."""
    if not getattr(tokenizer, "has_chat_template", True):
        raise TempoError("prompt is chat messages, but the model has no chat template")
    checked = [_checked(f"prompt[{i}]", message) for i, message in enumerate(messages)]
    arguments = {"add_generation_prompt": True, **(config or {})}
    text = _rendered(tokenizer, checked, arguments)
    check_text("prompt", text)
    _require_all_used(tokenizer, checked, arguments)
    return checked, arguments, text


def _checked(name: str, message: Any) -> dict[str, Any]:
    """The message with its content as one text."""
    if not isinstance(message, Mapping):
        raise TempoError(
            f'{name} must be a chat message such as {{"role": "user", "content": "Hello"}}, '
            f"got {shown(message)}"
        )
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise TempoError(f"{name} needs a role such as user, got {shown(message.get('role'))}")
    if message.get("tool_calls") and message.get("content") is None:
        return dict(message)
    if "content" not in message:
        raise TempoError(f"{name} has no content")
    content = message["content"]
    if isinstance(content, list) and content:
        content = "".join(_part(f"{name}.content[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise TempoError(
            f"{name}.content must be text or a list of text parts, got {shown(content)}"
        )
    check_text(f"{name}.content", content)
    return {**message, "content": content}


def _part(name: str, part: Any) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind != "text":
        raise TempoError(f"{name} is of type {shown(kind)}; only parts of type 'text' can be read")
    if kind is None or not isinstance(part.get("text"), str):
        raise TempoError(f'{name} must be {{"type": "text", "text": "..."}}, got {shown(part)}')
    text: str = part["text"]
    return text


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, **arguments, tokenize=False)
    except Exception as error:  # a template is a program that comes with the model
        why = " ".join(str(error).split()) or type(error).__name__
        raise TempoError(f"the model's chat template refuses the messages: {why}") from error
    return text


def _require_all_used(
    tokenizer: Any, messages: list[dict[str, Any]], arguments: dict[str, Any]
) -> None:
    """Raise TempoError if the template ignores a message, as some do for unknown roles.

    A mark is added to the end of each content and must appear in the result.
    """
    marks = {i: f"x{i}q7zk" for i, message in enumerate(messages) if "content" in message}
    marked = [
        {**message, "content": (message["content"] or "") + marks[i]} if i in marks else message
        for i, message in enumerate(messages)
    ]
    try:
        text = _rendered(tokenizer, marked, arguments)
    except TempoError:
        return  # the template checks contents, so it does not ignore any
    for i, mark in marks.items():
        if mark not in text:
            raise TempoError(
                f"prompt[{i}] is ignored by the model's chat template, which does not support the "
                f"role {shown(messages[i]['role'])} there"
            )
