"""Many prompts in one batch against each prompt alone, and against an uncached replay."""

import dataclasses

from tempo_mlx import PositionedModel, batch_generate, generate
from tempo_mlx.decode.prompt_cache import PromptCache
from tempo_mlx.decode.sequences import spread_evenly
from tempo_mlx.generation import Failure, stream_batch_generate
from tempo_mlx.rules.combining import COMBINE
from tempo_mlx.rules.pruning import Pruning
from tempo_mlx.rules.schedules import Constant
from tempo_mlx.rules.visibility import VISIBILITY
from tempo_mlx.settings import Settings

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ..sweeps import mostly_slow
from ..tiny_models import tiny_model
from ..tiny_tokenizer import TinyTokenizer

MODEL = tiny_model("llama", seed=1)
#: Ends texts now and then, so that rows leave at different times.
TOKENIZER = TinyTokenizer(MODEL.args.vocab_size, end_tokens=(7, 30))

#: A failing batch takes minutes to make smaller, and shows what is wrong as it is.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)

PRUNINGS = [
    None,
    None,
    Pruning(schedule=Constant()),
    Pruning(rule="attention", schedule=Constant(), layers=1, query_weights="probability"),
    Pruning(rule="attention", decision="quota", keep_rate=0.5, layer_weights="rising"),
    Pruning(rule="random", decision="quota", keep_rate=0.5, compact_above=0.0),
    Pruning(schedule=Constant(), repair="recompute"),
    Pruning(rule="probability", schedule=Constant(), if_all_pruned="drop_set"),
]


def meaningful(**given_):
    """Settings, without those that have no meaning where tokens have parents."""
    if VISIBILITY[given_["visibility"]].has_parents:
        given_ |= {"pruning": None, "weighting": "none", "temp": 1.0}
        if given_["visibility"] == "tree":
            given_["sampling"] = "deterministic"
    return Settings(**given_)


rows = st.tuples(
    st.one_of(
        st.lists(st.integers(0, MODEL.args.vocab_size - 1), min_size=1, max_size=25),
        # The same prompt more than once is likely.
        st.sampled_from([[5], [9, 2, 40], list(range(20))]),
    ),
    st.builds(
        meaningful,
        max_tokens=st.integers(1, 12),
        threshold=st.sampled_from([1.0, 0.3, 0.06, 0.03]),
        max_parallel=st.integers(1, 6),
        temp=st.sampled_from([1.0, 0.7]),
        sampling=st.sampled_from(["deterministic", "deterministic", "gumbel"]),
        seed=st.integers(0, 99),
        visibility=st.sampled_from(sorted(VISIBILITY)),
        combine=st.sampled_from(sorted(COMBINE)),
        pruning=st.sampled_from(PRUNINGS),
        weighting=st.sampled_from(["none", "none", "prior", "posterior"]),
        prefill_step_size=st.sampled_from([4, 2048]),
    ),
)


def alone(prompt, each, model=MODEL, tokenizer=TOKENIZER):
    given_ = {f.name: getattr(each, f.name) for f in dataclasses.fields(each)}
    return generate(model, tokenizer, prompt, **given_)


def assert_same(result, expected, atol=1e-4):
    assert result.lattice.prompt_tokens == expected.lattice.prompt_tokens
    assert result.finish_reason == expected.finish_reason
    for step, other in zip(result.lattice.steps, expected.lattice.steps, strict=True):
        assert [t.id for t in step.tokens] == [t.id for t in other.tokens]
        assert [e.id for e in step.endings] == [e.id for e in other.endings]
        assert [(t.slot, t.pruned_at) for t in step.tokens] == [
            (t.slot, t.pruned_at) for t in other.tokens
        ]
        np.testing.assert_allclose(
            [t.probability for t in step.tokens], [t.probability for t in other.tokens], atol=atol
        )
    pairs = zip(result.lattice.transitions, expected.lattice.transitions, strict=True)
    for transition, other in pairs:
        np.testing.assert_allclose(transition, other, atol=atol)


