"""Stop texts: the text that is returned is judged, and ends before them."""

import itertools

from tempo_mlx.decode.result import cut_at_stop
from tempo_mlx.decode.stopping import StopAutomaton
from tempo_mlx.generation import batch_generate, generate
from tempo_mlx.lattice.lattice import Step, Token
from tempo_mlx.settings import Settings
from tests.sweeps import mostly_slow
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import TinyTokenizer

import pytest
from hypothesis import given
from hypothesis import strategies as st

PROMPT = [3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9, 32]
N = 8


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=1)


@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "ab", "aab", "é"]), min_size=1, max_size=3)),
    st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=2),
)
def test_a_stop_is_possible_where_some_path_contains_it(sets, stops):
    sets = sets[:5]
    names = sorted({text for texts in sets for text in texts})
    automaton = StopAutomaton(stops, lambda id: names[id].encode())
    for number, texts in enumerate(sets):
        tokens = [Token(names.index(text), text, 0.5, 0) for text in texts]
        automaton.add(Step(number, number, 0.1, tokens))
        paths = ["".join(path) for path in itertools.product(*sets[: number + 1])]
        assert automaton.possible == any(stop in path for path in paths for stop in stops)


def test_the_first_stop_cuts():
    assert cut_at_stop("a stop and a halt", ("halt", "stop")) == "a "
    assert cut_at_stop("nothing", ("halt",)) == "nothing"
    assert cut_at_stop("", ("halt",)) == ""


def lengths(model, tokenizer, **settings):
    """The texts of runs that end after 1, 2, ... steps, each found by itself."""
    return [
        generate(model, tokenizer, PROMPT, max_tokens=n, **settings).text for n in range(1, N + 1)
    ]


@pytest.mark.parametrize("visibility", ["isolated", "visible", "hidden", "recombined", "tree"])
@pytest.mark.parametrize("threshold", mostly_slow([0.03, 1.0], [0.03]))
def test_a_run_ends_at_the_step_whose_text_contains_the_stop(model, visibility, threshold):
    tokenizer = TinyTokenizer(model.args.vocab_size, ())
    settings = {"threshold": threshold, "max_parallel": 3, "visibility": visibility}
    texts = lengths(model, tokenizer, **settings)
    for stop in {texts[-1][i : i + 2] for i in range(N - 1)} | {texts[3][-2:], "no such text"}:
        expected = next((n for n, text in enumerate(texts, 1) if stop in text), None)
        run = generate(model, tokenizer, PROMPT, max_tokens=N, stop=(stop,), **settings)
        assert len(run.lattice) == (expected or N)
        assert run.finish_reason == ("stop" if expected else "length")
        assert run.text == cut_at_stop(texts[(expected or N) - 1], (stop,))
        assert all(stop not in path.text for path in run.paths(5))


@pytest.mark.parametrize("repair", ["none", "recompute"])
def test_the_text_of_a_pruned_lattice_never_contains_the_stop(model, repair):
    from tempo_mlx.rules.pruning import Pruning

    tokenizer = TinyTokenizer(model.args.vocab_size, ())
    pruning = Pruning(rule="posterior", threshold=0.5, repair=repair)
    settings = {"threshold": 0.03, "max_parallel": 3, "pruning": pruning, "visibility": "isolated"}
    free = generate(model, tokenizer, PROMPT, max_tokens=N, **settings)
    assert any(t.pruned_at is not None for step in free.lattice.steps for t in step.tokens)
    for stop in {free.text[i : i + 2] for i in range(N - 1)}:
        run = generate(model, tokenizer, PROMPT, max_tokens=N, stop=(stop,), **settings)
        assert run.finish_reason == "stop" and stop not in run.text
        assert len(run.lattice) <= N


def test_in_a_batch_each_row_ends_at_its_own_stop(model):
    tokenizer = TinyTokenizer(model.args.vocab_size, ())
    rows = []
    for visibility in ("isolated", "recombined", "visible"):
        free = Settings(threshold=0.03, max_parallel=3, visibility=visibility, max_tokens=N)
        text = generate(model, tokenizer, PROMPT, **vars(free)).text
        rows += [Settings(**{**vars(free), "stop": (text[at : at + 2],)}) for at in (1, 4)]
    batch = batch_generate(model, tokenizer, [PROMPT] * len(rows), rows)
    for row, found in zip(rows, batch.results, strict=True):
        alone = generate(model, tokenizer, PROMPT, **vars(row))
        assert (found.text, found.finish_reason) == (alone.text, alone.finish_reason)
        assert len(found.lattice) == len(alone.lattice)
        assert found.finish_reason == "stop"


class SplitTokenizer(TinyTokenizer):
    """Each id is the letter a, or one byte of a character of three."""

    character = "天"

    def convert_ids_to_tokens(self, id):
        return (b"a" + self.character.encode())[id % 4 :][:1]

    def decode(self, ids):
        return b"".join(map(self.convert_ids_to_tokens, ids)).decode(errors="replace")


@pytest.mark.parametrize("visibility", ["recombined", "isolated", "tree"])
@pytest.mark.parametrize("threshold", [0.1, 1.0])
def test_a_stop_that_tokens_split_is_found(visibility, threshold):
    settings = {"threshold": threshold, "max_parallel": 2, "visibility": visibility}
    stopped = 0
    # The text of the 19th is the first that holds the character whatever the settings are.
    for seed in range(19, 39):
        model = tiny_model("llama", seed=seed)
        tokenizer = SplitTokenizer(model.args.vocab_size, ())
        stop = tokenizer.character
        free = generate(model, tokenizer, PROMPT, max_tokens=12, **settings)
        run = generate(model, tokenizer, PROMPT, max_tokens=12, stop=(stop,), **settings)
        assert stop not in run.text
        if stop in free.text:
            assert run.finish_reason == "stop" and len(run.lattice) <= len(free.lattice)
            stopped += 1
        if stopped == 1:
            break
    assert stopped
