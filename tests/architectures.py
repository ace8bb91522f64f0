"""The comparison of an architecture of mlx-lm with its stock model, behind docs/architectures.md.

``python -m tests.architectures`` compares all and writes that page.

Each accepted type runs a batch of two different rows, whose tokens share positions, and every row
of logits is compared with the stock model reading that one text alone. Prompts are longer than the
sliding windows of the tiny models, and read in two chunks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tempo_mlx.models import Capture, PositionedModel, SlotStore, UnsupportedModelError
from tempo_mlx.models.attention import during
from tests.tiny_models import architectures, shared_model, tiny_model

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import CacheList, make_prompt_cache

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
HEAD = "| type | result | sets | capture | weights | window | reason |"
RULE = "|---|---|---|---|---|---|---|"
TOLERANCE = 5e-4
PROMPT_LENGTH = 14
#: Per batch row: parent of each new token by its number, -1 for the prompt. Row 0 is three
#: siblings with three generations of children, row 1 a chain that branches late.
PARENTS = (
    (-1, -1, -1, 0, 1, 2, 3, 3, 5, 6, 7, 8),
    (-1, 0, 0, 1, 1, 2, 3, 4, 5, 6, 6, 8),
)
#: Tokens appended by each forward pass.
PASSES = (3, 3, 1, 5)


@dataclass(frozen=True)
class Outcome:
    """What the sweep found: ``reason`` says why a type is refused; None means exact."""

    name: str
    reason: str | None
    capture: bool = False
    additive: bool = False
    windows: tuple[int, ...] = ()
    recurrent: bool = False


def stock(model: nn.Module, tokens: list[int]) -> np.ndarray:
    """Logits [V] after the text, by the stock model and its own cache."""
    logits = model(mx.array(tokens)[None], cache=make_prompt_cache(model))
    return np.array(logits[0, -1].astype(mx.float32))


def vocabulary(model: nn.Module) -> int:
    return model(mx.array([[1, 2]]), cache=make_prompt_cache(model)).shape[-1]


def prompts(V: int) -> np.ndarray:
    return np.random.default_rng(7).integers(1, V - 1, (2, PROMPT_LENGTH))


def prefilled(model: PositionedModel, tokens: np.ndarray):
    """A cache that has read the prompts [B, T] in two chunks."""
    kv = model.make_cache(len(tokens))
    for start, end in ((0, 9), (9, tokens.shape[1])):
        positions = np.broadcast_to(np.arange(start, end), (len(tokens), end - start))
        logits = model(mx.array(tokens[:, start:end]), positions, "causal", kv)
        mx.eval(logits, kv.state)
    return kv, np.array(logits[:, -1].astype(mx.float32))


def tree_difference(model: PositionedModel) -> float:
    """Largest difference from stock over all branches of two different trees in one batch."""
    V = vocabulary(model.model)
    prompt = prompts(V)
    kv, last = prefilled(model, prompt)
    worst = max(np.abs(last[b] - stock(model.model, prompt[b].tolist())).max() for b in (0, 1))
    rng = np.random.default_rng(8)
    new = rng.integers(1, V - 1, (2, len(PARENTS[0])))
    depth = np.zeros((2, new.shape[1]), int)
    ancestors = np.zeros((2, new.shape[1], new.shape[1]), bool)
    for b, parents in enumerate(PARENTS):
        for i, parent in enumerate(parents):
            if parent >= 0:
                depth[b, i] = depth[b, parent] + 1
                ancestors[b, i] = ancestors[b, parent]
            ancestors[b, i, i] = True
    start = 0
    for n in PASSES:
        end = start + n
        seen = np.ones((2, n, PROMPT_LENGTH), bool)
        mask = np.concatenate([seen, ancestors[:, start:end, :end]], axis=2)[:, None]
        logits = model(
            mx.array(new[:, start:end]), PROMPT_LENGTH + depth[:, start:end], mx.array(mask), kv
        )
        mx.eval(logits, kv.state)
        rows = np.array(logits.astype(mx.float32))
        for b in (0, 1):
            for i in range(start, end):
                text = [*prompt[b], *new[b, np.flatnonzero(ancestors[b, i])]]
                expected = stock(model.model, [int(t) for t in text])
                worst = max(worst, np.abs(rows[b, i - start] - expected).max())
        start = end
    return float(worst)


def branches_difference(model: PositionedModel, seed: int = 3) -> float:
    """Largest difference from stock over two random trees that grow by ragged steps.

    Any node may be continued later. Half-way, nodes that no later step needs are dropped.
    """
    V = vocabulary(model.model)
    rng = np.random.default_rng(seed)
    caches = [prefilled(model, row[None])[0] for row in prompts(V)]
    kv = SlotStore.merge(caches)
    kv.keeps_states = True
    prompt = prompts(V)
    # Of each sequence its nodes: tokens behind the prompt, and the slots that lead there.
    nodes = [[([], list(range(PROMPT_LENGTH)))] for _ in prompt]
    worst = 0.0
    for step in range(5):
        rows, tokens, parents, chains = [], [], [], []
        for b in (0, 1):
            for _ in range(int(rng.integers(0 if b else 1, 4))):
                text, slots = nodes[b][rng.integers(len(nodes[b]))]
                rows.append(b)
                tokens.append(int(rng.integers(1, V - 1)))
                parents.append(slots[-1])
                chains.append((text + [tokens[-1]], slots))
        ends = kv.counts[rows] + [rows[:i].count(b) for i, b in enumerate(rows)]
        width = int(max(kv.counts + np.bincount(rows, minlength=2)))
        mask = np.zeros((len(rows), width), bool)
        for i, (_, slots) in enumerate(chains):
            mask[i, [*slots, ends[i]]] = True
        depth = np.array([PROMPT_LENGTH + len(text) - 1 for text, _ in chains])
        logits = model(
            mx.array(tokens)[None], depth[None], mx.array(mask)[None, None], kv,
            rows=np.array(rows), parents=np.array(parents)[None],
        )  # fmt: skip
        mx.eval(logits, kv.state)
        for i, (text, slots) in enumerate(chains):
            expected = stock(model.model, [*prompt[rows[i]].tolist(), *text])
            worst = max(worst, np.abs(np.array(logits[0, i].astype(mx.float32)) - expected).max())
            nodes[rows[i]].append((text, [*slots, int(ends[i])]))
        if step == 2:
            keep = []
            for b in (0, 1):
                kept = [nodes[b][0], *(n for n in nodes[b][1:] if rng.random() < 0.6)]
                live = sorted({slot for _, slots in kept for slot in slots})
                nodes[b] = [(text, [live.index(s) for s in slots]) for text, slots in kept]
                keep.append(np.array(live))
            kv.compact(keep)
    return float(worst)


@dataclass(frozen=True)
class Whole:
    """A pass in which nothing is moved."""

    offset: mx.array
    rows = recorder = None
    spread = False

    def mask_by_sequence(self, mask):
        return mask


class Uncached:
    """A cache that stores nothing: all slots as rows [S, 1], each with a copy of all keys."""

    def __init__(self, positions, allowed, window, grouped):
        self.offset = mx.array(positions)
        self.positions, self.allowed, self.window = positions, allowed, window
        self.grouped = grouped

    def make_mask(self, N, return_array=False, window_size=None):
        allowed = self.allowed
        for window in (self.window, window_size):
            if window is not None:
                allowed = allowed & (self.positions[:, None] - self.positions < window)
        mask = mx.array(allowed)[:, None, None]
        return mask[:, :, None] if self.grouped else mask

    def update_and_fetch(self, keys, values):
        each = (
            mx.broadcast_to(x.transpose(2, 1, 0, 3), (len(x), x.shape[1], len(x), x.shape[3]))
            for x in (keys, values)
        )
        self.kept = tuple(each)
        return self.kept

    def keys_and_values(self):
        return self.kept


def shared_difference(model: PositionedModel, visible: bool) -> float:
    """Sets of three, one, two and four tokens in a run that sees them whole, against one pass."""
    V = vocabulary(model.model)
    prompt = prompts(V)
    kv, _ = prefilled(model, prompt)
    rng = np.random.default_rng(9)
    tokens, steps = prompt, np.arange(-PROMPT_LENGTH, 0)
    cached = []
    for step, n in enumerate((3, 1, 2, 4)):
        new = rng.integers(1, V - 1, (2, n))
        tokens = np.concatenate([tokens, new], axis=1)
        steps = np.concatenate([steps, np.full(n, step)])
        allowed = steps[None] <= step if visible else steps[None] < step
        allowed = np.repeat(allowed, n, axis=0) | (
            np.arange(len(steps))[None] == np.arange(len(steps) - n, len(steps))[:, None]
        )
        positions = np.full((2, n), PROMPT_LENGTH + step)
        logits = model(mx.array(new), positions, mx.array(allowed)[None, None], kv)
        mx.eval(logits, kv.state)
        cached.append(np.array(logits.astype(mx.float32)))
    S = len(steps)
    allowed = np.zeros((S, S), bool)
    for q in range(S):
        for k in range(S):
            allowed[q, k] = steps[k] < steps[q] or k == q or (visible and steps[k] == steps[q])
    worst = 0.0
    for row, found in zip(tokens, np.concatenate(cached, axis=1), strict=True):

        def uncached(layer, allowed=allowed):
            if isinstance(layer, CacheList):
                return CacheList(*map(uncached, layer.caches))
            positions = steps + PROMPT_LENGTH
            return Uncached(positions, allowed, layer.window, model.grouped_scores)

        caches = [uncached(layer) for layer in kv.layers]
        # Layers without a cache of their own ask the pass where its tokens are.
        with during(Whole(mx.array(steps + PROMPT_LENGTH))):
            whole = model.model(mx.array(row)[:, None], cache=caches).astype(mx.float32)
        worst = max(worst, np.abs(found - np.array(whole)[PROMPT_LENGTH:, 0]).max())
    return float(worst)


def weighted_difference(model: PositionedModel) -> float:
    """N copies of a token, each with weight 1/N in an additive mask, against stock with one."""
    V = vocabulary(model.model)
    prompt = prompts(V)
    kv, _ = prefilled(model, prompt)
    copies = np.repeat(np.array([[5], [9]]), 3, axis=1)
    weights = np.zeros((2, 1, 3, PROMPT_LENGTH + 3), np.float32)
    weights[..., PROMPT_LENGTH:] = -np.log(3)
    positions = np.full((2, 3), PROMPT_LENGTH)
    first = np.array(model(mx.array(copies), positions, mx.array(weights), kv).astype(mx.float32))
    later = np.zeros((2, 1, 1, PROMPT_LENGTH + 4), np.float32)
    later[..., PROMPT_LENGTH : PROMPT_LENGTH + 3] = -np.log(3)
    after = model(mx.array([[11], [4]]), positions[:, :1] + 1, mx.array(later), kv)
    after = np.array(after.astype(mx.float32))
    worst = 0.0
    for b, (one, two) in enumerate(((5, 11), (9, 4))):
        text = prompt[b].tolist()
        worst = max(worst, np.abs(first[b] - stock(model.model, [*text, one])).max())
        worst = max(worst, np.abs(after[b, 0] - stock(model.model, [*text, one, two])).max())
    return float(worst)


def captured_sums(model: PositionedModel) -> dict[int, np.ndarray]:
    """Per layer the sums of captured attention rows under a mask that isolates three siblings."""
    V = vocabulary(model.model)
    kv, _ = prefilled(model, prompts(V))
    mask = np.concatenate([np.ones((3, PROMPT_LENGTH), bool), np.eye(3, dtype=bool)], axis=1)
    _, attention = model(
        mx.array([[1, 2, 3], [4, 5, 6]]),
        np.full((2, 3), PROMPT_LENGTH),
        mx.array(mask)[None, None],
        kv,
        capture=Capture(full=True),
        parents=np.full((2, 3), PROMPT_LENGTH - 1),
    )
    sums = {}
    for layer, weights in attention.items():
        weights = np.array(weights)
        assert weights.shape[0] == 2 and weights.shape[2:] == (3, PROMPT_LENGTH + 3)
        between_siblings = weights[..., PROMPT_LENGTH:] * ~np.eye(3, dtype=bool)
        assert (between_siblings == 0).all()
        sums[layer] = weights.sum(axis=-1)
    return sums


def examine(name: str) -> Outcome:
    """Refused with a reason, or exact; AssertionError if it is neither."""
    try:
        model = PositionedModel(shared_model(name))
    except UnsupportedModelError as error:
        return Outcome(name, str(error).removeprefix(f"{name}: "))
    assert branches_difference(model) < TOLERANCE, "branches differ from separate stock runs"
    additive = False
    if not model.is_recurrent:
        assert tree_difference(model) < TOLERANCE, "tokens of several depths in one pass"
        assert shared_difference(model, visible=False) < TOLERANCE, "isolated sets"
        assert shared_difference(model, visible=True) < TOLERANCE, "visible sets"
        try:
            additive = weighted_difference(model) < TOLERANCE
            assert additive, "additive masks are accepted and wrong"
        except UnsupportedModelError:
            pass
    if model.captures_attention:
        for sums in captured_sums(model).values():
            assert (sums <= 1 + 1e-5).all() and (sums > 0).all()
    # The wrapped model still is the stock model.
    text = list(range(1, 15))
    np.testing.assert_array_equal(stock(model.model, text), stock(tiny_model(name), text))
    windows = {w for w in (layer.window for layer in model.make_cache().kv) if w}
    assert all(window < PROMPT_LENGTH - 2 for window in windows), "a window is not crossed"
    return Outcome(
        name,
        None,
        model.captures_attention,
        additive,
        tuple(sorted(windows)),
        model.is_recurrent,
    )


def row(outcome: Outcome) -> str:
    """The line of an architecture in the page's table."""
    if outcome.reason is not None:
        reason = " ".join(outcome.reason.split()).replace("|", "/")
        return f"| {outcome.name} | refused | | | | | {reason} |"
    capture, additive = ("yes" if each else "no" for each in (outcome.capture, outcome.additive))
    sets = "no" if outcome.recurrent else "yes"
    window = "yes" if outcome.windows else ""
    return f"| {outcome.name} | exact | {sets} | {capture} | {additive} | {window} | |"


