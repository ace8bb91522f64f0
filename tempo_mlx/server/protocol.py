"""What clients send: requests of OpenAI's interface, and the settings that they mean.

An unknown field, or one that cannot be honoured, is an error that names it: nothing is accepted
and ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import TempoError
from ..rules.pruning import Pruning
from ..settings import Settings

#: Texts of one request at most.
MOST_TEXTS = 128

#: Prompts of one request at most.
MOST_PROMPTS = 2048

#: Alternatives of each token that are told at most.
MOST_LOGPROBS = 20

#: Threshold of a tree whose branches are the most probable texts, whatever their probability.
ANY = 1e-9


class Strict(BaseModel):
    """A request none of whose fields is unknown."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    include_usage: bool = False


class TempoOptions(Strict):
    """What this engine can do beyond OpenAI's interface."""

    threshold: float = 0.1
    visibility: str | None = None
    max_parallel: int = 16
    beam_width: int = 8
    pruning: dict[str, Any] | None = None
    return_: Literal["lattice"] | None = Field(None, alias="return")


class JsonSchemaFormat(Strict):
    name: str = ""
    description: str = ""
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class Sampling(Strict):
    """Fields that completions and chat completions share."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_TEXTS)] = 1
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    regex: str | None = None
    grammar: str | None = None
    use_beam_search: bool = False
    user: str | None = None
    tempo: TempoOptions | None = None

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0 and not self.use_beam_search and self.tempo is None

    @property
    def is_tree(self) -> bool:
        """Whether the n texts are the most probable distinct ones of one tree."""
        return self.tempo is None and not self.samples and (self.n > 1 or self.use_beam_search)

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def settings(self, max_tokens: int, width: int) -> Settings:
        """The settings that the request means.

        Args:
            max_tokens: steps at most.
            width: texts that one tree keeps.

        Raises:
            TempoError: for what does not go together.
        """
        shared = {
            "max_tokens": max_tokens,
            "stop": self.stops,
            "top_p": 0.0 if self.top_p == 1.0 else self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty or None,
            "frequency_penalty": self.frequency_penalty or None,
            "logit_bias": self._biases(),
            **self._grammar(),
        }
        if self.tempo is not None:
            given = self.tempo
            return Settings(
                threshold=given.threshold,
                visibility=given.visibility,
                max_parallel=given.max_parallel,
                beam_width=given.beam_width,
                pruning=None if given.pruning is None else Pruning(**given.pruning),
                **shared,
            )
        if self.is_tree:
            return Settings(
                threshold=ANY, visibility="tree", max_parallel=width, beam_width=width, **shared
            )
        if self.samples:
            return Settings(
                threshold=1.0,
                sampling="gumbel",
                temp=self.temperature,
                visibility="isolated",
                seed=self.seed,
                **shared,
            )
        return Settings(threshold=1.0, **shared)

    def _biases(self) -> dict[int, float] | None:
        if not self.logit_bias:
            return None
        try:
            return {int(id): bias for id, bias in self.logit_bias.items()}
        except ValueError as error:
            raise TempoError(f"logit_bias must have token ids as keys: {error}") from error

    def _grammar(self) -> dict[str, Any]:
        found: dict[str, Any] = {"regex": self.regex, "grammar": self.grammar}
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_object":
            found["json_schema"] = {"type": "object"}
        elif wanted is not None and wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise TempoError("response_format json_schema needs json_schema.schema")
            found["json_schema"] = wanted.json_schema.schema_
        return found


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    best_of: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, text or ids.

        Raises:
            TempoError: if there is none, or too many.
        """
        given: Any = self.prompt
        if isinstance(given, str) or (given and all(isinstance(each, int) for each in given)):
            given = [given]
        if not 0 < len(given) <= MOST_PROMPTS:
            raise TempoError(f"prompt must be 1 to {MOST_PROMPTS} prompts, got {len(given)}")
        return list(given)


class Message(BaseModel):
    """A message of a conversation; a template may know further fields."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: content as one text.

        Raises:
            TempoError: for a part that is not text.
        """
        data = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            for part in self.content:
                if part.get("type") != "text":
                    raise TempoError(
                        f"messages.content: parts must be text, got {part.get('type')!r}"
                    )
            data["content"] = "".join(part.get("text", "") for part in self.content)
        return data


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None


class ScoreRequestBody(Strict):
    """POST /v1/score: words that may go on from contexts."""

    model: str
    contexts: Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
    candidates: Annotated[list[list[str]], Field(min_length=1, max_length=MOST_PROMPTS)]


class HypothesisBody(Strict):
    """A text of a decoder's list; see :class:`.rescoring.Hypothesis`."""

    text: str
    ac: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    lm: Annotated[float, Field(allow_inf_nan=False)] = 0.0


class NBestBody(Strict):
    """See :class:`.rescoring.NBest`."""

    nbest: Annotated[list[HypothesisBody], Field(min_length=1, max_length=MOST_PROMPTS)]
    utt: str | None = None
    context: str = ""


class WeightsBody(Strict):
    """See :class:`.rescoring.Weights`."""

    acoustic_scale: float = 1.0
    alpha: float = 0.5
    word_bonus: float = 0.0
    token_penalty: float = 0.0


class RescoreRequestBody(Strict):
    """POST /v1/rescore: a decoder's lists, to be ranked again."""

    model: str
    lists: Annotated[list[NBestBody], Field(min_length=1, max_length=MOST_PROMPTS)]
    weights: WeightsBody = WeightsBody()
    end: bool | str = True


class TokenizeRequest(Strict):
    """POST /tokenize."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
