"""The doctor's oracles accept what is right and reject what is broken; its tables hold facts."""

import io
import json
import sys

from tempo_mlx import cli
from tempo_mlx.cli.doctor import print_checks, print_findings
from tempo_mlx.doctor import checks
from tempo_mlx.doctor import local_models as inventory
from tempo_mlx.doctor import report as doctor
from tempo_mlx.doctor.checks import FORMS, ORACLES, TOLERANCE, Check, Subject, check
from tempo_mlx.doctor.random_models import CONFIGS, VOCABULARY, Letters, random_model
from tempo_mlx.doctor.report import Finding
from tempo_mlx.errors import TempoError
from tempo_mlx.io.console import Console
from tempo_mlx.models import PositionedModel, attention, forward_pass
from tempo_mlx.models.states import BranchStates
from tempo_mlx.rules.visibility import VISIBILITY
from tempo_mlx.weights.recipes import HOME_VARIABLE
from tests.sweeps import mostly_slow
from tests.tiny_folder import save_tiny_model
from tests.tiny_models import tiny_config, tiny_model

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from ..one_sequence import SeesSiblings

MAMBA = {
    "model_type": "mamba",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "state_size": 8,
    "num_hidden_layers": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 2,
}

PROMPT = np.random.default_rng(0).integers(0, VOCABULARY, 16).tolist()


def subject(name="llama", form="fp32", model=None):
    return Subject(name, form, model or random_model(name), Letters(), PROMPT, 0.04)


