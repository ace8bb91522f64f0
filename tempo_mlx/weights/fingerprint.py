"""Fingerprints of models: of configuration, weights and tokenizer, independent of names."""

import dataclasses
import enum
import functools
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

#: Suffixes of settings that hold a path or a name.
_NAMES = ("name", "path", "file", "loaded_as", "transformers_version")

_NOT_COUNTED = object()


def identify(model: nn.Module, tokenizer: Any) -> str:
    """32 hexadecimal digits, a hash of everything that determines a model's output.

    They do not depend on where the model was loaded from. They change with its configuration, its
    weights, its tokenizer and the tokens that end a text.
    """
    ends = sorted(tokenizer.eos_token_ids)
    return _digest([fingerprint(model), tokenizer_fingerprint(tokenizer), ends])


def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits, a hash of a model's configuration and weights.

    The configuration is the class of every module and its public attributes: numbers, texts, and
    lists, dictionaries and dataclasses of them, such as ``model.args``. Names and paths are left
    out. Each parameter contributes its name, shape, type and bits.

    The result is not cached, because parameters may change in place. Each call reads all weights.
    """
    digest = hashlib.sha256()
    for name, module in sorted(model.named_modules(), key=itemgetter(0)):
        digest.update(_json([name, _class_name(module), _settings(module)]))
    flat = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    parameters = dict(sorted(flat, key=itemgetter(0)))
    for name, found in zip(parameters, _hashes(list(parameters.values())), strict=True):
        parameter = parameters[name]
        digest.update(_json([name, parameter.shape, str(parameter.dtype), found]))
    return digest.hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """32 hexadecimal digits, a hash of everything that determines encoding and decoding.

    This includes the vocabulary with its rules and added tokens, the special tokens, and the chat
    template. Added end tokens are left out.
    """
    inner = tokenizer._tokenizer if isinstance(tokenizer, TokenizerWrapper) else tokenizer
    settings = {
        name: getattr(inner, name, None)
        for name in (
            "special_tokens_map",
            "chat_template",
            "clean_up_tokenization_spaces",
            "split_special_tokens",
        )
    }
    # Some of mlx-lm's chat templates are functions.
    template = getattr(tokenizer, "_chat_template", None)
    settings["template_function"] = getattr(template, "__module__", None)
    return _digest([type(inner).__name__, _plain(settings), _vocabulary(inner)])


def _vocabulary(tokenizer: Any) -> Any:
    """The ids and rules of a tokenizer, in whichever form it provides."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _rules(backend.to_str())
    if hasattr(tokenizer, "get_vocab"):
        return [tokenizer.get_vocab(), [_digest_of_file(path) for path in _files(tokenizer)]]
    return [tokenizer.decode([id]) for id in range(len(tokenizer))]


@functools.lru_cache(maxsize=2)
def _rules(backend: str) -> str:
    """Digest of a fast tokenizer's JSON, without truncation and padding, which calls change."""
    rules = json.loads(backend)
    for name in ("truncation", "padding"):
        rules.pop(name, None)
    return _digest(rules)


def _files(tokenizer: Any) -> Iterator[Path]:
    """The vocabulary files of a slow tokenizer."""
    for name in sorted(getattr(tokenizer, "vocab_files_names", {})):
        path = getattr(tokenizer, name, None) or tokenizer.init_kwargs.get(name)
        if path is not None and Path(path).is_file():
            yield Path(path)


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _class_name(module: nn.Module) -> str:
    # PositionedModel replaces some classes.
    kind = getattr(module, "stands_for", type(module))
    return f"{kind.__module__}.{kind.__qualname__}"


def _settings(module: nn.Module) -> Any:
    return _plain({**vars(module), **module})


def _plain(value: Any) -> Any:
    """A setting as JSON data, or :data:`_NOT_COUNTED`."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, enum.Enum | mx.Dtype):
        return str(value)
    if isinstance(value, list | tuple):
        return _counted(enumerate(value))
    if isinstance(value, dict) and not isinstance(value, nn.Module):
        return _counted(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _counted((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    return _NOT_COUNTED


def _counted(items: Any) -> dict[str, Any]:
    plain = {str(key): _plain(value) for key, value in items if _counts(str(key))}
    return {key: value for key, value in plain.items() if value is not _NOT_COUNTED}


def _counts(key: str) -> bool:
    return not key.startswith("_") and not key.endswith(_NAMES)


def _hashes(parameters: list[mx.array]) -> list[str]:
    """SHA-256 of the bits of each parameter."""
    # Nothing is copied if the device shares the host's memory.
    views = [memoryview(cast(Any, p.reshape(-1).view(mx.uint8))) for p in parameters]
    with ThreadPoolExecutor() as threads:
        return list(threads.map(lambda view: hashlib.sha256(view).hexdigest(), views))


def _json(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True).encode()


def _digest(data: Any) -> str:
    return hashlib.sha256(_json(data)).hexdigest()[:32]