@given(st.lists(rows, min_size=1, max_size=9), st.integers(1, 5))
@settings(max_examples=6, phases=PHASES)
def test_every_row_is_what_its_prompt_gives_alone(cases, batch_size):
    prompts = [prompt for prompt, _ in cases]
    each = [setting for _, setting in cases]
    batch = batch_generate(MODEL, TOKENIZER, prompts, each, batch_size=batch_size, verify=True)
    for result, prompt, setting in zip(batch.results, prompts, each, strict=True):
        assert_same(result, alone(prompt, setting))
        assert result.verification.max_logit_difference < 1e-4
    assert batch.status.done == len(cases) and batch.status.failed == 0
    assert batch.status.steps == sum(len(r.lattice.steps) for r in batch.results)


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["qwen3", "gemma2", "gemma3_text", "gpt_oss", "mixtral"], ["gemma3_text", "mixtral"]
    ),
)
def test_other_architectures(name):
    model = tiny_model(name, seed=2)
    rng = np.random.default_rng(3)
    tokenizer = TinyTokenizer(60, end_tokens=(7, 30))
    prompts = [rng.integers(1, 60, n).tolist() for n in (3, 17, 1, 8, 30)]
    each = [
        Settings(max_tokens=n, threshold=t, visibility=v, max_parallel=4)
        for n, t, v in [
            (9, 0.05, "isolated"),
            (20, 0.08, "visible"),
            (4, 1.0, "isolated"),
            (15, 0.05, "hidden"),
            (12, 0.04, "visible"),
        ]
    ]
    batch = batch_generate(model, tokenizer, prompts, each, batch_size=3, verify=True)
    for result, prompt, setting in zip(batch.results, prompts, each, strict=True):
        assert_same(result, alone(prompt, setting, model, tokenizer))
        assert result.verification.max_logit_difference < 2e-4


def test_thirty_two_rows_in_any_order():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 80, n).tolist() for n in rng.integers(1, 40, 40)]
    each = [
        Settings(
            max_tokens=int(rng.integers(1, 25)),
            threshold=float(rng.choice([1.0, 0.1, 0.04])),
            visibility=str(rng.choice(sorted(VISIBILITY))),
            max_parallel=5,
        )
        for _ in prompts
    ]
    order = rng.permutation(40)
    first = batch_generate(MODEL, TOKENIZER, prompts, each)
    second = batch_generate(MODEL, TOKENIZER, [prompts[i] for i in order], [each[i] for i in order])
    for place, i in enumerate(order):
        assert_same(second.results[place], first.results[i])
    for i in (0, 11, 39):
        assert_same(first.results[i], alone(prompts[i], each[i]))
    assert first.status.largest_waste <= 0.25 + 0.1


def test_prompts_that_are_alike_are_read_once(monkeypatch):
    read = []
    original = type(MODEL).__call__

    def counting(self, inputs, *args, **kwargs):
        read.append(inputs.size)
        return original(self, inputs, *args, **kwargs)

    prompt = list(range(1, 41))
    each = [Settings(max_tokens=1, threshold=t) for t in (1.0, 0.1, 0.05, 0.02)]
    expected = [alone(prompt, setting) for setting in each]
    positioned = PositionedModel.of(MODEL)
    monkeypatch.setattr(type(MODEL), "__call__", counting)
    batch = batch_generate(positioned, TOKENIZER, [prompt] * 4, each)
    assert sum(read) == 40
    for result, one in zip(batch.results, expected, strict=True):
        assert_same(result, one)


def test_a_failing_row_fails_alone():
    prompts = [[1, 2, 3], [], [5000], "", [4, 5]]
    batch = batch_generate(MODEL, TOKENIZER, prompts, threshold=0.1, max_tokens=5)
    assert [isinstance(r, Failure) for r in batch.results] == [False, True, True, True, False]
    assert "empty" in batch.results[1].error and "5000" in batch.results[2].error
    assert batch.status.failed == 3 and batch.status.done == 5
    assert batch.texts[1] is None and batch.texts[0]
    for i in (0, 4):
        assert_same(batch.results[i], alone(prompts[i], Settings(threshold=0.1, max_tokens=5)))


