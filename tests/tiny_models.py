"""Tiny random models of every architecture in mlx-lm, for tests that sweep over all of them.

The models are stock mlx-lm; only their weights are drawn here, and so that every part matters:
logits and attention scores have a standard deviation near 1; no norm, bias, sink or gate is
neutral. Rotary frequencies are not among the parameters, so they stay what they are.
"""

import copy
import dataclasses
import functools
import importlib
import itertools
import math
import pkgutil
import sys
from collections.abc import Iterable
from types import ModuleType

from tests.tiny_configs import GENERIC, OUTER, SPECIAL, WRAPPERS, Config

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import pytest
from mlx.utils import tree_flatten, tree_unflatten

MATRIX_GAIN = 1.2  # standard deviation of a matrix product whose input has standard deviation 1
BIAS_STD = 0.2
GAIN_STD = 0.1
MAX_PARAMETERS = 1_000_000
QUANTIZATION_GROUP = 128  # of the only type with quantised weights
#: Fields that limit how far a layer sees, in tokens.
WINDOW_FIELDS = (
    "sliding_window",
    "sliding_window_size",
    "attention_chunk_size",
    "attention_window_size",
    "loop_window_size",
)
#: Mean and standard deviation of parameters that are no matrices, ordinary gains or biases.
DISTRIBUTIONS = {
    "A_log": (-1.0, 0.5),  # state that lasts for several tokens
    "sinks": (0.0, 0.5),
    "attention_sink_bias": (0.0, 0.5),
    # AFM rounds keys and values to multiples of these. Few values lie so close to the middle
    # between two coarse steps that rounding errors decide.
    "quant_key_scale": (0.25, 0.0),
    "quant_value_scale": (0.25, 0.0),
    # RWKV: shares of the previous token, and gains of the keys
    **{f"x_{part}": (0.5, 0.1) for part in "rwkvag"},
    "k_k": (1.0, 0.1),
    "k_a": (1.0, 0.1),
    "weight_scale": (0.18, 0.01),  # BitNet: 1.2 / sqrt(2/3 x 64 inputs)
}
CONSTANTS = ("beta", "eps")  # of an activation function

#: Types whose stock model does not read a prompt, or reads it wrongly, and why.
KNOWN_STOCK_FAILURES = {
    "olmo": 'it adds the mask "causal", a string, to the scores of a prompt',
    "phi3small": "it adds a boolean mask to the scores, so that tokens see what comes after them",
}
if not mx.metal.is_available():
    KNOWN_STOCK_FAILURES |= dict.fromkeys(
        ("bitnet", "muse_spark"), "its kernels are written for Metal and for nothing else"
    )
#: Types whose stock model depends on how a text is cut into forward passes, and why.
STEPS_DIFFER = {
    "plamo3": "its mask lets a prompt see sliding_window + 1 tokens, its cache keeps sliding_window"
}
#: Types whose stock model gives other logits without a cache, and why.
UNCACHED_DIFFERS = {
    "gemma3n": "layers that share keys and values of an earlier layer make their own without it"
}


@functools.cache
def architectures() -> list[str]:
    """Names of all modules of mlx_lm.models that define a `Model` and its `ModelArgs`, sorted."""
    names = (module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))
    return sorted(name for name in names if {"Model", "ModelArgs"} <= vars(_module(name)).keys())


def tiny_config(name: str, **overrides) -> Config:
    """The configuration of a tiny model, as its config.json would have it.

    Fields of a nested text configuration are overridden by their own names, too.
    Raises ValueError for an override that the type does not read.
    """
    module = _module(name)
    inner = WRAPPERS.get(name, name)
    offered = {**GENERIC, **SPECIAL.get(inner, {}), **SPECIAL.get(name, {}), **overrides}
    if "layer_types" not in overrides:
        # Some types count their layers by this list.
        pattern = itertools.cycle(offered["layer_types"])
        offered["layer_types"] = list(itertools.islice(pattern, offered["num_hidden_layers"]))
    text_args = _text_args(module, inner)
    config = _pick({**offered, **OUTER.get(name, {})}, module.ModelArgs)
    config["model_type"] = name
    if text_args is not None:
        config["text_config"] = {**_pick(offered, text_args), "model_type": inner}
    unread = overrides.keys() - config.keys() - config.get("text_config", {}).keys()
    if unread:
        raise ValueError(f"{name} does not read {sorted(unread)}")
    return copy.deepcopy(config)


def tiny_model(name: str, seed: int = 0, most: int = MAX_PARAMETERS, **overrides) -> nn.Module:
    """A stock mlx-lm model with random fp32 weights that depend on the seed only, evaluated.

    Args:
        name, overrides: as for :func:`tiny_config`.
        seed: of the weights.
        most: parameters that it may have.
    """
    module = _module(name)
    args = module.ModelArgs.from_dict(tiny_config(name, **overrides))
    model = module.Model(args)
    parameters = dict(tree_flatten(model.parameters()))
    # Weights are lazy: a field that kept its full-size default is noticed before memory is used.
    n_parameters = sum(value.size for value in parameters.values())
    if n_parameters > most:
        raise ValueError(f"{name} is not tiny: {n_parameters} parameters")
    if name == "phi3small":
        # Ids beyond a tiny vocabulary, at which it would write out of bounds.
        model._dummy_tokenizer_ids = mx.array([], dtype=mx.int32)
    model.update(tree_unflatten(list(_random_weights(parameters, seed).items())))
    model.eval()
    mx.eval(model.parameters())
    return model


