"""Suite files: what they may say, what they come to, and what identifies a run."""

import dataclasses
import json

from tempo_mlx.experiments.suite import RunConfig, SuiteError
from tempo_mlx.experiments.suite_files import built_in, json_schema, parse_suite, read_suite
from tempo_mlx.rules.pruning import Pruning
from tempo_mlx.rules.schedules import Bezier, Constant, Relu
from tempo_mlx.settings import Settings
from tests.suites import suite_text

import pytest


def plan(**changes):
    return parse_suite(suite_text("tiny", **changes)).expand()


def test_the_built_in_suite_is_as_documented():
    suite = read_suite("parallel-attention")
    expanded = suite.expand()
    assert list(suite.prompts) == ["narrative", "factual", "technical", "dialogue", "descriptive"]
    assert all(len(texts) == 2 for texts in suite.prompts.values())
    assert suite.seeds == [42, 123, 456, 789, 999]
    assert expanded.in_grid == 100 and len(expanded.runs) == 20 and len(expanded.groups) == 10
    assert "each distinct configuration is run once" in expanded.notes[0]
    for run in expanded.runs:
        assert (run.settings.max_tokens, run.settings.threshold) == (10, 0.1)
        assert run.settings.seed is None
    assert built_in()["parallel-attention"].name == "parallel-attention.yaml"


def test_a_suite_says_the_same_after_it_was_written_as_resolved():
    suite = parse_suite(suite_text("tiny", grid={"pruning": [None, {"rule": "random"}]}))
    assert parse_suite(json.dumps(suite.to_dict())) == suite


def test_with_sampling_every_seed_is_a_run():
    sampled = plan(
        seeds=[1, 2, 3],
        settings={"sampling": "gumbel", "temp": 0.9, "max_tokens": 4},
        grid={"visibility": ["isolated", "visible"]},
    )
    assert len(sampled.runs) == sampled.in_grid == 4 * 2 * 3 and sampled.notes == []
    assert {run.settings.seed for run in sampled.runs} == {1, 2, 3}
    assert len(sampled.groups) == 12


def test_conditions_that_draw_have_seeds_and_the_others_are_run_once():
    mixed = plan(seeds=[1, 2], grid={"pruning": [None, {"rule": "random"}]})
    drawn = [run for run in mixed.runs if run.settings.uses_rng]
    assert len(drawn) == 4 * 2 and len(mixed.runs) == 4 * 2 + 4
    assert "1 conditions draw no tokens" in mixed.notes[0]


def test_copies_in_the_grid_are_run_once():
    copies = plan(grid={"combine": ["mean", "mean"]})
    assert len(copies.runs) == 4 and "4 runs of the grid are copies" in copies.notes[0]


def test_the_grid_varies_settings_and_those_of_pruning():
    grid = {
        "visibility": ["isolated", "hidden"],
        "combine": ["mean", "product"],
        "pruning": {"threshold": [0.2, 0.4], "layers": ["last:1"], "schedule": ["relu(0.5)"]},
    }
    wide = plan(settings={"pruning": {"rule": "attention"}, "max_tokens": 3}, grid=grid)
    assert len(wide.runs) == 4 * 8 and all(len(group) == 2 for group in wide.groups)
    last = wide.runs[-1]
    assert last.settings.pruning == Pruning(
        rule="attention", threshold=0.4, layers=1, schedule=Relu(0.5)
    )
    # Settings with one value are no part of a condition's name.
    assert last.condition == "hidden, combine=product, pruning.threshold=0.4"
    assert last.varied["pruning.layers"] == "last:1"
    for group in wide.groups:
        a, b = (run.to_dict() for run in group)
        assert a["settings"].pop("visibility") != b["settings"].pop("visibility")
        assert a == b


def test_run_ids_are_stable():
    run = plan().runs[1]
    assert run.id("model") == plan().runs[1].id("model")
    fixed = RunConfig("a-1", "a", "hello", Settings(visibility="isolated"), "isolated", {})
    # Written out: results are found again by it, in another process and another year.
    assert fixed.id("0" * 32) == "4780326c9f7025cd"


OTHER = {
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "min_tokens_to_keep": 2,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.2,
    "repetition_penalty": 1.3,
    "repetition_context_size": 5,
    "presence_penalty": 0.5,
    "presence_context_size": 6,
    "frequency_penalty": 0.7,
    "frequency_context_size": 8,
    "logit_bias": {3: 1.5},
    "max_tokens": 7,
    "threshold": 0.2,
    "max_parallel": 3,
    "temp": 0.5,
    "sampling": "gumbel",
    "seed": 5,
    "visibility": "visible",
    "combine": "mean",
    "beam_width": 2,
    "beam_margin": 1.0,
    "weighting": "prior",
    "stop": ("x",),
    "kv_bits": 8,
    "kv_group_size": 32,
    "quantized_kv_start": 0,
    "prefill_step_size": 9,
}
OTHER_PRUNING = {
    "rule": "attention",
    "threshold": 0.1,
    "decision": "absolute",
    "steepness": 3.0,
    "keep_rate": 0.5,
    "schedule": Constant(),
    "lookback": 5,
    "min_age": 2,
    "if_all_pruned": "keep_all",
    "layers": 2,
    "layer_weights": "rising",
    "query_weights": "probability",
    "repair": "recompute",
    "compact_above": 0.9,
}