def test_not_a_number_fails_the_row_that_has_it():
    model = tiny_model("llama", seed=1)
    embedding = np.array(model.model.embed_tokens.weight)
    embedding[66] = np.nan
    model.model.embed_tokens.weight = mx.array(embedding)
    prompts = [[1, 2], [3, 66, 4], [5, 6, 7]]
    batch = batch_generate(model, TOKENIZER, prompts, threshold=0.2, max_tokens=4, max_parallel=3)
    assert "not finite" in batch.results[1].error
    for i in (0, 2):
        expected = alone(prompts[i], Settings(threshold=0.2, max_tokens=4, max_parallel=3))
        assert_same(batch.results[i], expected)


def test_rows_wait_for_memory_and_one_that_never_fits_fails():
    slot = 2 * 2 * 16 * MODEL.args.num_hidden_layers * 4
    rng = np.random.default_rng(2)
    prompts = [rng.integers(1, 80, n).tolist() for n in (10, 12, 8, 300, 9, 11)]
    settings_ = {"max_tokens": 20, "threshold": 0.02, "max_parallel": 4}
    each = [Settings(visibility="isolated", **settings_)] * 6
    waited = []
    batch = batch_generate(
        MODEL,
        TOKENIZER,
        prompts,
        each,
        max_kv_bytes=200 * slot,
        progress=lambda status: waited.append((status.waiting_for_memory, status.cache_bytes)),
    )
    assert "max_kv_bytes" in batch.results[3].error
    assert any(held for held, _ in waited)
    assert max(size for _, size in waited) <= 200 * slot
    for i in (0, 1, 2, 4, 5):
        assert_same(batch.results[i], alone(prompts[i], each[i]))


def test_results_are_yielded_as_they_finish():
    prompts = [[1, 2], [3], [4, 5, 6]]
    each = [Settings(max_tokens=n, threshold=1.0) for n in (9, 2, 5)]
    tokenizer = TinyTokenizer(MODEL.args.vocab_size, end_tokens=())
    order = [i for i, _ in stream_batch_generate(MODEL, tokenizer, prompts, each)]
    assert order == [1, 2, 0]


def test_paths_of_a_batch_are_those_of_each_result_alone():
    rng = np.random.default_rng(4)
    prompts = [rng.integers(1, 80, n).tolist() for n in (3, 9, 5, 7)]
    each = [
        Settings(max_tokens=n, threshold=t, max_parallel=4, visibility="isolated")
        for n, t in ((6, 0.03), (1, 1.0), (9, 0.05), (3, 0.02))
    ]
    tokenizer = TinyTokenizer(MODEL.args.vocab_size, end_tokens=())
    results = dict(stream_batch_generate(MODEL, tokenizer, prompts, each, paths=3))
    for i, (prompt, setting) in enumerate(zip(prompts, each, strict=True)):
        expected = alone(prompt, setting, tokenizer=tokenizer).paths(3)
        given_ = {f.name: getattr(setting, f.name) for f in dataclasses.fields(setting)}
        # The prompt is still in the cache there.
        at_once = generate(MODEL, tokenizer, prompt, paths=3, **given_)
        assert at_once.knows_paths(3)
        assert [p.tokens for p in at_once.paths(3)] == [p.tokens for p in expected]
        assert results[i].knows_paths(3)
        assert [p.tokens for p in results[i].paths(3)] == [p.tokens for p in expected]
        np.testing.assert_allclose(
            [p.logprob for p in results[i].paths(3)], [p.logprob for p in expected], atol=1e-4
        )


def test_a_prompt_read_once_starts_many_runs_and_later_ones(tmp_path):
    beginning = list(range(3, 33))
    cache = PromptCache.read(MODEL, TOKENIZER, beginning, prefill_step_size=7)
    cache.save(tmp_path / "prompt.safetensors")
    loaded = PromptCache.load(tmp_path / "prompt.safetensors", MODEL)
    assert loaded.tokens == beginning
    prompts = [[*beginning, 40], beginning, [1, 2], [*beginning, 50, 51, 52], [*beginning, 40]]
    each = [Settings(max_tokens=6, threshold=t) for t in (0.05, 0.1, 0.1, 0.03, 1.0)]
    for one in (cache, loaded, loaded):
        batch = batch_generate(MODEL, TOKENIZER, prompts, each, prompt_cache=one)
        for result, prompt, setting in zip(batch.results, prompts, each, strict=True):
            # What does not begin with the cached text stands behind it.
            whole = [*beginning, 1, 2] if prompt == [1, 2] else prompt
            assert_same(result, alone(whole, setting))