#: The model of seed 0, made once for all tests of a process; they must leave it as it is.
shared_model = functools.cache(tiny_model)


#: One architecture of each kind of attention, state and refusal; `make test-all` sweeps the others.
EVERY_KIND = frozenset(
    [
        "afm7",
        "baichuan_m1",
        "cohere2",
        "deepseek_v3",
        "deepseek_v32",
        "falcon_h1",
        "gemma2",
        "gemma3_text",
        "gemma3n",
        "gemma4_text",
        "gpt2",
        "gpt_bigcode",
        "gpt_oss",
        "jamba",
        "kimi_linear",
        "lfm2",
        "llama",
        "llama4",
        "longcat_flash",
        "mamba",
        "ministral3",
        "mistral4",
        "mixtral",
        "olmo",
        "phi3",
        "plamo2",
        "qwen3",
        "qwen3_5",
        "qwen3_next",
        "rwkv7",
    ]
)


def each_architecture(names: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrizes a sweep over architectures by ``name``.

    All sweeps test one architecture in the same process, where they share its model.
    """
    marks = {name: [pytest.mark.thorough, pytest.mark.xdist_group(name)] for name in names}
    for name in marks.keys() - EVERY_KIND:
        marks[name].append(pytest.mark.slow)
    return pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in marks.items()])


def window_fields(name: str) -> dict[str, int]:
    """The fields of the type's configuration that limit how far a layer sees, with their values."""
    config = tiny_config(name)
    fields = {**config, **config.get("text_config", {})}
    return {field: fields[field] for field in WINDOW_FIELDS if field in fields}


def _module(name: str) -> ModuleType:
    # The olmo module leaves the process when this package is missing, and uses nothing of it.
    sys.modules.setdefault("hf_olmo", ModuleType("hf_olmo"))
    return importlib.import_module(f"mlx_lm.models.{name}")


def _text_args(module: ModuleType, inner: str) -> type | None:
    """The class that reads the nested text configuration, or None where there is none."""
    if "text_config" not in _field_names(module.ModelArgs):
        return None
    inner_module = _module(inner)
    for owner in (module, inner_module):
        for name in ("TextArgs", "TextConfig", "TextModelArgs"):
            if hasattr(owner, name):
                return getattr(owner, name)
    return inner_module.ModelArgs


def _field_names(args: type) -> set[str]:
    return {field.name for field in dataclasses.fields(args)}


def _pick(offered: Config, args: type) -> Config:
    names = _field_names(args)
    return {key: value for key, value in offered.items() if key in names}


def _random_weights(parameters: dict[str, mx.array], seed: int) -> dict[str, mx.array]:
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    return {
        path: _random_parameter(path, parameters[path], key)
        for path, key in zip(sorted(parameters), keys, strict=True)
    }


def _random_parameter(path: str, initial: mx.array, key: mx.array) -> mx.array:
    *_, owner, leaf = ["", *path.split(".")]
    if initial.dtype == mx.uint32:
        return _packed(4, 16, initial, key)
    if initial.dtype == mx.uint8:
        return _packed(3, 4, initial, key)
    if leaf in ("scales", "biases"):
        # Weights of two bits are biases + scales x {0, 1, 2, 3}; centred, their variance is
        # 5/4 scales squared.
        scale = MATRIX_GAIN / math.sqrt(1.25 * QUANTIZATION_GROUP * initial.shape[-1])
        return mx.full(initial.shape, scale if leaf == "scales" else -1.5 * scale)
    noise = mx.random.normal(initial.shape, key=key)
    if leaf == "signs":
        return mx.where(noise > 0, 1.0, -1.0)
    if leaf in CONSTANTS:
        return initial
    if leaf in DISTRIBUTIONS:
        mean, std = DISTRIBUTIONS[leaf]
        return mean + std * noise
    if leaf.endswith("bias"):
        return BIAS_STD * noise
    if "norm" in owner and initial.ndim > 1:
        # Gains of each head. mlx-lm starts them at 0, a value that no checkpoint has.
        return 1 + GAIN_STD * noise
    if initial.ndim > 1 and not mx.all(initial == 1):
        n_inputs = initial.shape[-1]
        if "conv" in owner:
            n_inputs *= initial.shape[-2]
        return MATRIX_GAIN / math.sqrt(n_inputs) * noise
    return initial + GAIN_STD * noise


def _packed(n_values: int, n_digits: int, like: mx.array, key: mx.array) -> mx.array:
    """Integers that hold `n_digits` random numbers below `n_values` in two bits each."""
    digits = mx.random.randint(0, n_values, (*like.shape, n_digits), key=key).astype(mx.uint32)
    shifts = 2 * mx.arange(n_digits, dtype=mx.uint32)
    return mx.sum(mx.left_shift(digits, shifts), axis=-1).astype(like.dtype)