def test_run_ids_depend_on_every_field():
    base = RunConfig("a-1", "a", "hello", Settings(visibility="isolated"), "isolated", {})
    pruned = dataclasses.replace(base.settings, pruning=Pruning())
    variants = [dataclasses.replace(base.settings, **{n: v}) for n, v in OTHER.items()]
    variants += [
        dataclasses.replace(base.settings, final_threshold=0.3, schedule=Bezier()),
        dataclasses.replace(base.settings, final_threshold=0.3, schedule=Relu()),
        dataclasses.replace(base.settings, visibility="tree", branching="replicate"),
        dataclasses.replace(base.settings, visibility="tree"),
        pruned,
        Settings(regex="[a-z]+"),
        Settings(json_schema={"type": "object"}),
        Settings(grammar='start: "a"'),
    ]
    variants += [
        dataclasses.replace(pruned, pruning=dataclasses.replace(Pruning(), **{n: v}))
        for n, v in OTHER_PRUNING.items()
    ]
    known = {f.name for f in dataclasses.fields(Settings)}
    together = {"final_threshold", "schedule", "pruning", "branching"}
    functions = {"logits_processors", "sampler"}
    grammars, speed = {"json_schema", "regex", "grammar"}, {"draft", "num_draft_tokens"}
    assert known == OTHER.keys() | together | functions | grammars | speed
    assert {f.name for f in dataclasses.fields(Pruning)} == OTHER_PRUNING.keys()
    runs = [base, *(dataclasses.replace(base, settings=settings) for settings in variants)]
    runs += [
        dataclasses.replace(base, prompt="hello "),
        dataclasses.replace(base, captures="full"),
    ]
    ids = [run.id("model") for run in runs] + [base.id("other")]
    same = dataclasses.replace(base.settings, draft="none", num_draft_tokens=3)
    assert dataclasses.replace(base, settings=same).id("model") == ids[0]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": None}, ["prompts", "missing"]),
        ({"promts": {}}, ["unknown key 'promts'", "prompts"]),
        ({"settings": {"thresold": 1}}, ["unknown key 'settings.thresold'", "threshold"]),
        ({"settings": {"threshold": "low"}}, ["settings.threshold", "number", "low"]),
        ({"settings": {"threshold": 3.0}}, ["threshold must be in (0, 1]", "3.0"]),
        ({"settings": {"seed": 3}}, ["unknown key 'settings.seed'"]),
        ({"settings": {"schedule": "slow"}}, ["schedule must be", "slow"]),
        ({"grid": {"threshold": 0.1}}, ["grid.threshold", "list"]),
        ({"grid": {"visibility": ["isolate"]}}, ["grid.visibility.0", "isolated", "got 'isolate'"]),
        ({"grid": {"threshold": [0.1, 0.0]}}, ["(threshold 0.0)", "(0, 1]"]),
        ({"grid": {"visibility": []}}, ["grid.visibility", "at least 1"]),
        ({"grid": {"pruning": [{"rul": "random"}]}}, ["'grid.pruning.0.rul'", "rule"]),
        ({"grid": {"pruning": {"rul": ["random"]}}}, ["'grid.pruning.rul'", "rule"]),
        ({"grid": {"visibility": ["recombined"], "temp": [0.5]}}, ["temp must be 1"]),
        ({"grid": {"visibility": ["tree"]}}, ["captures reductions", "visibility tree"]),
        ({"grid": {"pruning": {"repair": ["recompute"]}}}, ["repair recompute"]),
        (
            {"captures": "none", "grid": {"visibility": ["tree"], "branching": ["replicate"]}},
            ["branching replicate"],
        ),
        ({"settings": {"sampling": "gumbel"}}, ["draws tokens", "seeds is empty"]),
        ({"seeds": [1, 1]}, ["seeds", "twice"]),
        ({"seeds": [-1]}, ["seeds.0", "-1"]),
        ({"prompts": {"a": ["x", "x"]}}, ["'x'", "twice"]),
        ({"prompts": {"a": []}}, ["prompts.a"]),
        ({"prompts": {"a": [""]}}, ["prompts.a.0"]),
        ({"prompts": {"a": [7]}}, ["prompts.a.0", "string", "7"]),
        ({"captures": "all"}, ["captures", "reductions", "all"]),
        ({"name": "a/b"}, ["name", "a/b"]),
    ],
)
def test_what_is_wrong_is_named_in_one_line(changes, words):
    with pytest.raises(SuiteError) as error:
        plan(**changes)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", ["not YAML"]),
        ("- a", ["not a suite"]),
        ("? [a]\n: b", ["not YAML"]),
        ("name: x\nprompts: {a: [b], a: [c]}", ["'a' is there twice"]),
    ],
)
def test_what_is_no_suite_is_refused(text, words):
    with pytest.raises(SuiteError) as error:
        parse_suite(text)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("written", "number"),
    [("1e-1", 0.1), ("1E-1", 0.1), ("+.5e0", 0.5), ("5.e-1", 0.5), ("0.5", 0.5), ("1.0e-01", 0.1)],
)
def test_numbers_may_have_an_exponent(written, number):
    text = f"name: x\nprompts: {{a: [b]}}\nsettings: {{threshold: {written}}}\n"
    assert parse_suite(text).to_dict()["settings"] == {"threshold": number}
    text = f"name: x\nprompts: {{a: [b]}}\ngrid: {{threshold: [1, {written}]}}\n"
    assert parse_suite(text).to_dict()["grid"] == {"threshold": [1.0, number]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompts: {a: [yes, no]}", ["prompts.a.0", "got true", 'write "yes", in quotes']),
        ("prompts: {a: [b, off]}", ["prompts.a.1", "got false", "in quotes"]),
        ("prompts: {a: [1e5]}", ["prompts.a.0", "got 100000.0", "put them in quotes"]),
        ("prompts: {a: [12:30]}", ["prompts.a.0", "put them in quotes"]),
        ("prompts: {a: [2024-01-01]}", ["prompts.a.0", '"2024-01-01"', "put them in quotes"]),
        ("prompts: {a: [~]}", ["prompts.a.0", "got null", "put them in quotes"]),
        ("prompts: {a: [He said: no]}", ["prompts.a.0", "a colon and a space", "quotes"]),
        ("prompts: {a: &a [*a]}", ["prompts.a.0"]),
        ("prompts: {yes: [a]}", ["got true", "in quotes"]),
        ("prompts: {a: [b]}\nmodel: no", ["model", "got false", "in quotes"]),
        ("prompts: {a: [b]}\ncaptures: no", ["captures", "got false", "in quotes"]),
        ("prompts: {a: [b]}\nsettings: {stop: [yes]}", ["settings.stop.0", "in quotes"]),
        ("prompts: {a: [b]}\nsettings: {threshold: '1e-1'}", ['got "1e-1"', "without quotes"]),
        ("prompts: {a: [b]}\nseeds: ['1']", ['got "1"', "without quotes"]),
        ("prompts: {a: [b]}\nsettings: {max_tokens: 1e3}", ["integer", "got 1000.0"]),
    ],
)
def test_what_yaml_reads_as_another_type_is_refused_with_the_way_to_write_it(text, words):
    with pytest.raises(SuiteError) as error:
        parse_suite(f"name: x\n{text}\n")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_there_is_no_such_suite(tmp_path):
    with pytest.raises(SuiteError, match="parallel-attention"):
        read_suite("parallel")
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"name: \xff")
    with pytest.raises(SuiteError, match="not UTF-8"):
        read_suite(path)


