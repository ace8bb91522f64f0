"""A hybrid model's folder from the command line, in fp32 and 4 bits, against stock mlx-lm.

The folder is mlx-lm's own work, and so are the expected numbers: every text is read alone, by a
model that tempo-mlx never wrapped.
"""

import itertools
import json
import re
import shutil

from tempo_mlx import PositionedModel
from tempo_mlx.weights.loading import locate
from tests.brute_scorer import BruteScorer
from tests.comparison import assert_close
from tests.hybrid_folder import save_hybrid_model
from tests.suites import save_suite
from tests.sweeps import mostly_slow

import huggingface_hub
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

pytestmark = pytest.mark.usefixtures("uncompiled")

PROMPT = "The old keeper climbed the stairs and saw the light of the lamp"
SETS = ["--threshold", 0.05, "--max-tokens", 6]
#: Differences of log-probabilities that rounding makes.
CLOSE = 1e-3


@pytest.fixture(scope="module", params=[None, 4], ids=["fp32", "4-bit"])
def hybrid(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    return save_hybrid_model(folder, locate("smollm2-135m"), request.param)


#: For what does not depend on the form of the weights.
fp32_only = pytest.mark.parametrize("hybrid", [None], ids=["fp32"], indirect=True)


@pytest.fixture(scope="module")
def stock(hybrid):
    return Stock(*mlx_lm.load(str(hybrid)))


@pytest.fixture
def made(run, hybrid, tmp_path):
    """Run a command on the folder; returns the JSON that it writes and what it says."""

    def call(command, *arguments):
        output = tmp_path / "made.json"
        code, _, err = run(command, *arguments, "--model", hybrid, "-o", output, "--overwrite")
        assert code == 0, err
        return json.loads(output.read_text()), err

    return call


class Stock:
    """mlx-lm's own model, which reads each text from its beginning."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def log_p(self, ids):
        """log p of what follows each token of a text, [T, V]."""
        logits = self.model(mx.array(ids)[None], cache=make_prompt_cache(self.model))[0]
        rows = np.array(logits.astype(mx.float32), np.float64)
        return rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)

    def logprobs(self, prompt, ids):
        """Of the texts of the first 1, 2, .. of these ids behind a prompt, in nats, [len(ids)]."""
        rows = self.log_p([*prompt, *ids])[len(prompt) - 1 : -1]
        return np.cumsum(rows[np.arange(len(ids)), ids])

    def assert_exact(self, data):
        """Every text of a run has the log-probability of a decode of its own; their number."""
        prompt, chains = data["prompt_tokens"], {}
        for step in data["steps"]:
            for token in step["tokens"]:
                chains[token["slot"]] = [*chains.get(token["parent"], []), token]
        continued = {token["parent"] for chain in chains.values() for token in chain}
        for slot, chain in chains.items():
            if slot not in continued:
                expected = self.logprobs(prompt, [token["id"] for token in chain])
                found = [token["logprob"] for token in chain]
                np.testing.assert_allclose(found, expected, atol=CLOSE)
        for path in data["paths"]:
            ids = [*path["tokens"], *([self.tokenizer.eos_token_id] * path["ended"])]
            expected = self.logprobs(prompt, ids)[-1]
            assert path["logprob"] == pytest.approx(expected, abs=CLOSE)
        return len(chains)


def without_times(data):
    return {name: value for name, value in data.items() if name not in ("stats", "row", "key")}


def lines(path):
    """The records of a file, in the order of its rows."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda record: record["row"])


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


OPTIONS = [
    [],
    ["--visibility", "tree", "--beam-width", 4],
    ["--visibility", "tree", "--beam-width", 3, "--threshold", 1e-9],
    ["--sampling", "gumbel", "--seed", 3],
    ["--prefill-step-size", 1],
    ["--prefill-step-size", 5],
]


@pytest.mark.parametrize(
    ("hybrid", "options"),
    mostly_slow(
        itertools.product([None, 4], OPTIONS),
        [(None, OPTIONS[2]), (None, OPTIONS[4]), (4, OPTIONS[0])],
    ),
    indirect=["hybrid"],
)
def test_every_text_of_a_run_is_a_decode_of_its_own(made, stock, options):
    data, err = made("generate", PROMPT, *SETS, *options, "--verify", "--paths", 4)
    assert stock.assert_exact(data) > 6
    found = data["verification"]
    assert found["rows"] > 6 and found["max_logit_difference"] < CLOSE
    assert "against mlx-lm's own decode of each text" in err


@fp32_only
def test_a_prompt_of_one_token_has_nothing_to_read_before_it(made, stock):
    data, _ = made("generate", "a", *SETS, "--verify")
    assert len(data["prompt_tokens"]) == 1 and stock.assert_exact(data) > 6
    assert data["verification"]["max_logit_difference"] < CLOSE


@fp32_only
@pytest.mark.parametrize(
    "options",
    mostly_slow(
        [
            [],
            ["--visibility", "isolated"],
            ["--visibility", "visible", "--temp", 0.5],
            ["--visibility", "isolated", "--weighting", "prior"],
            ["--visibility", "tree"],
        ],
        [[], ["--visibility", "visible", "--temp", 0.5]],
    ),
)
def test_threshold_one_is_greedy_decoding_whatever_the_visibility(made, stock, options):
    data, _ = made("generate", PROMPT, "--threshold", 1, "-m", 8, *options, "--verify")
    greedy = generate_step(mx.array(data["prompt_tokens"]), stock.model, max_tokens=8)
    [path] = data["paths"]
    assert path["tokens"] == [int(token) for token, _ in greedy]
    expected = stock.logprobs(data["prompt_tokens"], path["tokens"])[-1]
    assert path["logprob"] == pytest.approx(expected, abs=CLOSE)
    assert data["verification"]["max_logit_difference"] < CLOSE


@fp32_only
@pytest.mark.parametrize(
    "options",
    [SETS, pytest.param(["--threshold", 1, "--visibility", "isolated"], marks=pytest.mark.slow)],
)
def test_a_text_ends_before_a_stop(made, options):
    free, _ = made("generate", PROMPT, *options)
    stop = free["text"][5:9]
    data, err = made("generate", PROMPT, *options, "--stop", stop)
    assert data["text"] == free["text"].split(stop)[0] and "ended by stop" in err
    assert len(data["steps"]) < len(free["steps"])


@pytest.mark.slow
@pytest.mark.parametrize("hybrid", mostly_slow([None, 4], [None]), indirect=True)
def test_a_batch_gives_each_row_what_it_gives_alone(run, hybrid, made, stock, tmp_path):
    rows = [
        {"prompt": "The cat", "threshold": 0.05, "max_tokens": 5},
        {"prompt": PROMPT, "visibility": "tree", "beam_width": 3, "threshold": 0.01},
        {"prompt": "The cat", "visibility": "isolated", "threshold": 0.05, "id": "merged"},
        {"prompt": "A b c", "visibility": "isolated", "threshold": 1, "max_tokens": 4},
        {"prompt": "A b c", "temp": 0.5, "threshold": 0.05},
        {"prompt": "a", "threshold": 0.03, "max_tokens": 6},
    ]
    prompts, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    command = ["generate", "--prompts-file", prompts, "--model", hybrid, "-m", 7, "--verify"]
    code, _, err = run(*command, "--paths", 2, "-o", output)
    records = lines(output)
    assert code == 1 and "2 of 6 prompts failed" in err and "Traceback" not in err
    for number in (2, 4):
        error = records[number]["error"]
        assert error.count(f"line {number + 1}: ") == 1
        assert "visibility isolated" in error and "recombined or tree" in error
    for number in (0, 1, 3, 5):
        row = {"max_tokens": 7, **rows[number]}
        options = [(f"--{k.replace('_', '-')}", v) for k, v in row.items() if k != "prompt"]
        flat = [part for option in options for part in option]
        alone, _ = made("generate", row["prompt"], *flat, "--verify", "--paths", 2)
        assert_close(without_times(records[number]), without_times(alone), abs=CLOSE)
        if number != 3:
            assert stock.assert_exact(records[number]) > 4
    # Room for a few branches: prompts wait, and what they give is the same.
    model = PositionedModel(stock.model)
    tight = tmp_path / "tight.jsonl"
    budget = 60 * model.slot_bytes + 14 * model.state_bytes
    code, _, _ = run(*command, "--paths", 2, "-o", tight, "--max-kv-bytes", budget)
    assert code == 1
    for found, expected in zip(lines(tight), records, strict=True):
        assert_close(without_times(found), without_times(expected), abs=CLOSE)
    code, _, _ = run(*command, "-o", tight, "--max-kv-bytes", 3 * model.state_bytes, "--overwrite")
    assert code == 1 and all("max_kv_bytes" in r["error"] for r in lines(tight)[:2])


RESUMED = [
    ("The old keeper climbed", PROMPT, PROMPT),
    (PROMPT, PROMPT, PROMPT),
    ("The old keeper", " saw it", "The old keeper saw it"),
    (PROMPT, PROMPT[:22], PROMPT + PROMPT[:22]),
    ("a", "a", "a"),
    ("a", "a lamp", "a lamp"),
]


@fp32_only
@pytest.mark.parametrize(("cached", "prompt", "joined"), mostly_slow(RESUMED, RESUMED[1:2]))
def test_a_prompt_cache_resumes_what_was_read(run, hybrid, made, tmp_path, cached, prompt, joined):
    cache = tmp_path / "cache.safetensors"
    code, _, err = run("generate", cached, "--model", hybrid, *SETS, "--prompt-cache", cache)
    assert code == 0 and "written" in err
    resumed, err = made("generate", prompt, *SETS, "--prompt-cache", cache, "--verify")
    whole, _ = made("generate", joined, *SETS, "--verify")
    assert "prompt cache:" in err
    assert_close(without_times(resumed), without_times(whole), abs=CLOSE)
    assert resumed["verification"]["max_logit_difference"] < CLOSE


SEARCHES = [
    [],
    ["--leaves-per-batch", 4, "--selection", "puct"],
    ["--evaluation", "rollout", "--depth", 3, "--leaves-per-batch", 4],
]


@pytest.mark.parametrize(
    ("hybrid", "options"),
    mostly_slow(itertools.product([None, 4], SEARCHES), [(None, SEARCHES[2])]),
    indirect=["hybrid"],
)
def test_a_search_knows_what_each_text_alone_says(made, stock, options):
    common = ["--threshold", 0.02, "-m", 5, "-s", 12, *options]
    data, _ = made("search", PROMPT, *common)
    prompt = stock.tokenizer.encode(PROMPT)
    for i, choice in enumerate(data["choices"]):
        log_p = stock.log_p([*prompt, *data["tokens"][:i]])[-1]
        for child in choice["children"]:
            assert np.log(child["prior"]) == pytest.approx(log_p[child["action"]], abs=CLOSE)
    expected = stock.logprobs(prompt, data["tokens"])[-1]
    assert len(data["choices"]) == 5
    assert data["logprob"] == pytest.approx(expected, abs=CLOSE)
    # What is known below a committed token is kept.
    assert data["stats"]["forward_tokens"] < len(prompt) + 5 * 12 * (3 if options else 1)
    bounded, _ = made("search", PROMPT, *common, "--max-kv-bytes", "2MB")
    assert bounded["tokens"] == data["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("hybrid", [None, 4], indirect=True)
def test_scores_are_those_of_every_text_alone(run, hybrid, stock, tmp_path):
    rows = [
        {"context": "he is also", "candidates": ["happy", "sad", ["sea", "see"], "lamplighters"]},
        {"context": "", "candidates": ["so", "it", "so"]},
        {"context": "he is", "candidates": []},
        {"context": "so it goes", "candidates": ["on", ",", "on and on"]},
        {"context": "so it", "candidates": ["goes", ""]},
        {"context": PROMPT, "candidates": ["burning", "."]},
    ]
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    common = ["score", source, "--model", hybrid, "--overwrite", "-o", output]
    # What an empty context is, for want of a token that begins a text.
    stock.tokenizer.bos_token = stock.tokenizer.bos_token or stock.tokenizer.eos_token
    for options, corrected in (([], False), (["--trailing-space-correction"], True)):
        brute = BruteScorer(stock.model, stock.tokenizer, trailing_space_correction=corrected)
        code, _, _ = run(*common, *options)
        assert code == 1
        for row, record in zip(rows, lines(output), strict=True):
            if "" in row["candidates"]:
                assert "candidates[1]" in record["error"]
                continue
            expected = [
                max(brute.score(row["context"], one) for one in ([w] if isinstance(w, str) else w))
                for w in row["candidates"]
            ]
            np.testing.assert_allclose(record["scores"], expected, atol=CLOSE)


@fp32_only
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--visibility", "isolated"], ["visibility isolated", "recombined", "tree"]),
        (["--visibility", "visible"], ["visibility visible", "recombined", "tree"]),
        (["--visibility", "hidden"], ["visibility hidden", "recombined", "tree"]),
        (["--prune", "posterior"], ["pruning", "recombined", "tree"]),
        (["--temp", 0.5], ["temperature", "recombined", "tree"]),
        (["--weighting", "prior"], ["weighting", "recombined", "tree"]),
        (["--plot", "lattice.svg", "--plot-attention"], ["attention", "recurrent"]),
    ],
)
def test_what_has_no_exact_meaning_is_refused_in_a_line(run, hybrid, monkeypatch, options, named):
    monkeypatch.chdir(hybrid)
    before = sorted(hybrid.iterdir())
    code, out, err = run("generate", PROMPT, "--model", hybrid, *SETS, *options)
    assert (code, out) == (2, "") and err.count("\n") == 1, err
    assert (
        all(word in err for word in ["qwen3_next", *named]) and sorted(hybrid.iterdir()) == before
    )