def verdicts(of):
    return {one.oracle: one.verdict for one in check(of)}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command line in this process, with an empty folder of models."""
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "models"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tempo-mlx", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return call


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_depend_on_the_seed_only(name):
    mx.random.seed(1)
    one = tree_flatten(random_model(name).parameters())
    mx.random.seed(2)
    again, other = (tree_flatten(random_model(name, seed).parameters()) for seed in (0, 1))
    assert all(mx.array_equal(x, y) for (_, x), (_, y) in zip(one, again, strict=True))
    assert not any(mx.array_equal(x, y) for (_, x), (_, y) in zip(one, other, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_oracle_accepts_every_kind_of_attention(name):
    found = verdicts(subject(name))
    assert found.pop("mlx-lm: cached = uncached") == "-"
    recurrent = PositionedModel(random_model(name)).is_recurrent
    expected = {each for each, oracle in ORACLES.items() if not (recurrent and oracle.merges)}
    assert set(found) == expected - {"mlx-lm: cached = uncached"}
    assert set(found.values()) == {"ok"}


def test_states_of_siblings_that_are_mixed_up_fail(monkeypatch):
    load = BranchStates.load

    def mixed(self, places):
        load(self, places)
        for layer in self._layers:
            layer.cache = [x if x is None else x[::-1] for x in layer.cache]

    monkeypatch.setattr(BranchStates, "load", mixed)
    assert "tree: cached = replay" in failed(subject("qwen3_next"))


def test_quantised_weights_are_accepted():
    model = random_model("llama")
    nn.quantize(model, group_size=32, bits=4)
    assert set(verdicts(subject(form="4-bit", model=model)).values()) == {"ok", "-"}


def failed(of):
    return {oracle for oracle, verdict in verdicts(of).items() if verdict == "FAIL"}


def test_siblings_at_consecutive_positions_fail(monkeypatch):
    # What feeding a set one token after another would do.
    offset = forward_pass._offset

    def consecutive(positions):
        return offset(positions + np.arange(len(positions))[:, None])

    monkeypatch.setattr(forward_pass, "_offset", consecutive)
    found = failed(subject())
    assert "isolated: set = mlx-lm's" in found
    assert {f"{name}: cached = replay" for name in VISIBILITY} <= found


def test_siblings_that_see_each_other_fail(monkeypatch):
    monkeypatch.setitem(VISIBILITY, "isolated", SeesSiblings())
    found = failed(subject())
    assert {"isolated: cached = replay", "isolated: set = mlx-lm's"} <= found
    assert "visible: cached = replay" not in found


@pytest.mark.parametrize("dtype", mostly_slow([mx.float16, mx.bfloat16], [mx.bfloat16]))
def test_tolerances_of_few_bits_still_notice_visible_siblings(monkeypatch, dtype):
    model = random_model("llama")
    model.set_dtype(dtype)
    monkeypatch.setitem(VISIBILITY, "isolated", SeesSiblings())
    assert "isolated: set = mlx-lm's" in failed(subject(model=model))


def test_attention_that_is_reported_wrongly_fails(monkeypatch):
    weights = attention.attention_weights

    def blurred(*arguments):
        found = weights(*arguments)
        return 0.99 * found + 0.01 / found.shape[-1]

    monkeypatch.setattr(attention, "attention_weights", blurred)
    # Rows still sum to 1.
    assert failed(subject()) == {"attention = NumPy, sum 1", "attention x values = kernel"}


def test_a_greedy_token_that_is_not_nearly_the_best_fails(monkeypatch):
    generate = checks.generate

    def second_best(model, tokenizer, prompt, **settings):
        result = generate(model, tokenizer, prompt, **settings)
        if settings.get("threshold") == 1.0:
            tokens = result.lattice.steps[0].tokens
            tokens[0].id = (tokens[0].id + 1) % VOCABULARY
        return result

    monkeypatch.setattr(checks, "generate", second_best)
    assert failed(subject()) == {"threshold 1 = mlx-lm greedy"}


def test_a_near_tie_is_not_a_failure(monkeypatch):
    # Two tokens whose logits are the same, and a selection that takes the other one.
    model = random_model("llama")
    head = np.array(model.lm_head.weight)
    logits = checks.stock_logits(model, PROMPT)[-1]
    best = int(logits.argmax())
    twin = (best + 1) % VOCABULARY
    head[twin] = head[best]
    model.lm_head.weight = mx.array(head)
    generate = checks.generate

    def other(one, tokenizer, prompt, **settings):
        result = generate(one, tokenizer, prompt, **settings)
        for step in result.lattice.steps if settings.get("threshold") == 1.0 else ():
            for token in step.tokens:
                token.id = {best: twin, twin: best}.get(token.id, token.id)
        return result

    monkeypatch.setattr(checks, "generate", other)
    found = {one.oracle: one for one in check(subject(model=model))}
    greedy = found["threshold 1 = mlx-lm greedy"]
    assert greedy.verdict == "ok" and "near-ties" in greedy.note


def test_an_oracle_that_raises_fails_and_the_others_run(monkeypatch):
    model = random_model("llama")
    model.model.norm.weight = model.model.norm.weight * float("nan")
    found = list(check(subject(model=model)))
    assert {one.verdict for one in found if one.oracle != "attention = NumPy, sum 1"} >= {"FAIL"}
    assert any("NonFiniteLogitsError" in one.note for one in found)
    assert len(found) == len(ORACLES)


def test_tolerances_grow_with_rounding():
    assert TOLERANCE[mx.float32] <= 1e-3
    assert TOLERANCE[mx.float32] < TOLERANCE[mx.float16] < TOLERANCE[mx.bfloat16] < 0.5
    assert Check("m", "fp32", "o", float("nan"), 1.0).failed
    assert not Check("m", "fp32", "o", None, None).failed


def test_products_in_fewer_bits_widen_the_tolerance(monkeypatch):
    monkeypatch.setattr(checks, "rounds_fp32_products", lambda: True)
    limits = {one.oracle: one.tolerance for one in check(subject())}
    assert limits["isolated: cached = replay"] == TOLERANCE[mx.float16]
    monkeypatch.undo()
    limits = {one.oracle: one.tolerance for one in check(subject())}
    assert limits["isolated: cached = replay"] == TOLERANCE[mx.float32]


def test_doctor_prints_facts_and_json(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert "GFLOP/s" in out and "tempo-mlx models fetch smollm2-135m" in out
    code, out, _ = run("doctor", "--json")
    data = json.loads(out)
    assert code == 0 and data["schema"] == 1 and data["checks"] is None
    topics = {finding["topic"]: finding for finding in data["findings"]}
    assert {"mlx", "mlx-lm", "Python", "system", "device", "BLAS", "extra plots"} <= set(topics)
    assert topics["BLAS"]["data"]["gflops"] > 0
    variant = doctor.device_variant()
    assert f"smollm2-135m/{variant}" in data["missing"]
    assert topics[f"smollm2-135m/{variant}"]["remedy"] == "tempo-mlx models fetch smollm2-135m"
    code, _, err = run("doctor", "--all")
    assert code == 2 and "--check" in err


def test_check_prints_every_model_and_fails_with_exit_code_one(run, monkeypatch):
    subjects = [subject("llama"), subject("gemma3_text")]
    monkeypatch.setattr(checks, "random_subjects", lambda: iter(subjects))

    def unreachable(name):
        raise TempoError("the index cannot be reached")

    monkeypatch.setattr(checks, "load", unreachable)
    code, out, err = run("doctor", "--check")
    assert (code, err) == (0, "")
    assert "gemma3_text" in out and "the index cannot be reached" in out
    assert "FAIL" not in out and "checks ok" in out
    monkeypatch.setitem(VISIBILITY, "isolated", SeesSiblings())
    code, out, _ = run("doctor", "--check", "--json")
    data = json.loads(out)
    assert code == 1
    assert {one["verdict"] for one in data["checks"]} == {"ok", "FAIL", "-", "skipped"}
    assert set(data["checks"][0]) == {
        "model", "form", "oracle", "difference", "tolerance", "note", "verdict",
    }  # fmt: skip
    assert {one["form"] for one in data["checks"]} <= {*FORMS, ""}


def test_memory_is_read_from_what_the_systems_print():
    linux = "MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:   2000 kB\n"
    assert doctor.available_of_meminfo(linux) == 2000 * 1024
    mac = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               10.\n"
        "Pages active:                          50000.\n"
        "Pages inactive:                          200.\n"
        "Pages speculative:                         3.\n"
        "Pages wired down:                       7000.\n"
        "Pages purgeable:                          40.\n"
    )
    assert doctor.available_of_vm_stat(mac) == 16384 * (10 + 200 + 3 + 40)
    assert doctor.available_of_vm_stat("") == doctor.available_of_meminfo("") == 0


def cached(hub, repo, **files):
    """A repository in the layout of the Hub's cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = hub / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    for name, content in files.items():
        (snapshot / name.replace("__", ".")).write_text(content)
    return snapshot