def test_the_schema_knows_every_setting_and_every_choice():
    schema = json_schema()
    settings = schema["$defs"]["Settings"]
    assert settings["additionalProperties"] is False
    assert settings["properties"].keys() == {
        field.name
        for field in dataclasses.fields(Settings)
        if field.name not in ("seed", "logits_processors", "sampler")
    }
    assert settings["properties"]["visibility"]["anyOf"][0]["enum"] == [
        "isolated",
        "visible",
        "hidden",
        "tree",
        "recombined",
    ]
    grid = schema["$defs"]["Grid"]["properties"]
    assert grid["threshold"]["type"] == "array" and grid["threshold"]["items"]["type"] == "number"
    assert schema["required"] == ["name", "prompts"]
    threshold, width = settings["properties"]["threshold"], settings["properties"]["beam_width"]
    assert (threshold["exclusiveMinimum"], threshold["maximum"]) == (0, 1)
    assert width["minimum"] == 1 and "most branches" in width["description"]
    json.dumps(schema)


def test_the_schema_beside_the_built_in_suites_is_that_of_this_version():
    (folder,) = {path.parent for path in built_in().values()}
    written = json.loads((folder / "suite.schema.json").read_text(encoding="utf-8"))
    assert written == json_schema(), "tempo-mlx experiment schema -o suites/suite.schema.json"