@fp32_only
def test_a_suite_runs_and_one_of_merged_sets_is_refused_before_it_begins(run, hybrid, tmp_path):
    merged = save_suite(tmp_path / "merged.yaml", str(hybrid))
    code, out, err = run("experiment", "run", merged, "-o", tmp_path / "merged")
    assert code == 2 and "visibility isolated" in err and "recombined or tree" in err
    assert err.count("\n") == 1 and not (tmp_path / "merged").exists()
    grid = {"visibility": ["recombined"], "threshold": [0.03, 1.0]}
    suite = save_suite(tmp_path / "suite.yaml", str(hybrid), grid=grid, captures="reductions")
    code, out, _ = run("experiment", "run", suite, "-o", tmp_path / "runs", "--cross-validate", 1)
    assert code == 0 and "8 of 8 runs are done" in out and "0 mismatches" in out


def test_models_say_what_a_branch_costs(run, hybrid, stock, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--some--hybrid"
    shutil.copytree(hybrid, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    code, out, _ = run("models", "--json")
    [found] = json.loads(out)["hub"]
    assert code == 0 and found["supported"] and found["repo"] == "some/hybrid"
    cache = make_prompt_cache(stock.model)
    stock.model(mx.array([[1, 2, 3]]), cache=cache)
    states = [layer for layer in cache if type(layer).__name__ == "ArraysCache"]
    assert found["branch_bytes"] == sum(layer.nbytes for layer in states) > 0
    code, out, _ = run("models")
    assert code == 0 and re.search(rf"{found['branch_bytes'] / 1e3:.1f} kB of\s+states", out)
