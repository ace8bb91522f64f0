"""What `load` accepts, and the one line it gives for everything else."""

import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from tempo_mlx.doctor import local_models as inventory
from tempo_mlx.weights.loading import ModelLoadError, load
from tempo_mlx.weights.recipes import RecipeError
from tests.tiny_folder import save_adapters, save_tiny_model

import huggingface_hub.constants
import mlx.core as mx
import mlx_lm
import mlx_lm.tuner.utils
import numpy as np
import pytest

PROMPT = mx.array([[3, 40, 100, 7, 7, 90]])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def folder(original, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Sets the Hub's address, and an empty cache; returns the cache."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return cache


def fail(name, **arguments) -> str:
    """The message with which `load` refuses; one line, with its cause."""
    with pytest.raises(ModelLoadError) as raised:
        load(name, **arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def change_config(folder, **changes) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def rewrite_weights(folder, change) -> None:
    path = str(folder / "model.safetensors")
    weights = dict(mx.load(path))
    mx.eval(weights)
    change(weights)
    os.remove(path)
    mx.save_safetensors(path, weights, {"format": "mlx"})


@pytest.mark.parametrize("as_string", [True, False])
def test_folder_gives_what_mlx_lm_gives(original, as_string):
    model, tokenizer = load(str(original) if as_string else original)
    reference, reference_tokenizer = mlx_lm.load(str(original))
    assert mx.array_equal(model(PROMPT), reference(PROMPT))
    assert type(tokenizer) is type(reference_tokenizer)
    assert tokenizer.eos_token_ids == reference_tokenizer.eos_token_ids


def test_quantised_folder_gives_what_mlx_lm_gives(original, tmp_path):
    model, tokenizer, config = mlx_lm.load(str(original), return_config=True)
    model, config = mlx_lm.utils.quantize_model(model, config, group_size=32, bits=4)
    expected = model(PROMPT)
    mx.eval(expected)
    mlx_lm.utils.save(tmp_path / "q", original, model, tokenizer, config)
    loaded, _ = load(tmp_path / "q")
    assert mx.array_equal(loaded(PROMPT), expected)


def test_tokenizer_config_and_lazy_are_passed_on(original):
    _, tokenizer = load(original, lazy=True, tokenizer_config={"eos_token": "!"})
    assert tokenizer.eos_token == "!"


def test_adapters_change_the_model(original, tmp_path):
    adapters = save_adapters(original, tmp_path / "adapters")
    plain, _ = load(original)
    adapted, _ = load(original, adapter_path=adapters)
    reference, _ = mlx_lm.load(str(original), adapter_path=str(adapters))
    assert mx.array_equal(adapted(PROMPT), reference(PROMPT))
    assert not np.allclose(adapted(PROMPT), plain(PROMPT), atol=1e-3)
    assert not adapted.training


def test_fields_of_the_configuration_can_be_given_other_values(original):
    model, _ = load(original, model_config={"rope_theta": 500.0})
    assert model.args.rope_theta == 500.0
    assert load(original)[0].args.rope_theta != 500.0


def test_adapters_of_peft_are_refused_with_what_to_do(original, tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    told = fail(original, adapter_path=tmp_path)
    assert "PEFT" in told and "merge_and_unload" in told and "mlx_lm.convert" in told


def test_unknown_name_lists_the_recipes():
    assert "smollm2-135m" in fail("no-such-model")


@pytest.mark.parametrize("name", ["./no/such", "/no/such/folder", "a/b/c", "", "-x/y"])
def test_name_that_can_be_nothing_is_refused(name):
    if name == "":
        assert "config.json" in fail(name)  # the current folder
    else:
        assert "a folder or a Hub id" in fail(name)


def test_unknown_variant_of_a_recipe_is_refused():
    with pytest.raises(RecipeError, match="variant 'q8' of smollm2-135m"):
        load("smollm2-135m/q8")


def test_a_revision_is_refused_for_recipes_and_folders(original):
    assert "revision 'main' is for Hub ids" in fail(original, revision="main")
    assert "revision 'main' is for Hub ids" in fail("smollm2-135m", revision="main")


def test_gguf_is_refused(tmp_path):
    assert "GGUF" in fail("somewhere/model.gguf")
    (tmp_path / "model.gguf").write_text("")
    message = fail(tmp_path)
    assert "has no config.json" in message and "does not load GGUF" in message


def test_file_is_refused(folder):
    assert "is a file" in fail(folder / "config.json")


def test_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in fail(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "no model_type"),
        ('"x"', "is damaged"),
        ("[" * 100_000, "is damaged"),
    ],
)
def test_damaged_config_is_named(folder, content, message):
    (folder / "config.json").write_text(content)
    assert message in fail(folder)


def test_config_that_lacks_a_field_is_named(folder):
    change_config(folder, hidden_size=None)
    assert "hidden_size" in fail(folder)


BAD_FIELDS = [
    ("hidden_size", (0, -1, 10**12, 10**30, 1.5, "32", None)),
    ("num_attention_heads", (0, -4, 10**9, "4", None)),
    ("num_hidden_layers", (0, -1, 10**30, 2.5, "2", None)),
    ("vocab_size", (0, -1, 10**9, 10**12, "257", None, [])),
    ("intermediate_size", (0, 10**30)),
]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_FIELDS for value in values]
)
def test_fields_that_no_model_has_are_named(folder, name, value):
    change_config(folder, **{name: value})
    message = fail(folder)
    assert str(folder) in message and "has no architecture" not in message


