"""Oracles that check on this device whether every mode is exact.

Each compares one of our runs with an uncached replay, stock mlx-lm, or NumPy. docs/verification.md
lists what the two sides share. Differences of logits are in units of the standard deviation of the
model's logits over the vocabulary, so one tolerance fits every model. Differences of attention are
absolute.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import dequantize_model

from ..decode.sequences import Batch, SequenceState
from ..errors import TempoError
from ..generation import generate
from ..lattice.lattice import Lattice
from ..models import Capture, PositionedModel
from ..rules.pruning import Pruning
from ..rules.visibility import VISIBILITY
from ..scoring.prefix_tree_scorer import PrefixTreeScorer
from ..scoring.requests import ScoreRequest
from ..text.vocabulary import without_end
from ..weights import load
from .random_models import CONFIGS, VOCABULARY, Letters, random_model

#: Largest difference of a logit, in standard deviations of the logits, by dtype of the
#: activations. In the models used here, rounding moved logits by up to 0.021 in fp16 and 0.18 in
#: bf16. Hiding one of sixteen keys, or moving a sibling by one position, moved them by at least
#: 0.33.
TOLERANCE = {mx.float32: 1e-3, mx.float16: 0.08, mx.bfloat16: 0.4}
#: Largest difference of an attention call's output, relative to its largest value.
KERNEL_TOLERANCE = {mx.float32: 1e-3, mx.float16: 0.015, mx.bfloat16: 0.1}
#: Largest difference of an attention weight. For every dtype, weights are computed in fp32 from the
#: same keys.
ATTENTION_TOLERANCE = 1e-4

#: Unless it is 0, devices with matrix units may round the factors of fp32 products to 10 bits.
TF32_VARIABLE = "MLX_ENABLE_TF32"

EMBEDDED = "smollm2-135m"
EMBEDDED_PROMPT = "The old keeper climbed the stairs and saw"
RANDOM_PROMPT = 16

#: Steps of a run, and tokens of the forced set.
STEPS = 6
SIBLINGS = 4
MAX_PARALLEL = 6
#: Low enough for several tokens in most sets and one token in some.
EMBEDDED_THRESHOLD, RANDOM_THRESHOLD = 0.05, 0.04


#: Slots for scoring: fewer than the texts have tokens, so some are dropped.
SCORE_SLOTS = 64
#: Recurrent states for scoring: fewer than there are texts, so some are dropped.
SCORE_STATES = 6

#: Precisions of weights and activations.
FORMS = ("fp32", "fp16", "bf16", "4-bit")


#: Queries, keys, values, scale, mask and output of one call of mlx-lm's attention.
AttentionCall = tuple[mx.array, mx.array, mx.array, float, mx.array | None, mx.array]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to check.

    Args:
        name: recipe or architecture.
        form: one of :data:`FORMS`.
        model, tokenizer: as mlx-lm loads them.
        prompt: token ids.
        threshold: of the runs.
    """

    name: str
    form: str
    model: nn.Module
    tokenizer: Any
    prompt: list[int]
    threshold: float


@dataclass(frozen=True)
class Check:
    """One oracle's verdict.

    Args:
        model: name of the model.
        form: one of :data:`FORMS`.
        oracle: name of the comparison.
        difference: the largest found; None if nothing was run.
        tolerance: the largest allowed; None if the difference is only for reference.
        note: a remark.
    """

    model: str
    form: str
    oracle: str
    difference: float | None
    tolerance: float | None
    note: str = ""

    @property
    def failed(self) -> bool:
        if self.difference is None or self.tolerance is None:
            return False
        # Also true for NaN.
        return not self.difference <= self.tolerance

    @property
    def verdict(self) -> str:
        """ "ok", "FAIL", "skipped", or "-" if the difference is only for reference."""
        if self.difference is None:
            return "skipped"
        if self.tolerance is None:
            return "-"
        return "FAIL" if self.failed else "ok"


def request_full_precision() -> None:
    """Ask mlx for fp32 products in full precision, unless the user has set the variable.

    Call it before the first product of the process.
    """
    os.environ.setdefault(TF32_VARIABLE, "0")