def page(rows: Iterable[str]) -> str:
    """The page with these lines in its table."""
    rows = list(rows)
    n_exact = sum(" | exact | " in each for each in rows)
    return "\n".join(
        [
            "# Architectures",
            "",
            f"Of {len(rows)} model files of mlx-lm, {n_exact} run with parallel tokens and give "
            "the numbers of the stock model; the others are refused with the reason below. "
            "`make docs` repeats the comparison on tiny random models and writes this page.",
            "",
            "*Sets*: sets of tokens may be seen whole (`isolated`, `visible`, `hidden`); where "
            "layers have recurrent state, each branch has its own, in `tree` and `recombined`. "
            "*Capture*: attention weights can be reported. *Weights*: keys can be weighted by an "
            "additive mask. *Window*: the tiny model's sliding window was crossed.",
            "",
            HEAD,
            RULE,
            *rows,
            "",
        ]
    )


def documented() -> dict[str, str]:
    """The lines of the table as the page has them, by architecture."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return {
        line.split(" | ")[0].removeprefix("| "): line for line in lines[lines.index(RULE) + 1 :]
    }


if __name__ == "__main__":
    # On a CPU, compiling takes longer than these models compute.
    mx.disable_compile()
    PAGE.write_text(page(row(examine(name)) for name in architectures()), encoding="utf-8")
