"""Rules of the user's own and old names: through Python, the command line, prompt files, suites."""

import json
import pickle
import warnings
from dataclasses import dataclass
from typing import ClassVar

from tempo_mlx import CombiningRule, Pruning, PruningRule, Settings, Visibility, generate, search
from tempo_mlx.decode.prompt_files import read_prompts, row_settings
from tempo_mlx.errors import TempoError
from tempo_mlx.old_names import RenamedWarning
from tempo_mlx.rules.own import load_rule
from tempo_mlx.rules.pruning import DecisionRule
from tempo_mlx.rules.schedules import Constant
from tempo_mlx.rules.selection import SamplingRule
from tempo_mlx.search import SearchSettings
from tests.suites import save_suite
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import TinyTokenizer

import mlx.core as mx
import numpy as np
import pytest

PROMPT = [3, 14, 15, 9, 2, 6]
SETS = {"threshold": 0.03, "max_tokens": 8, "max_parallel": 4}

RULES = """
from dataclasses import dataclass

import numpy as np

from tempo_mlx import PruningRule, Visibility


@dataclass(frozen=True)
class Near(Visibility):
    steps: int = 2

    def allowed(self, queries, keys):
        age = queries.step[:, None] - keys.step
        return (keys.step < 0) | (age > 0) & (age <= self.steps)

    def sees(self, query, key):
        return key.step < 0 or 0 < query.step - key.step <= self.steps


class NeedsArguments(Near):
    def __init__(self, steps):
        super().__init__(steps)


def squared(p):
    return p**2 / (p**2).sum()


def last_slots(evidence):
    return evidence.slots.astype(float)


watched = PruningRule("watched", lambda evidence: evidence.attention, needs_attention=True)
number = 3
text = "isolated"


def broken(given):
    return undefined
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=1)


@pytest.fixture(scope="module")
def tokenizer(model):
    return TinyTokenizer(model.args.vocab_size, end_tokens=())


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text(RULES)
    return path


def tokens(result):
    return [[token.id for token in step.tokens] for step in result.lattice.steps]


def pruned(result):
    return [t.slot for s in result.lattice.steps for t in s.tokens if t.pruned_at is not None]


def test_a_combining_rule_is_used_and_named(model, tokenizer):
    def first(p):
        return np.eye(len(p))[0]

    by_hand = CombiningRule("mixture in other words", lambda p: p / p.sum())
    plain = generate(model, tokenizer, PROMPT, visibility="isolated", **SETS)
    same = generate(model, tokenizer, PROMPT, visibility="isolated", combine=by_hand, **SETS)
    assert tokens(same) == tokens(plain)
    assert same.to_dict(0)["settings"]["combine"] == "mixture in other words"
    other = generate(model, tokenizer, PROMPT, visibility="isolated", combine=first, **SETS)
    assert tokens(other) != tokens(plain) and other.settings.to_dict()["combine"] == "first"
    logs = CombiningRule("logs", lambda p: p / p.sum(), in_logs=True)
    product = generate(model, tokenizer, PROMPT, visibility="isolated", combine="product", **SETS)
    again = generate(model, tokenizer, PROMPT, visibility="isolated", combine=logs, **SETS)
    assert tokens(again) == tokens(product)


@pytest.mark.parametrize("factors", [lambda p: p[:1], lambda p: -p, lambda p: p * np.nan])
def test_invalid_factors_are_refused(model, tokenizer, factors):
    with pytest.raises(TempoError, match=r"combine <lambda> must return . numbers"):
        generate(model, tokenizer, PROMPT, combine=factors, **SETS)


def test_a_pruning_rule_and_a_decision_are_used_and_named(model, tokenizer):
    def slots(evidence):
        return evidence.slots.astype(float)

    def lowest(scores, judging):
        return scores == scores.min()

    run = {**SETS, "visibility": "isolated", "verify": True}
    pruning = Pruning(rule=slots, decision=lowest, lookback=1)
    result = generate(model, tokenizer, PROMPT, pruning=pruning, **run)
    sets = [step.tokens for step in result.lattice.steps[:-2] if len(step.tokens) > 1]
    assert pruned(result)[: len(sets)] == [tokens[0].slot for tokens in sets]
    written = result.to_dict(0)
    assert (written["settings"]["pruning"]["rule"], pruning.to_dict()["decision"]) == (
        "slots",
        "lowest",
    )
    assert result.verification.max_logit_difference < 1e-4
    decided = DecisionRule("none", lambda scores, judging: np.zeros(len(scores), bool))
    kept = generate(model, tokenizer, PROMPT, pruning=Pruning(decision=decided), **run)
    assert not pruned(kept)


def test_a_pruning_rule_gets_the_attention_that_it_asks_for(model, tokenizer):
    totals = []

    def note(evidence):
        totals.append(evidence.attention.sum())
        return evidence.attention

    run = {**SETS, "visibility": "isolated"}
    rule = PruningRule("noted", note, needs_attention=True)
    result = generate(model, tokenizer, PROMPT, pruning=Pruning(rule=rule), **run)
    assert totals and all(0 < total < 1 for total in totals)
    constant = Pruning(rule="attention", schedule=Constant(), threshold=0.9)
    ours = Pruning(rule=rule, schedule=Constant(), threshold=0.9)
    named, own = (
        generate(model, tokenizer, PROMPT, pruning=each, **run) for each in (constant, ours)
    )
    assert pruned(named) == pruned(own) != []
    assert {t.pruned_by for s in own.lattice.steps for t in s.tokens} == {None, "noted"}
    assert not Settings(pruning=Pruning(rule=rule, layers=1)).notes()
    assert result.settings.pruning.rule is rule


@pytest.mark.parametrize("rule", [lambda e: e.slots[:1], lambda e: e.slots * np.nan])
def test_invalid_scores_are_refused(model, tokenizer, rule):
    with pytest.raises(TempoError, match=r"prune rule <lambda> must return . numbers"):
        generate(model, tokenizer, PROMPT, pruning=Pruning(rule=rule), **SETS)


def test_a_sampling_rule_ranks_the_candidates(model, tokenizer):
    def rarest_of_ten(p, keys):
        return mx.where(p >= mx.sort(p, axis=-1)[:, -10:-9], -p, -1 - p)

    run = {"max_tokens": 4, "max_parallel": 2, "visibility": "isolated", "threshold": 1e-9}
    result = generate(model, tokenizer, PROMPT, sampling=rarest_of_ten, verify=True, **run)
    assert all(step.tokens[0].probability < 0.5 for step in result.lattice.steps)
    assert tokens(result) != tokens(generate(model, tokenizer, PROMPT, **run))
    assert result.verification.max_logit_difference < 1e-4
    drawing = SamplingRule("noisy", lambda p, keys: p, draws=True)
    assert generate(model, tokenizer, PROMPT, sampling=drawing, **run).settings.seed is not None


def test_search_takes_rules_and_settings(model, tokenizer):
    def first_child(siblings, exploration):
        return -np.arange(len(siblings.visits), dtype=float)

    def worst(probabilities):
        return min(probabilities)

    settings = SearchSettings(
        max_tokens=2, simulations=6, selection=first_child, evaluation=worst, leaves_per_batch=1
    )
    result = search(model, tokenizer, PROMPT, settings=settings)
    written = result.to_dict()["settings"]
    assert (written["selection"], written["evaluation"]) == ("first_child", "worst")
    assert result.to_dict()["value"] is None
    judged = search(model, tokenizer, PROMPT, value=lambda ids, text: 0.5, max_tokens=1)
    assert judged.to_dict()["value"] == "<lambda>"
    visited = [child["visits"] for child in result.choices[0].children]
    assert visited[0] == 6 and sum(visited) == 6
    with pytest.raises(TypeError, match="as well as settings"):
        search(model, tokenizer, PROMPT, settings=settings, simulations=3)
    with pytest.raises(TempoError, match="settings must be SearchSettings"):
        search(model, tokenizer, PROMPT, settings=Settings())


@dataclass(frozen=True)
class Window(Visibility):
    """Chains of parents of which a token sees the last few."""

    parents: ClassVar[str] = "branch"
    tokens: int = 3

    def allowed(self, queries, keys):
        near = [np.isin(keys.index, chain[-self.tokens :]) for chain in queries.chains]
        return (keys.step < 0) | np.array(near)

    def sees(self, query, key):
        return key.step < 0 or key.index in sorted(query.chain)[-self.tokens :]


class ChainedWindow(Window):
    parents = "chain"


@pytest.mark.parametrize("rule", [Window(), ChainedWindow()])
def test_a_visibility_with_parents_branches_and_is_verified(model, tokenizer, rule):
    run = {**SETS, "max_tokens": 14, "beam_width": 4}
    result = generate(model, tokenizer, PROMPT, visibility=rule, verify=True, **run)
    assert result.verification.max_logit_difference < 1e-4
    named = generate(
        model, tokenizer, PROMPT, visibility="tree" if rule.branches else "recombined", **run
    )
    assert tokens(result) != tokens(named)
    assert all(t.parent is not None for s in result.lattice.steps for t in s.tokens)
    without_effect = ["combine"] if rule.branches else ["beam_width"]
    notes = Settings(visibility=rule, combine="mean", beam_width=3, max_parallel=5).notes()
    assert [note.split()[0] for note in notes] == without_effect
    with pytest.raises(TempoError, match=r"pruning judges .* with visibility \w*Window\(tokens=3"):
        Settings(visibility=rule, pruning=Pruning())


def test_settings_and_their_names_do_not_mix(model, tokenizer):
    settings = Settings(**SETS)
    given = generate(model, tokenizer, PROMPT, settings=settings)
    assert tokens(given) == tokens(generate(model, tokenizer, PROMPT, **SETS))
    assert given.settings == settings.resolved(given.model)
    with pytest.raises(TypeError, match="'threshold' is given as well as settings"):
        generate(model, tokenizer, PROMPT, settings=settings, threshold=0.5)
    with pytest.raises(TempoError, match="settings must be Settings"):
        generate(model, tokenizer, PROMPT, settings={"threshold": 0.5})


def test_built_in_rules_are_stored_by_name_and_own_rules_are_distinguished(rules):
    near = load_rule(f"{rules}:Near", "visibility", Visibility)
    assert Settings(visibility=near) == Settings(visibility=near)
    assert Settings(combine=Settings().combining_rule).combine == "mixture"
    assert Settings().identity() == Settings(visibility=Settings().visibility_rule).identity()
    own = Settings(visibility=near)
    assert own.to_dict()["visibility"] == "Near(steps=2)"
    wider = Settings(visibility=type(near)(steps=3))
    assert own.identity() != wider.identity()
    assert pickle.loads(pickle.dumps(own)).visibility.steps == 2
    rules.write_text(RULES + "\n# changed\n")
    changed = Settings(visibility=load_rule(f"{rules}:Near", "visibility", Visibility))
    assert changed.to_dict() == own.to_dict() and changed.identity() != own.identity()


def test_rules_of_a_file_on_the_command_line(run, folder, rules, tmp_path):
    output = tmp_path / "out.json"
    common = ["generate", "hello", "--model", folder, "-m", 6, "--threshold", 0.02, "-o", output]
    for options, setting, name in (
        (["--visibility", f"{rules}:Near"], "visibility", "Near(steps=2)"),
        (["--combine", f"{rules}:squared"], "combine", "squared"),
        (["--prune", f"{rules}:last_slots"], "pruning", "last_slots"),
        (["--prune", f"{rules}:watched", "--prune-layers", "last:1"], "pruning", "watched"),
    ):
        code, _, err = run(*common, *options, "--verify")
        data = json.loads(output.read_text())
        found = data["settings"][setting]
        assert code == 0 and name == (found["rule"] if setting == "pruning" else found), err
        assert data["verification"]["max_logit_difference"] < 1e-3
    picture = tmp_path / "mask.svg"
    code, _, err = run(*common, "--visibility", f"{rules}:Near", "--plot", picture)
    assert code == 0 and "visibility Near(steps=2)" in picture.read_text(), err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--visibility", "gone.py:Near"], ["--visibility", "gone.py", "existing file"]),
        (["--visibility", "{rules}:Gone"], ["--visibility", "has no Gone"]),
        (["--visibility", "{rules}:NeedsArguments"], ["NeedsArguments", "needs arguments"]),
        (["--visibility", "{rules}:number"], ["--visibility", "Visibility", "got 3"]),
        (["--visibility", "{rules}:text"], ["--visibility", "not a text"]),
        (["--visibility", "{rules}:"], ["--visibility", "has no name"]),
        (["--visibility", "neer"], ["visibility", "isolated", "'neer'"]),
        (["--combine", "{rules}:Near"], ["--combine", "subclass of CombiningRule"]),
        (["--combine", "{rules}:watched"], ["--combine", "CombiningRule"]),
        (["--combine", "{rules}:broken"], ["the rule broken raised", "undefined"]),
        (["--prune", "{bad}:rule"], ["--prune", "bad.py raised NameError"]),
        (["--prune", "{exits}:rule"], ["--prune", "raised SystemExit"]),
        (["-o", "{rules}", "--combine", "{rules}:squared"], ["--combine"]),
    ],
)
def test_missing_rule_files_and_names_are_refused_in_one_line(
    run, folder, rules, tmp_path, options, words
):
    bad, exits = tmp_path / "bad.py", tmp_path / "exits.py"
    bad.write_text("undefined\n")
    exits.write_text("raise SystemExit(0)\n")
    options = [option.format(rules=rules, bad=bad, exits=exits) for option in options]
    code, _, err = run("generate", "hello", "--model", folder, "--threshold", 0.02, *options)
    assert code == 2 and "Traceback" not in err
    assert err.count("\n") == 1 and all(word in err for word in words), err
    assert rules.read_text() == RULES


def test_results_of_a_changed_rule_are_made_again(run, folder, rules, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    command = ["generate", "--prompts-file", prompts, "-o", output, "--model", folder, "-m", 3]
    command += ["--combine", f"{rules}:squared"]
    assert run(*command)[0] == 0
    code, _, err = run(*command)
    assert code == 0 and "2 of 2 prompts are done already" in err
    rules.write_text(RULES + "\n# changed\n")
    code, _, err = run(*command)
    assert "done already" not in err


def test_prompt_files_cannot_run_code(rules, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", "combine": f"{rules}:squared"}))
    (row,) = read_prompts(path)
    with pytest.raises(TempoError, match=r"line 1: combine must be one of mixture"):
        row_settings(row, Settings())


@pytest.mark.parametrize("runner", ["batched", pytest.param("workers=1", marks=pytest.mark.slow)])
def test_rules_of_a_file_next_to_a_suite(run, folder, rules, tmp_path, runner):
    pytest.importorskip("pydantic")
    grid = {"visibility": ["isolated", "rules.py:Near"], "combine": ["rules.py:squared"]}
    grid |= {"pruning": [None, {"rule": "rules.py:watched"}]}
    suite = save_suite(tmp_path / "suite.yaml", folder, prompts={"a": ["hello"]}, grid=grid)
    command = ["experiment", "run", suite, "-o", tmp_path / "runs", "--runner", runner]
    code, out, err = run(*command)
    assert code == 0 and "4 of 4 runs are done, 4 now" in out, err
    code, out, _ = run(*command)
    assert code == 0 and "4 of 4 runs are done, 0 now" in out
    rules.write_text(RULES + "\n# changed\n")
    code, _, err = run(*command)
    assert code == 2 and "a rule of yours" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"visibility": ["gone.py:Near"]}, ["visibility", "gone.py:Near", "existing file"]),
        ({"visibility": ["rules.py:Gone"]}, ["visibility", "has no Gone"]),
        ({"visibility": ["neer"]}, ["grid.visibility.0", "isolated", "'neer'"]),
        ({"pruning": {"rule": ["rules.py:number"]}}, ["prune rule", "PruningRule", "got 3"]),
    ],
)
def test_a_suite_with_an_unknown_rule_is_refused_in_one_line(run, rules, tmp_path, grid, words):
    pytest.importorskip("pydantic")
    suite = save_suite(tmp_path / "suite.yaml", "no-such-model", grid=grid)
    code, out, err = run("experiment", "run", suite, "-o", tmp_path / "runs")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_old_names_warn_in_python():
    with pytest.warns(RenamedWarning, match="max_leaves is now called beam_width") as caught:
        settings = Settings(max_leaves=3, visibility="tree")
    assert caught[0].filename == __file__
    assert settings.beam_width == 3 and "max_leaves" not in settings.to_dict()
    with pytest.warns(RenamedWarning, match="max_leaves is now called beam_width") as caught:
        assert settings.max_leaves == 3
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="no attribute 'min_leaves'"):
        assert settings.min_leaves
    with pytest.warns(DeprecationWarning, match="leaf_margin is now called beam_margin"):
        assert Settings(leaf_margin=1.0).beam_margin == 1.0
    with pytest.warns(DeprecationWarning, match="when_all_fall is now called if_all_pruned"):
        assert Pruning(when_all_fall="keep_all").if_all_pruned == "keep_all"
    with pytest.raises(TempoError, match="max_leaves is the old name of beam_width"):
        Settings(max_leaves=3, beam_width=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Settings(beam_width=3)


def test_old_options_warn_once_and_are_hidden(run, folder, tmp_path):
    output = tmp_path / "out.json"
    command = ["generate", "hello", "--model", folder, "-m", 3, "--visibility", "tree"]
    code, _, err = run(*command, "--max-leaves=2", "--leaf-margin", 3, "-q", "-o", output)
    assert code == 0
    assert err.splitlines() == [
        "note: --max-leaves is now called --beam-width",
        "note: --leaf-margin is now called --beam-margin",
    ]
    written = json.loads(output.read_text())["settings"]
    assert (written["beam_width"], written["beam_margin"]) == (2, 3.0)
    code, _, err = run(
        "generate", "-m", 0, "--prune", "random", "--prune-when-all-fall", "keep_all"
    )
    assert code == 2 and "--prune-when-all-fall is now called --prune-if-all-pruned" in err
    _, out, _ = run("generate", "--help")
    assert "--beam-width" in out and "--max-leaves" not in out and "when-all" not in out


def test_old_names_in_files_warn_once(run, folder, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    row = {"prompt": "a", "visibility": "tree", "max_leaves": 2}
    prompts.write_text(f"{json.dumps(row)}\n{json.dumps(row | {'prompt': 'b'})}\n")
    code, _, err = run(
        "generate", "--prompts-file", prompts, "--model", folder, "-m", 2, "-o", output, "-q"
    )
    assert code == 0 and err.count("max_leaves is now called beam_width") == 1
    for line in output.read_text().splitlines():
        assert json.loads(line)["settings"]["beam_width"] == 2
    pytest.importorskip("pydantic")
    grid = {"pruning": {"when_all_fall": ["keep_all", "keep_best"], "decision": ["absolute"]}}
    suite = save_suite(tmp_path / "suite.yaml", folder, prompts={"a": ["hello"]}, grid=grid)
    code, out, err = run("experiment", "run", suite, "-o", tmp_path / "runs")
    assert code == 0 and err.count("when_all_fall is now called if_all_pruned") == 1
    assert "2 of 2 runs are done" in out