def rounds_fp32_products() -> bool:
    """Whether the device may round the factors of fp32 products to 10 bits, as in fp16."""
    on_gpu = mx.default_device().type == mx.gpu
    return on_gpu and os.environ.get(TF32_VARIABLE, "1") != "0"


def run_checks(
    everything: bool = False, progress: Callable[[str], None] | None = None
) -> Iterator[Check]:
    """Run all oracles on random models and on the embedded one, in every precision.

    Args:
        everything: also run checks that are slow on this device.
        progress: called with the name of the next check.
    """
    tell = progress or (lambda what: None)
    for subject in random_subjects():
        yield from check(subject, tell)
    tell(f"{EMBEDDED} (loading)")
    try:
        model, tokenizer = load(f"{EMBEDDED}/q4")
    except (TempoError, OSError) as error:
        yield Check(EMBEDDED, "", "all oracles", None, None, str(error))
        return
    for subject in embedded_subjects(model, tokenizer):
        if subject.form == "4-bit" and mx.default_device().type == mx.cpu and not everything:
            note = "on a CPU, mlx takes seconds for each token with 4-bit weights; --all runs it"
            yield Check(subject.name, subject.form, "all oracles", None, None, note)
        else:
            yield from check(subject, tell)


def random_subjects() -> Iterator[Subject]:
    """Tiny random models; mixtures of experts are not cast to half precision.

    Near a tie, rounding can send a token to another expert, which no tolerance can distinguish from
    an error.
    """
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, RANDOM_PROMPT).tolist()
    for name in CONFIGS:
        subject = Subject(
            f"random {name}", "fp32", random_model(name), Letters(), prompt, RANDOM_THRESHOLD
        )
        yield subject
        if name != "qwen3_moe":
            yield from _in_half_precision(subject)
        quantized = random_model(name)
        nn.quantize(quantized, group_size=32, bits=4)
        yield replace(subject, form="4-bit", model=quantized)


def embedded_subjects(model: nn.Module, tokenizer: Any) -> Iterator[Subject]:
    """The embedded model in 4 bits, and dequantised in three precisions."""
    prompt = list(tokenizer.encode(EMBEDDED_PROMPT))
    quantized = Subject(
        EMBEDDED, "4-bit", model, without_end(tokenizer), prompt, EMBEDDED_THRESHOLD
    )
    yield quantized
    full = dequantize_model(model)
    full.set_dtype(mx.float32)
    mx.eval(full.parameters())
    subject = replace(quantized, form="fp32", model=full)
    yield subject
    yield from _in_half_precision(subject)


def _in_half_precision(subject: Subject) -> Iterator[Subject]:
    """The model cast in place to fp16 and bf16, so only one precision is in memory at a time."""
    for form, dtype in (("fp16", mx.float16), ("bf16", mx.bfloat16)):
        subject.model.set_dtype(dtype)
        mx.eval(subject.model.parameters())
        yield replace(subject, form=form)


def check(subject: Subject, tell: Callable[[str], None] = lambda what: None) -> Iterator[Check]:
    """Run all oracles on one model."""
    model = PositionedModel.of(subject.model)
    coarse = model.dtype == mx.float32 and rounds_fp32_products()
    dtype = mx.float16 if coarse else model.dtype
    limits = {
        "none": None,
        "logits": TOLERANCE[dtype],
        "kernel": KERNEL_TOLERANCE[dtype],
        "attention": KERNEL_TOLERANCE[dtype] if coarse else ATTENTION_TOLERANCE,
    }
    for name, oracle in ORACLES.items():
        if oracle.captures and not model.captures_attention:
            continue
        if oracle.merges and model.is_recurrent:
            continue
        tell(f"{subject.name} {subject.form}")
        limit = limits[oracle.limit]
        try:
            difference, note = oracle.compare(subject, model)
        # An error in a device's kernels fails this oracle; the others still run.
        except (RuntimeError, ValueError) as error:
            difference, limit, note = float("nan"), 0.0, f"{type(error).__name__}: {error}"
        yield Check(subject.name, subject.form, name, difference, limit, note)


def logit_spread(subject: Subject) -> float:
    """Standard deviation of the stock model's logits after the prompt, over the vocabulary."""
    return float(np.std(stock_logits(subject.model, subject.prompt)[-1]))