def test_models_of_the_hub_are_judged_by_their_configuration(run, tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    huggingface_hub.scan_cache_dir  # noqa: B018 - its module keeps the cache of the time of import
    monkeypatch.setattr(inventory.huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    good = CONFIGS["llama"]
    weights = {"model__safetensors": "never read"}
    cached(hub, "some/llama", config__json=json.dumps(good), **weights)
    # As large as it likes: its weights are not made.
    huge = {**good, "hidden_size": 16384, "num_hidden_layers": 90, "intermediate_size": 65536}
    cached(hub, "some/huge", config__json=json.dumps(huge), **weights)
    cached(hub, "some/mamba", config__json=json.dumps(MAMBA), **weights)
    cached(hub, "some/bert", config__json=json.dumps({"model_type": "bert"}), **weights)
    cached(hub, "some/gguf", model__gguf="x")
    cached(hub, "some/tokenizer", config__json=json.dumps(good))
    cached(hub, "some/damaged", config__json="{", **weights)
    code, out, err = run("models", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    problems = {model["repo"]: model["problem"] for model in data["hub"]}
    assert problems["some/llama"] is None and problems["some/huge"] is None
    assert problems["some/mamba"] is None
    branches = {model["repo"]: model["branch_bytes"] for model in data["hub"]}
    assert branches["some/mamba"] > 0 and branches["some/llama"] == 0
    assert problems["some/bert"] == "mlx-lm has no architecture 'bert'"
    assert "GGUF" in problems["some/gguf"]
    assert "no weights" in problems["some/tokenizer"]
    assert "damaged" in problems["some/damaged"]
    assert [recipe["ready"] for recipe in data["recipes"]] == [False, False]
    code, out, _ = run("models")
    assert code == 0 and "some/mamba" in out and "not fetched" in out


def test_fetch_lists_the_known_recipes(run, tmp_path):
    code, _, err = run("models", "fetch", "gpt-5")
    assert code == 2 and "smollm2-135m" in err and "'gpt-5'" in err
    code, _, err = run("models", "fetch", "smollm2-135m", "--from", tmp_path / "missing.whl")
    assert code == 2 and "does not exist" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "mamba"])
@pytest.mark.parametrize("bits", [None, 4])
def test_branch_bytes_follow_the_precision_of_the_weights(name, bits, tmp_path):
    model, config = tiny_model(name), tiny_config(name)
    in_fp32 = PositionedModel(tiny_model(name)).state_bytes
    model.set_dtype(mx.bfloat16)
    if bits is not None:
        model, config = quantize_model(model, config, group_size=32, bits=bits)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    loaded = PositionedModel(load_model(tmp_path)[0])
    assert inventory.examined(tmp_path).state_bytes == loaded.state_bytes < in_fp32


def test_a_loadable_folder_has_no_problem(tmp_path):
    assert isinstance(inventory.examined(save_tiny_model(tmp_path / "tiny")), PositionedModel)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_checks_and_findings_are_whole_on_narrow_terminals(width):
    found = [
        Check("random llama", form, oracle, 1.2e-6, 1e-3) for form in FORMS for oracle in ORACLES
    ]
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    print_checks(found, console)
    path = "/home/somebody/.cache/tempo-mlx/smollm2-135m/fp32"
    print_findings([Finding("smollm2-135m/fp32", f"ready, 538.1 MB in {path}")], console)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert text.count("1.2e-06 ok") == len(found)
    for oracle in ORACLES:
        assert all(word in text for word in oracle.split())
    assert path in "".join(line.split("│")[-2].strip() for line in text.splitlines() if "│" in line)


def test_every_extra_but_the_developers_is_looked_for(monkeypatch):
    requirements = ["mlx", "a-b<2; extra == 'plots'", 'mlx ; extra == "x"', "ruff; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requirements)
    assert doctor.packages_of_extras() == {"plots": ["a-b"], "x": ["mlx"]}
    first, second = doctor._extras()
    assert (first.topic, first.value, first.missing) == ("extra plots", "missing: a-b", True)
    assert first.remedy.endswith("-m pip install a-b") and second.value == "present"


def test_checked_model_is_unchanged():
    model = random_model("llama")
    before = checks.stock_logits(model, PROMPT)
    list(check(subject(model=model)))
    np.testing.assert_array_equal(checks.stock_logits(model, PROMPT), before)
    assert PositionedModel(model).captures_attention
