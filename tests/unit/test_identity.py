"""What makes two models the same: configuration, tokenizer and weights; not names and places."""

import copy
import json
import shutil
from dataclasses import dataclass, field
from typing import Any

from tempo_mlx import PositionedModel, load
from tempo_mlx.weights.fingerprint import fingerprint, identify, tokenizer_fingerprint
from tests.tiny_folder import save_tiny_model
from tests.tiny_models import tiny_model

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..tiny_tokenizer import TinyTokenizer


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "model")


def change_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_folder_that_moved_is_the_same_model(folder, tmp_path):
    one = identify(*load(folder))
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert identify(*load(moved)) == one
    change_json(moved / "config.json", lambda c: c.update(_name_or_path="x", rope_theta=10000.0))
    change_json(folder / "config.json", lambda c: c.update(rope_theta=10000))
    assert identify(*load(moved)) == identify(*load(folder))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", lambda c: c.update(rope_theta=5000.0)),
        ("config.json", lambda c: c.update(rms_norm_eps=1e-3)),
        ("config.json", lambda c: c.update(max_position_embeddings=200)),
        ("config.json", lambda c: c.update(rope_scaling={"type": "linear", "factor": 2.0})),
        ("config.json", lambda c: c.update(eos_token_id=3)),
        ("tokenizer_config.json", lambda c: c.update(chat_template="{{ messages }}")),
        ("tokenizer_config.json", lambda c: c.update(clean_up_tokenization_spaces=True)),
        ("tokenizer_config.json", lambda c: c.update(bos_token="<|end|>")),
        ("tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"})),
        ("tokenizer.json", lambda c: c["model"]["merges"].append(["a", "b"])),
        ("tokenizer.json", lambda c: c["added_tokens"][0].update(lstrip=True)),
    ],
)
def test_every_part_of_a_folder_counts(folder, file, change):
    one = identify(*load(folder))

    def changed(data):
        change(data)
        if data.get("model", {}).get("merges"):
            data["model"]["vocab"]["ab"] = data["model"]["vocab"].pop("~")

    change_json(folder / file, changed)
    assert identify(*load(folder)) != one


def scaled(model):
    model.model.norm.weight[3] *= 2


def quantised(model):
    nn.quantize(model, group_size=32, bits=4)


def with_adapters(model):
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 3.0, "dropout": 0.0})


CHANGES = {
    "dtype": lambda model: model.set_dtype(mx.bfloat16),
    "in place": scaled,
    "update": lambda model: model.update(tree_map(lambda a: a + 1, model.parameters())),
    "quantised": quantised,
    "adapters": with_adapters,
    "rotary base": lambda model: setattr(model.layers[1].self_attn.rope, "base", 7.0),
    "activation": lambda model: setattr(model.args, "rms_norm_eps", 0.5),
    "swapped": lambda model: model.layers.reverse(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_is_changed_is_another_one(name):
    model = tiny_model("llama", seed=1)
    one = fingerprint(model)
    assert fingerprint(model) == one == fingerprint(tiny_model("llama", seed=1))
    CHANGES[name](model)
    assert fingerprint(model) != one


def test_how_strongly_adapters_count_and_how_weights_are_packed_count():
    adapted = tiny_model("llama", seed=1)
    with_adapters(adapted)
    one = fingerprint(adapted)
    for _, module in adapted.named_modules():
        if hasattr(module, "lora_a"):
            module.scale = 4.0
    assert fingerprint(adapted) != one
    packed = tiny_model("llama", seed=1)
    quantised(packed)
    one = fingerprint(packed)
    for _, module in packed.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            module.mode = "mxfp4"
    assert fingerprint(packed) != one


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "deepseek_v2", "gpt_neox"])
def test_using_a_model_leaves_it_the_same(architecture):
    model = tiny_model(architecture)
    one = fingerprint(model)
    PositionedModel.of(model)
    mx.eval(model(mx.array([[1, 2, 3]])))
    assert fingerprint(model) == one