def stock_logits(model: nn.Module, ids: list[int], cached: int = 0) -> np.ndarray:
    """Logits [T, V] of mlx-lm's model with mlx-lm's cache, fp32.

    Args:
        ids: the text.
        cached: number of ids read in a first pass; the rest follow one by one. 0 reads all in one
            pass.
    """
    cache = make_prompt_cache(model)
    tokens = mx.array(ids)[None]
    if cached == 0:
        return _numpy(model(tokens, cache=cache)[0])
    rows = [model(tokens[:, :cached], cache=cache)[0]]
    for i in range(cached, len(ids)):
        rows.append(model(tokens[:, i : i + 1], cache=cache)[0])
        mx.eval(rows)
    return _numpy(mx.concatenate(rows))


def stock_difference(subject: Subject, model: PositionedModel) -> tuple[float, str]:
    """Difference between one pass and reading token by token, both by stock mlx-lm."""
    half = len(subject.prompt) // 2
    whole = stock_logits(subject.model, subject.prompt)
    one_by_one = stock_logits(subject.model, subject.prompt, half)
    note = "rounding alone"
    return float(np.abs(whole - one_by_one).max()) / logit_spread(subject), note


def replay_difference(
    subject: Subject, model: PositionedModel, **settings: Any
) -> tuple[float, str]:
    """Largest difference of a logit between a cached run and its uncached replay, and a note."""
    result = generate(
        model,
        subject.tokenizer,
        subject.prompt,
        threshold=subject.threshold,
        max_parallel=MAX_PARALLEL,
        max_tokens=STEPS,
        verify=True,
        paths=0,
        **settings,
    )
    assert result.verification is not None
    sizes = [len(step.tokens) for step in result.lattice.steps]
    difference = result.verification.max_logit_difference / logit_spread(subject)
    return difference, f"sets of {min(sizes)} to {max(sizes)}"


def retroactive_pruning_difference(subject: Subject, model: PositionedModel) -> tuple[float, str]:
    """The same for a run that prunes half of its tokens and, if possible, weights keys."""
    rule = "attention" if model.captures_attention else "posterior"
    return replay_difference(
        subject,
        model,
        pruning=Pruning(rule=rule, decision="quota", keep_rate=0.5, compact_above=0.0),
        weighting="posterior" if model.takes_additive_masks else "none",
    )


def sibling_difference(
    subject: Subject, model: PositionedModel, visibility: str
) -> tuple[float, str]:
    """Rows of a set whose tokens do not see each other, against a stock pass for each token."""
    length = len(subject.prompt)
    last = stock_logits(subject.model, subject.prompt)[-1]
    siblings = np.argsort(-last)[:SIBLINGS].tolist()
    lattice = Lattice(subject.prompt)
    sequence = SequenceState(lattice, visibility)
    batch = Batch(model, [sequence])
    batch.prefill(length)
    parents = [length - 1] * SIBLINGS if VISIBILITY[visibility].has_parents else None
    new = lattice.reserve(SIBLINGS, 0, parents)
    rows = _numpy(batch.append(mx.array(siblings), [(sequence, new)])[0])
    separate = [stock_logits(subject.model, [*subject.prompt, id], length)[-1] for id in siblings]
    return float(np.abs(rows - separate).max()) / logit_spread(subject), ""


def greedy_difference(subject: Subject, model: PositionedModel) -> tuple[float, str]:
    """Compare threshold 1 with mlx-lm's greedy decoding, token by token.

    If the two choose different tokens, the difference is the gap between their logits in mlx-lm's
    run, and the comparison continues from mlx-lm's text. Rounding can decide a near tie; an error
    shows as a larger gap.

    Returns:
        the largest gap, 0 for identical texts; and a note on how many tokens differed, if any.
    """
    steps = list(generate_step(mx.array(subject.prompt), subject.model, max_tokens=STEPS))
    stock = [int(token) for token, _ in steps]
    largest, ties, agreed = 0.0, 0, 0
    while agreed < STEPS:
        result = generate(
            model,
            subject.tokenizer,
            [*subject.prompt, *stock[:agreed]],
            threshold=1.0,
            max_tokens=STEPS - agreed,
        )
        ours = [tokens[0].id for tokens in result.lattice.sets]
        same = [a == b for a, b in zip(ours, stock[agreed:], strict=True)]
        if all(same):
            break
        wrong = same.index(False)
        logprobs = _numpy(steps[agreed + wrong][1])
        largest = max(largest, abs(float(logprobs[stock[agreed + wrong]] - logprobs[ours[wrong]])))
        ties += 1
        agreed += wrong + 1
    return largest / logit_spread(subject), f"{ties} tokens differ, near-ties" if ties else ""