def test_a_prompt_cache_of_another_model_or_of_nothing_is_refused(tmp_path):
    path = tmp_path / "prompt.safetensors"
    PromptCache.read(MODEL, TOKENIZER, [1, 2, 3]).save(path)
    other = tiny_model("llama", seed=2)
    with pytest.raises(ValueError, match="another model"):
        PromptCache.load(path, other)
    with pytest.raises(ValueError, match="another model"):
        batch_generate(other, TOKENIZER, [[1]], prompt_cache=PromptCache.load(path, MODEL))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read"):
        PromptCache.load(tmp_path / "text", MODEL)
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {"a": mx.zeros(1)})
    with pytest.raises(ValueError, match="no prompt cache"):
        PromptCache.load(tmp_path / "weights.safetensors", MODEL)
    arrays, metadata = mx.load(str(path), return_metadata=True)
    mx.save_safetensors(str(path), arrays, {**metadata, "version": "0"})
    with pytest.raises(ValueError, match="version 0"):
        PromptCache.load(path, MODEL)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=32), st.sampled_from([0.0, 0.1, 0.25]))
def test_sequences_are_put_into_rows_that_waste_little(loads, waste):
    row_of, counts = spread_evenly(np.array(loads), waste)
    for row, count in enumerate(counts):
        assert sum(n for n, r in zip(loads, row_of, strict=True) if r == row) == count > 0
    assert sum(loads) >= (1 - waste) * len(counts) * max(counts) - 1e-9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": "text"}, ["prompts", "list"]),
        ({"batch_size": 0}, ["batch_size", "at least 1", "0"]),
        ({"max_kv_bytes": -5}, ["max_kv_bytes", "-5"]),
        ({"paths": -1}, ["paths", "-1"]),
        ({"settings": [Settings()]}, ["settings", "one for each", "1"]),
        ({"threshold": 0.0}, ["threshold", "(0, 1]"]),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as caught:
        batch_generate(MODEL, TOKENIZER, **{"prompts": [[1], [2]], **arguments})
    for word in words:
        assert word in str(caught.value)


def explained(one, other, threshold, atol=1e-2):
    """Whether two sets differ only by tokens that rounding may decide about."""
    p = {t.id: t.probability for t in one.tokens}
    q = {t.id: t.probability for t in other.tokens}
    least = min([*p.values(), *q.values()])
    return all(
        abs(value - threshold) < atol or abs(value - least) < atol
        for id, value in [*p.items(), *q.items()]
        if (id in p) != (id in q)
    )


def test_half_precision_differs_by_rounding_only():
    model = tiny_model("llama", seed=1)
    model.set_dtype(mx.bfloat16)
    rng = np.random.default_rng(6)
    prompts = [rng.integers(1, 80, n).tolist() for n in rng.integers(1, 30, 12)]
    each = [
        Settings(max_tokens=8, threshold=t, visibility=v, max_parallel=4)
        for t in (0.3, 0.1, 0.05)
        for v in ("isolated", "visible", "hidden", "isolated")
    ]
    batch = batch_generate(model, TOKENIZER, prompts, each, batch_size=5)
    whole = 0
    for result, prompt, setting in zip(batch.results, prompts, each, strict=True):
        expected = alone(prompt, setting, model)
        for step, other in zip(result.lattice.steps, expected.lattice.steps, strict=False):
            p = {t.id: t.probability for t in step.tokens}
            q = {t.id: t.probability for t in other.tokens}
            if p.keys() != q.keys():
                assert explained(step, other, setting.threshold)
                break
            for id, value in p.items():
                assert abs(value - q[id]) < 1e-2
        else:
            whole += 1
    assert whole >= 8
