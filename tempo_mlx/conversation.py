"""A conversation with a model, whose cache goes on from answer to answer."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.nn as nn

from .arguments import check_count, check_text
from .decode.decoder import BatchDecoder
from .decode.paths import find_paths
from .decode.prompt_cache import ReadTokens, read_by
from .decode.request import Request
from .decode.result import BEAM, GenerationResult, Path, cut_at_stop
from .errors import TempoError
from .generation import StepResponse, begin, steps_of
from .lattice.lattice import Step
from .models import PositionedModel, SlotStore
from .settings import Settings
from .text.chat import encode_chat
from .text.vocabulary import Prompt, Vocabulary, encode_text, require_tokenizer

#: Paths of an answer that are found with it.
PATHS = 5


@dataclass(frozen=True)
class Turn:
    """What a user said, and the answer.

    Args:
        user: the user's text.
        result: the run that made the answer, or its last part.
        path: of the result, the one that counts as the answer.
        before: ids of the answer that earlier runs made, whose prompt the result's contains.
    """

    user: str
    result: GenerationResult
    path: Path
    before: tuple[int, ...] = ()

    @property
    def ids(self) -> list[int]:
        """Ids of the whole answer."""
        return [*self.before, *self.path.tokens]

    @property
    def answer(self) -> str:
        """Text of the whole answer."""
        if not self.before:
            return self.path.text
        text = self.result.vocabulary.decode(self.ids)
        return cut_at_stop(text, self.result.settings.stop)


@dataclass(frozen=True)
class Reading:
    """What reading the latest prompt took.

    Args:
        read, kept: tokens of the prompt that went through the model, and that the cache had.
        reread_because: why nothing was kept although something had been read; None otherwise.
    """

    read: int
    kept: int
    reread_because: str | None = None


@dataclass(frozen=True, eq=False)
class _Held:
    """What the latest run left in the cache.

    Args:
        request: the run.
        store: one row, its slots in the order of the request's ``held``.
        ids: of the answer's path so far as it was chosen among this run's.
    """

    request: Request
    store: SlotStore
    ids: tuple[int, ...]


class Conversation:
    """Answers through the model's chat template, each a run with parallel sets.

    The whole conversation is put through the template for each answer. What the cache holds of it
    from the latest run is not read again: the prompt, and of the answer every token that saw only
    the tokens before it on its path, which in ``recombined`` and ``tree`` are all.

    Args:
        model, tokenizer: as :func:`tempo_mlx.load` returns them.
        settings: of the next answers; may be replaced between them.
        system: the system message, if there is one.
        template: False appends what the user says to the text instead, for models without a chat
            template.
        template_config: further arguments of the template, such as ``{"enable_thinking": False}``.

    Raises:
        TempoError: if the model has no chat template, and ``template`` is not False.
        UnsupportedModelError: if the model cannot hold parallel tokens exactly.
    """

    def __init__(
        self,
        model: nn.Module | PositionedModel,
        tokenizer: Any,
        settings: Settings | None = None,
        system: str | None = None,
        template: bool = True,
        template_config: Mapping[str, Any] | None = None,
    ):
        require_tokenizer(tokenizer)
        if template and not getattr(tokenizer, "has_chat_template", False):
            raise TempoError("the model has no chat template; --no-chat continues the text instead")
        self.model = PositionedModel.of(model)
        self.tokenizer = tokenizer
        self.settings = settings or Settings()
        self.system = system
        self.template = template
        self.template_config = dict(template_config or {})
        self.turns: list[Turn] = []
        #: what reading the latest prompt took
        self.reading: Reading | None = None
        self._vocabulary = Vocabulary(tokenizer)
        self._held: _Held | None = None
        self._stop = False

    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        spoken = [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in (("user", turn.user), ("assistant", turn.answer))
        ]
        return [*system, *spoken]

    def ask(self, text: str) -> Generator[StepResponse, None, None]:
        """Answer what the user says, one response for each step.

        The turn is recorded with the last response. Where the generator is closed or :meth:`stop`
        is called after a first step, the answer so far is recorded.

        Raises:
            ValueError: if the text is empty or the conversation is too long for the model.
        """
        if not text:
            raise TempoError("the message is empty")
        check_text("the message", text)
        yield from self._run(self._prompt(text), text)

    def go_on(self) -> Generator[StepResponse, None, None]:
        """Continue the latest answer as if it had not ended there.

        Raises:
            ValueError: if there is none, or the conversation is too long for the model.
        """
        turn = self._latest()
        earlier, self.turns = self.turns, self.turns[:-1]
        try:
            prompt = self._prompt(turn.user)
        finally:
            self.turns = earlier
        yield from self._run([*prompt, *turn.ids], turn.user, turn)

    def stop(self) -> None:
        """End the running answer after its present step."""
        self._stop = True

    def paths(self, k: int = PATHS) -> list[Path]:
        """The best paths of the latest answer, or of its last part; at most :data:`PATHS`."""
        return self._latest().result.paths(min(k, PATHS))

    def pick(self, k: int) -> Path:
        """Make the k-th of :meth:`paths`, counted from 1, the answer, and return it.

        Raises:
            ValueError: if there is none.
        """
        turn, paths = self._latest(), self.paths()
        check_count("pick", k, 1, len(paths))
        self.turns[-1] = replace(turn, path=paths[k - 1])
        if self._held is not None and self._held.request.result is turn.result:
            self._held = replace(self._held, ids=tuple(paths[k - 1].tokens))
        return paths[k - 1]

    def undo(self) -> Turn:
        """Take the latest turn back, and return it.

        Raises:
            ValueError: if there is none.
        """
        self._latest()
        return self.turns.pop()

    def last_set(self) -> Step | None:
        """The latest step of the latest answer that had a choice; None if none had."""
        steps = self._latest().result.lattice.steps
        choices = (step for step in reversed(steps) if len(step.tokens) + len(step.endings) > 1)
        return next(choices, None)

    def to_dict(self) -> dict[str, Any]:
        """The conversation as JSON-ready data: its messages, and the result of each answer."""
        return {
            "messages": self.messages(),
            "settings": self.settings.to_dict(),
            "answers": [turn.result.to_dict(PATHS) for turn in self.turns],
        }

    def _latest(self) -> Turn:
        if not self.turns:
            raise TempoError("there is no answer yet")
        return self.turns[-1]

    def _prompt(self, text: str) -> list[int]:
        """Ids of the conversation, with what the user says now."""
        if self.template:
            messages = [*self.messages(), {"role": "user", "content": text}]
            return encode_chat(self.tokenizer, messages, self.template_config)
        spoken = [part for turn in self.turns for part in (turn.user, turn.answer)]
        return encode_text(self.tokenizer, "".join([self.system or "", *spoken, text]))

    def _run(
        self, prompt: Prompt, user: str, continued: Turn | None = None
    ) -> Generator[StepResponse, None, None]:
        self._stop = False
        result = begin(
            self.model, self.tokenizer, prompt, self.settings, vocabulary=self._vocabulary
        )
        known = self._known()
        tokens = result.lattice.prompt_tokens
        kept = known.covers(tokens) if known else 0
        cannot = known is not None and not kept and bool(known.cache.states)
        self.reading = Reading(
            len(tokens) - kept,
            kept,
            "recurrent layers keep the state of the whole text, which cannot be cut back"
            if cannot
            else None,
        )
        request = Request(result, paths=PATHS, keeps_slots=True)
        assert isinstance(result.model, PositionedModel)
        decoder = BatchDecoder(result.model)
        responses = steps_of(request, decoder, self._while_reading, known, PATHS)
        try:
            for response in responses:
                yield response
                if self._stop:
                    break
        finally:
            responses.close()
            if request.step:
                self._record(request, decoder, user, continued)

    def _while_reading(self, done: int, total: int) -> None:
        if self._stop:
            raise KeyboardInterrupt

    def _record(
        self, request: Request, decoder: BatchDecoder, user: str, continued: Turn | None
    ) -> None:
        """The run has come to its end, or to one that was asked for: its answer counts."""
        result = request.result
        if not request.finished:
            result.finish_reason = "interrupted"
            decoder.leave(request)
            find_paths([result], BEAM, [request.prompt_slots])
        if request.error is not None or request.slots is None:
            return
        path = result.paths(1)[0]
        self._held = _Held(request, request.slots, tuple(path.tokens))
        if continued is None:
            self.turns.append(Turn(user, result, path))
        else:
            self.turns[-1] = Turn(user, result, path, tuple(continued.ids))

    def _known(self) -> ReadTokens | None:
        """What the cache holds of the text that the latest run read and made."""
        held = self._held
        if held is None:
            return None
        return read_by(held.request, held.store, held.ids)