def score_difference(subject: Subject, model: PositionedModel) -> tuple[float, str]:
    """Scores of branches and of unrelated texts, against a stock pass for each text."""
    prompt, n = subject.prompt, len(subject.prompt)
    texts = [(*prompt[:end], *prompt[:3]) for end in range(2, n)]
    texts += [(*prompt[::-1], *prompt[:end]) for end in range(1, 4)]
    questions = [ScoreRequest(text, min(n, len(text) - 2), after=True) for text in texts]
    budget = SCORE_SLOTS * model.slot_bytes + SCORE_STATES * model.state_bytes
    reader = PrefixTreeScorer(model, budget, n, [[0]])
    largest = 0.0
    for part in (questions[::2], questions):
        for question, answer in zip(part, reader.answer(part), strict=True):
            rows = stock_logits(subject.model, list(question.tokens)).astype(np.float64)
            log_p = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
            start = question.start
            exact = log_p[np.arange(start - 1, len(rows) - 1), question.tokens[start:]]
            assert answer.after is not None
            found = np.append(answer.logprobs, answer.after)
            difference = np.abs(found - np.append(exact, log_p[-1, 0])).max()
            largest = max(largest, float(difference))
    stats = reader.stats
    note = f"{stats.tokens_computed} tokens read, {stats.tokens_reused} reused"
    return largest / logit_spread(subject), note


def attention_difference(subject: Subject, model: PositionedModel) -> tuple[float, str]:
    """Captured attention weights of a set, in all layers, against NumPy's; sums against 1."""
    largest = 0.0
    passed = zip(_captured_pass(subject, model), _windows(subject.model), strict=True)
    for (weights, (queries, keys, _, scale, mask, _)), window in passed:
        seen = _sibling_mask(len(subject.prompt), window)
        if mask is not None and mask.dtype != mx.bool_:
            # Latent attention passes its positional scores here, including the mask.
            seen = _numpy(mask)[0]
        expected = _attention(_numpy(queries)[0], _numpy(keys)[0], scale, seen)
        largest = max(largest, np.abs(weights - expected).max())
        largest = max(largest, np.abs(weights.sum(axis=-1) - 1).max())
    return float(largest), ""


def kernel_difference(subject: Subject, model: PositionedModel) -> tuple[float, str]:
    """Captured weights x values against the kernel's output, relative to the largest value."""
    largest = 0.0
    for weights, (_, _, values, _, _, output) in _captured_pass(subject, model):
        groups = weights.shape[0] // values.shape[1]
        mixed = weights @ np.repeat(_numpy(values)[0], groups, axis=0)
        largest = max(largest, np.abs(mixed - _numpy(output)[0]).max() / np.abs(mixed).max())
    return float(largest), ""


def _captured_pass(
    subject: Subject, model: PositionedModel
) -> Iterator[tuple[np.ndarray, AttentionCall]]:
    """Run a set after the prompt; yields each layer's captured weights [H, T, S] and its call."""
    length = len(subject.prompt)
    cache = model.make_cache()
    prompt = mx.array(subject.prompt)[None]
    mx.eval(model(prompt, np.arange(length)[None], "causal", cache), cache.state)
    with _listening(subject.model) as calls:
        _, captured = model(
            prompt[:, -SIBLINGS:],
            np.full((1, SIBLINGS), length),
            mx.array(_sibling_mask(length))[None, None],
            cache,
            capture=Capture(full=True),
            parents=np.full((1, SIBLINGS), length - 1),
        )
    for layer, call in enumerate(calls):
        yield _numpy(captured[layer])[0].astype(np.float64), call


