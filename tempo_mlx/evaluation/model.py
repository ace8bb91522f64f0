"""A model as lm-evaluation-harness asks one: ``lm_eval.simple_evaluate(TempoLM(...), ...)``."""

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.nn as nn
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..decode.result import GenerationResult
from ..decode.scheduler import default_budget
from ..errors import TempoError
from ..generation import Failure, batch_generate
from ..models import PlainModel, PositionedModel
from ..scoring.requests import ScoreRequest
from ..scoring.scorer import CHUNK_SIZE, reader_of
from ..settings import Settings

#: Tokens of an answer at most, where the task does not say how many.
MAX_TOKENS = 256

#: What a task may say about how answers are generated.
KNOWN = frozenset(
    {"until", "do_sample", "temperature", "top_p", "max_gen_toks", "max_tokens", "num_fewshot"}
)


class TempoLM(TemplateLM):
    """A model whose requests of a task are read as one trie: a shared beginning is read once.

    A context that is longer than the model's loses its first tokens.

    Args:
        model, tokenizer: as :func:`tempo_mlx.load` returns them.
        max_kv_bytes: bytes that may be held; None is half of the memory that is left.
        chunk_size: tokens of a forward pass, at least 1.
        batch_size: answers that are generated at the same time, at least 1.
    """

    def __init__(
        self,
        model: nn.Module | PositionedModel,
        tokenizer: Any,
        max_kv_bytes: int | None = None,
        chunk_size: int = CHUNK_SIZE,
        batch_size: int = 32,
    ):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.chat_config: dict[str, Any] = {}
        self._plain = PlainModel(model)
        self._batch_size = batch_size
        self._reader = reader_of(model, max_kv_bytes or default_budget(), chunk_size, [[], []])

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        id = self.tokenizer.eos_token_id
        return int(id if id is not None else min(self.tokenizer.eos_token_ids))

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        id = getattr(self.tokenizer, "bos_token_id", None)
        return self.eot_token_id if id is None else int(id)

    @property
    def max_length(self) -> int:
        """Tokens of a text at most."""
        return self._plain.context_length or 2**20

    @property
    def tokenizer_name(self) -> str:
        """For the names of the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as the text of the model's chat template."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; the tokens that the tokenizer puts before a text, unless told not to."""
        special = True if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = [(tuple(context), tuple(ids)) for _, context, ids in requests]
        return self._scored(texts)

    def _scored(
        self, texts: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> list[tuple[float, bool]]:
        """log P of tokens behind a context, nats, and whether each is the most probable one."""
        questions = []
        for context, ids in texts:
            if len(ids) > self.max_length:
                raise TempoError(
                    f"a choice has {len(ids)} tokens, the model's context holds {self.max_length}"
                )
            whole = (*context, *ids)[-self.max_length - 1 :]
            questions.append(ScoreRequest(whole, len(whole) - len(ids), greedy=True))
        different = list(dict.fromkeys(question for question in questions if question.asks))
        answers = dict(zip(different, self._reader.answer(different), strict=True))
        found = []
        for question in questions:
            answer = answers.get(question)
            if answer is None or answer.greedy is None:
                found.append((0.0, True))
            else:
                found.append((float(answer.logprobs.sum()), bool(answer.greedy.all())))
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log P of whole texts, nats; each token is predicted once, behind as much as fits."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, predicted = make_disjoint_window(window)
                windows.append((tuple(context), tuple(predicted)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._scored(windows), strict=True):
            totals[i] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop text, the most probable tokens unless the task samples."""
        prompts, settings = [], []
        for request in requests:
            context, asked = request.args
            unknown = sorted(set(asked) - KNOWN)
            if unknown:
                raise TempoError(
                    f"generation_kwargs has {unknown[0]}, which is not known; known are "
                    f"{', '.join(sorted(KNOWN))}"
                )
            settings.append(_settings(asked))
            ids = self.tok_encode(context)
            prompts.append(ids[-max(1, self.max_length - settings[-1].max_tokens) :])
        found = batch_generate(
            self.model, self.tokenizer, prompts, settings, batch_size=self._batch_size
        )
        return [_text(result) for result in found.results]


def _text(result: GenerationResult | Failure) -> str:
    if isinstance(result, Failure):
        raise TempoError(result.error)
    return result.text


def _settings(asked: dict[str, Any]) -> Settings:
    """What a task's ``generation_kwargs`` mean."""
    until = asked.get("until") or []
    most = asked.get("max_gen_toks", asked.get("max_tokens", MAX_TOKENS))
    shared: dict[str, Any] = {
        "max_tokens": int(most),
        "stop": (until,) if isinstance(until, str) else tuple(until),
        "threshold": 1.0,
    }
    temperature = float(asked.get("temperature") or 0.0)
    if not asked.get("do_sample", temperature > 0) or temperature == 0:
        return Settings(**shared)
    top_p = float(asked.get("top_p", 1.0))
    return Settings(
        sampling="gumbel",
        temp=temperature,
        top_p=0.0 if top_p == 1 else top_p,
        visibility="isolated",
        **shared,
    )