@pytest.mark.parametrize("value", [1001, 10**9, 10**30])
def test_layers_without_end_are_not_made(folder, monkeypatch, value):
    monkeypatch.setattr(mlx_lm.utils, "load_model", None)
    for change in (
        {"num_hidden_layers": value},
        {"n_layers": value},
        {"text_config": {"num_hidden_layers": value}},
    ):
        change_config(folder, **change)
        assert f"it has {value} layers" in fail(folder)
        assert f"it has {value} layers" in str(inventory.examined(folder))


def test_an_architecture_whose_package_is_missing_is_named(folder, monkeypatch):
    def leave(*arguments, **options):
        raise SystemExit(1)

    monkeypatch.setattr(mlx_lm.utils, "load_model", leave)
    assert "needs a package" in fail(folder)


def test_unknown_architecture_is_named(folder):
    change_config(folder, model_type="no_such_type")
    message = fail(folder)
    assert "has no architecture 'no_such_type'" in message and mlx_lm.__version__ in message


def test_missing_weights_are_named(folder):
    (folder / "model.safetensors").unlink()
    assert "weights are missing" in fail(folder)


def split(folder, n, of):
    """Put the weights into n files, and write the index of as many as ``of``."""
    weights = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{of:05}.safetensors" for i in range(of)]
    for i in range(n):
        part = {name: weights[name] for name in sorted(weights)[i::n]}
        mx.save_safetensors(str(folder / files[i]), part, {"format": "mlx"})
    index = {"weight_map": {name: files[i % of] for i, name in enumerate(sorted(weights))}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def test_missing_part_of_the_weights_is_named(folder):
    files = split(folder, 3, 3)
    (folder / files[1]).unlink()
    message = fail(folder)
    assert message == f"weights are missing from {folder}: {files[1]}"
    for file in (files[0], files[2]):
        (folder / file).unlink()
    assert all(file in fail(folder) for file in files)


def test_an_outdated_index_is_accepted(original, folder):
    split(folder, 2, 5)
    model, _ = load(folder)
    reference, _ = mlx_lm.load(str(original))
    assert mx.array_equal(model(PROMPT), reference(PROMPT))
    # Nor is it blamed for what else is wrong.
    change_config(folder, hidden_size=64)
    assert "does not fit the architecture 'llama'" in fail(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_not_needed(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    load(folder)
    (folder / "model.safetensors").unlink()
    assert "model*.safetensors" in fail(folder)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_truncated_weights_are_refused(folder, share, lazy):
    path = folder / "model.safetensors"
    os.truncate(path, int(share * path.stat().st_size))
    assert "damaged or incomplete" in fail(folder, lazy=lazy)


def test_placeholder_in_place_of_weights_is_refused(folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(text)
    assert "damaged or incomplete" in fail(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("model.norm.weight"),
        lambda weights: weights.update({"model.extra.weight": mx.ones(3)}),
        lambda weights: weights.update({"model.norm.weight": mx.ones(3)}),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_weights_of_another_model_are_refused(folder, change):
    rewrite_weights(folder, change)
    assert "does not fit the architecture 'llama'" in fail(folder)


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model": 3}'])
def test_tokenizer_that_cannot_be_used_is_refused(folder, content):
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    assert "tokenizer in" in fail(folder)


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "PreTrainedTokenizerFast",
        "GPT2Tokenizer",
        "LlamaTokenizer",
        "Qwen2Tokenizer",
        "GemmaTokenizer",
        "BertTokenizer",
        "T5Tokenizer",
    ],
)
def test_a_vocabulary_that_is_not_there_is_named(folder, kind):
    """Of some classes, transformers makes a tokenizer that knows no word."""
    (folder / "tokenizer.json").unlink()
    path = folder / "tokenizer_config.json"
    if kind is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": kind}))
    message = f"the tokenizer in {folder} cannot be used: tokenizer.json is missing"
    assert fail(folder) == message


def test_half_of_a_vocabulary_is_not_used(folder):
    content = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    assert fail(folder).endswith("cannot be used: merges.txt is missing")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert load(folder)[1].encode("ab") == [content["vocab"][letter] for letter in "ab"]


CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Own: pass\n"


def test_code_of_a_tokenizer_is_not_run_and_nobody_is_asked(folder, monkeypatch):
    (folder / "own.py").write_text(CODE)
    path = folder / "tokenizer_config.json"
    changes = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    assert fail(folder) == f"the tokenizer in {folder} needs custom code, which is not run"
    assert not asked and not list(folder.rglob("ran"))


def test_code_of_a_model_is_not_run(folder):
    (folder / "own.py").write_text(CODE)
    change_config(folder, model_file="own.py")
    assert fail(folder) == f"{folder} needs custom code (own.py), which is not run"
    assert not (folder / "ran").exists()


def test_adapters_that_are_not_there_or_do_not_fit_are_refused(original, tmp_path):
    assert "has no adapters.safetensors" in fail(original, adapter_path=tmp_path / "none")
    adapters = save_adapters(original, tmp_path / "adapters")
    other = save_tiny_model(tmp_path / "other", num_hidden_layers=1)
    assert "cannot be applied" in fail(other, adapter_path=adapters)
    (adapters / "adapter_config.json").unlink()
    assert "cannot be applied" in fail(original, adapter_path=adapters)


def test_hub_out_of_reach_is_one_line(hub):
    message = fail("owner/model")
    assert "owner/model is not a folder here, and the Hub cannot be reached" in message


def test_hub_that_is_switched_off_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in fail("owner/model")


def test_model_in_the_hub_cache_needs_no_hub(hub, original):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / "models--owner--model"
    shutil.copytree(original, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model, _ = load("owner/model")
    reference, _ = load(original)
    assert mx.array_equal(model(PROMPT), reference(PROMPT))


@pytest.mark.parametrize(
    ("status", "code", "arguments", "message"),
    [
        (404, "RepoNotFound", {}, "the Hub has no repository of that name"),
        (404, "RevisionNotFound", {"revision": "v9"}, "has no revision 'v9'"),
        (403, "GatedRepo", {}, "is gated"),
        (400, "", {}, "owner/model is not a folder here, and"),
    ],
)
def test_answer_of_the_hub_is_one_line(hub, monkeypatch, status, code, arguments, message):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        said = fail("owner/model", **arguments)
        server.shutdown()
    assert message in said