def _windows(model: nn.Module) -> list[int | None]:
    """The window of each attention layer in positions, including its own; None for no window."""
    kinds = (KVCache, RotatingKVCache)
    return [
        getattr(cache, "max_size", None)
        for cache in make_prompt_cache(model)
        if isinstance(cache, kinds)
    ]


def _sibling_mask(length: int, window: int | None = None) -> np.ndarray:
    """The mask of siblings after a prompt, booleans [SIBLINGS, S]; they do not see each other."""
    near = np.arange(length) > length - (window or length + 1)
    return np.concatenate([np.tile(near, (SIBLINGS, 1)), np.eye(SIBLINGS, dtype=bool)], axis=1)


def _attention(queries: np.ndarray, keys: np.ndarray, scale: float, mask: np.ndarray) -> np.ndarray:
    """softmax(scale q k^T + mask) of [H, T, D] and [H_kv, S, D] in fp64, [H, T, S]."""
    keys = np.repeat(keys, queries.shape[0] // keys.shape[0], axis=0).astype(np.float64)
    scores = scale * queries.astype(np.float64) @ keys.swapaxes(-1, -2)
    scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


@contextmanager
def _listening(model: nn.Module) -> Iterator[list[AttentionCall]]:
    """Record the arguments and results of the model's attention calls."""
    name = "scaled_dot_product_attention"
    files = {type(module).__module__ for module in model.modules()}
    namespaces = [sys.modules[file].__dict__ for file in sorted(files)]
    found = [(namespace, namespace[name]) for namespace in namespaces if name in namespace]
    calls: list[AttentionCall] = []

    def listener(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            queries: mx.array,
            keys: mx.array,
            values: mx.array,
            cache: Any,
            scale: float,
            mask: Any,
            **kwargs: Any,
        ) -> Any:
            output = original(queries, keys, values, cache=cache, scale=scale, mask=mask, **kwargs)
            running = getattr(cache, "forward_pass", None)
            if running is not None and running.recorder is not None:
                # Tokens are packed as rows, [N, H, 1, D] and [N, 1, 1, S], of one sequence.
                moved, mask, given = (x.transpose(2, 1, 0, 3) for x in (queries, mask, output))
                calls.append((moved, keys, values, scale, mask, given))
            return output

        return call

    for namespace, original in found:
        namespace[name] = listener(original)
    try:
        yield calls
    finally:
        for namespace, original in found:
            namespace[name] = original


def _numpy(array: mx.array) -> np.ndarray:
    # NumPy has no bf16.
    return np.array(array.astype(mx.float32))


@dataclass(frozen=True)
class Oracle:
    """One comparison.

    Args:
        compare: (subject, its positioned model) -> the largest difference, and a note.
        limit: name of its tolerance: "logits", "kernel", "attention" or "none".
        captures: whether it needs attention capture.
        merges: whether it needs a model whose tokens can see whole sets.
    """

    compare: Callable[[Subject, PositionedModel], tuple[float, str]]
    limit: str = "logits"
    captures: bool = False
    merges: bool = False


#: Name -> oracle, in the order in which they run.
ORACLES: dict[str, Oracle] = {
    "mlx-lm: cached = uncached": Oracle(stock_difference, "none"),
    **{
        f"{name}: cached = replay": Oracle(
            functools.partial(replay_difference, visibility=name), merges=not rule.has_parents
        )
        for name, rule in VISIBILITY.items()
    },
    "retroactive pruning: cached = replay": Oracle(retroactive_pruning_difference, merges=True),
    **{
        f"{name}: set = mlx-lm's": Oracle(
            functools.partial(sibling_difference, visibility=name),
            merges=not VISIBILITY[name].has_parents,
        )
        for name in ("isolated", "tree")
    },
    "threshold 1 = mlx-lm greedy": Oracle(greedy_difference),
    "scores = mlx-lm, text by text": Oracle(score_difference),
    "attention = NumPy, sum 1": Oracle(attention_difference, "attention", captures=True),
    "attention x values = kernel": Oracle(kernel_difference, "kernel", captures=True),
}