def test_using_a_tokenizer_leaves_it_the_same(folder):
    _, tokenizer = load(folder)
    one = tokenizer_fingerprint(tokenizer)
    tokenizer.encode("hello")
    tokenizer._tokenizer(["hello", "a"], truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == one


def test_a_tokenizer_is_the_same_in_mlx_lms_wrapper_and_without(folder):
    _, tokenizer = load(folder)
    assert tokenizer_fingerprint(tokenizer._tokenizer) == tokenizer_fingerprint(tokenizer)


def test_an_end_token_more_is_another_identity_of_the_same_tokenizer(folder):
    model, tokenizer = load(folder)
    one = identify(model, tokenizer), tokenizer_fingerprint(tokenizer)
    tokenizer.add_eos_token("a")
    assert identify(model, tokenizer) != one[0] and tokenizer_fingerprint(tokenizer) == one[1]


def test_a_tokenizer_written_in_python_is_its_texts():
    class Upper(TinyTokenizer):
        def decode(self, ids):
            return super().decode(ids).upper()

    one = tokenizer_fingerprint(TinyTokenizer(30))
    assert one == tokenizer_fingerprint(TinyTokenizer(30, end_tokens=(3,)))
    others = tokenizer_fingerprint(TinyTokenizer(31)), tokenizer_fingerprint(Upper(30))
    assert len({one, *others}) == 3


def test_a_vocabulary_that_comes_from_files_counts_with_them(tmp_path):
    class FromFile:
        vocab_files_names = {"vocab_file": "tokens.model"}
        eos_token_ids = {1}

        def __init__(self, path):
            self.vocab_file = str(path)

        def get_vocab(self):
            return {"a": 0, "b": 1}

    paths = [tmp_path / name for name in ("one", "same", "other")]
    for path, rules in zip(paths, ("rules", "rules", "other rules"), strict=True):
        path.write_text(rules)
    one, same, other = (tokenizer_fingerprint(FromFile(path)) for path in paths)
    assert one == same != other


@dataclass
class Inner:
    theta: float = 1.0
    factors: list[float] = field(default_factory=lambda: [1.0, 2.5])
    model_path: str = "here"


@dataclass
class Arguments:
    inner: Inner = field(default_factory=Inner)
    scaling: dict[str, Any] = field(default_factory=lambda: {"type": "yarn", "_name_or_path": "x"})
    name: str = "one"


class Custom(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.weight = mx.arange(10)
        self.flags = mx.array([True, False])
        self.empty = mx.zeros((0, 3))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda args: setattr(args.inner, "theta", 2.0), False),
        (lambda args: args.inner.factors.append(3.0), False),
        (lambda args: args.inner.factors.reverse(), False),
        (lambda args: args.scaling.update(type="llama3"), False),
        (lambda args: args.scaling.update(_name_or_path="y"), True),
        (lambda args: setattr(args.inner, "model_path", "there"), True),
        (lambda args: setattr(args, "name", "two"), True),
        (lambda args: setattr(args.inner, "theta", 1), True),
    ],
)
def test_arguments_of_a_model_made_in_python_count_to_their_depth(change, same):
    args = Arguments()
    one = fingerprint(Custom(args))
    changed = copy.deepcopy(args)
    change(changed)
    assert (fingerprint(Custom(changed)) == one) is same


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int64, mx.uint8, mx.bool_])
@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_every_bit_of_a_parameter_counts(dtype, size):
    values = (mx.arange(size) % 2).astype(dtype)
    model = Custom(Arguments())
    found = set()
    for i in range(size + 1):
        model.weight = mx.array(values)
        if i < size:
            model.weight[i] = mx.array(1, dtype) - model.weight[i]
        found.add(fingerprint(model))
    assert len(found) == size + 1


def test_rows_may_not_be_exchanged():
    model = Custom(Arguments())
    rows = mx.random.normal((64, 1024), key=mx.random.key(1)).astype(mx.bfloat16)
    found = set()
    for i in range(64):
        order = list(range(64))
        order[0], order[i] = order[i], order[0]
        model.weight = rows[mx.array(order)].astype(mx.float32)
        found.add(fingerprint(model))
    assert len(found) == 64
