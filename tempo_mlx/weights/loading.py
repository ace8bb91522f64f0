"""Load a model and its tokenizer by recipe name, folder in mlx-lm's layout, or Hub id."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..arguments import shown
from ..errors import TempoError
from .recipes import VARIANTS, prepare, recipes

#: Files in which mlx-lm looks for weights.
WEIGHTS = "model*.safetensors"

#: Files that hold a complete tokenizer, the usual one first; and other vocabulary files.
WHOLE_TOKENIZERS = ("tokenizer.json", "tekken.json")
OTHER_VOCABULARIES = ("*.model", "*.tiktoken")

#: Files of byte-pair and word tokenizers, which consist of several files.
BYTE_PAIRS, WORDS = ("vocab.json", "merges.txt"), ("vocab.txt",)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

#: Configuration keys that count layers, and the most layers that are built.
LAYERS = re.compile(r"(num|n)_([a-z]+_)*layers?")
MOST_LAYERS = 1000


class ModelLoadError(TempoError):
    """A model cannot be loaded. One line says why and what to do."""


def load(
    path_or_hf_repo: str | Path = "smollm2-135m",
    *,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    revision: str | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model and its tokenizer with mlx-lm's loader.

    Args:
        path_or_hf_repo: the name of a recipe, which is fetched and converted on first use; append
            "/q4" or "/fp32" to choose a variant instead of the one that suits the device. Or a
            folder in mlx-lm's layout, quantised or not. Or the id of such a repository on the Hub.
        tokenizer_config: keyword arguments for the tokenizer. Code that comes with a model is not
            run, except the tokenizer's if "trust_remote_code" is True here.
        model_config: fields that override config.json.
        adapter_path: a folder with mlx-lm adapters to apply to the weights.
        lazy: leave the weights on disk until they are used.
        revision: branch, tag or commit of a repository on the Hub.

    Returns:
        mlx-lm's model and tokenizer wrapper, as returned by `mlx_lm.load`.

    Raises:
        ModelLoadError: if no model has that name, or it is damaged, incomplete or unreachable, or
            needs custom code or an architecture that mlx-lm does not support.
        RecipeError: if the recipe's model cannot be prepared.
    """
    folder = locate(path_or_hf_repo, revision)
    _check_folder(folder)
    if adapter_path is not None:
        _check_adapters(Path(adapter_path))
    config = _read_config(folder) | (model_config or {})
    if (own := config.get("model_file")) is not None:
        raise ModelLoadError(f"{folder} needs custom code ({own}), which is not run")
    check_layers(folder, config)
    model = _load_model(folder, config["model_type"], lazy, model_config)
    if adapter_path is not None:
        model = _load_adapters(model, Path(adapter_path))
    # The model's name in results: a recipe with its variant, a folder, or a Hub id.
    path = Path(path_or_hf_repo)
    known = recipes()
    name = str(path_or_hf_repo).partition("/")[0]
    is_recipe = name in known and not path.exists()
    model.start_of_text = known[name].start if is_recipe else None
    model.loaded_as = "/".join(folder.parts[-2:]) if is_recipe else str(path_or_hf_repo)
    return model, _load_tokenizer(folder, config, tokenizer_config)


def locate(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """The folder that `load` reads for a name. Fetches the model if necessary.

    Raises:
        ModelLoadError, RecipeError: as `load`.
    """
    name = str(path_or_hf_repo)
    known = recipes()
    recipe, _, variant = name.partition("/")
    path = Path(name).expanduser()
    is_recipe = recipe in known and (variant in ("", *VARIANTS) or not path.exists())
    if revision is not None and (is_recipe or path.exists()):
        raise ModelLoadError(f"revision {revision!r} is for Hub ids, and {name} is not one")
    if is_recipe:
        return prepare(known[recipe], variant or None)
    if path.suffix == ".gguf":
        raise ModelLoadError(
            f"{name} is a GGUF file, which mlx-lm does not load; convert the original model with "
            "mlx_lm.convert, or take a converted one from mlx-community on the Hub"
        )
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError(f"{name} is a file; name the folder that has config.json")
    if HUB_ID.fullmatch(name) is None:
        raise ModelLoadError(
            f"{name!r} is not a recipe ({', '.join(known)}), a folder or a Hub id (owner/name)"
        )
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    """A snapshot of a repository on the Hub; from the cache if it is there."""
    nowhere = f"{name} is not a folder here, and"
    try:
        return Path(
            mlx_lm.utils.snapshot_download(
                name, revision=revision, allow_patterns=mlx_lm.utils.DEFAULT_ALLOW_PATTERNS
            )
        )
    except (OSError, HFValidationError) as error:
        causes = list(_causes(error))
        if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
            message = f"{name} has no revision {revision!r} on the Hub"
        elif any(isinstance(cause, GatedRepoError) for cause in causes):
            message = f"{name} is gated: accept its terms on the Hub, then run `hf auth login`"
        elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            message = f"{nowhere} the Hub has no repository of that name that you may read"
        elif any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
            message = f"{nowhere} not in the cache, and the Hub is switched off (HF_HUB_OFFLINE)"
        elif isinstance(error, LocalEntryNotFoundError):
            message = f"{nowhere} the Hub cannot be reached ({_line(causes[-1])})"
        else:
            message = f"{nowhere} fetching it from the Hub failed: {_line(error)}"
        raise ModelLoadError(message) from error


def _check_folder(folder: Path) -> None:
    """ModelLoadError unless the folder has a config.json and weights."""
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        raise ModelLoadError(
            f"{folder} has no config.json"
            + (f", only {ggufs[0].name}, and mlx-lm does not load GGUF" if ggufs else "")
            + "; name a folder written by mlx_lm.convert"
        )
    if not any(folder.glob(WEIGHTS)):
        missing = _missing_weights(folder) or [WEIGHTS]
        raise ModelLoadError(f"weights are missing from {folder}: {', '.join(missing)}")


def _missing_weights(folder: Path) -> list[str]:
    """Missing weight files: listed in the index, and with tensors that no other file has.

    The index may be outdated, so files without missing tensors are ignored.
    """
    try:
        text = (folder / "model.safetensors.index.json").read_text(encoding="utf-8")
        places = json.loads(text)["weight_map"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    there = {
        name for path in folder.glob(WEIGHTS) for name in cast(dict[str, Any], mx.load(str(path)))
    }
    wanted = {str(file) for name, file in places if name not in there}
    return sorted(file for file in wanted if not (folder / file).is_file())


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = mlx_lm.utils.load_config(folder)
        if not isinstance(config["model_type"], str):
            raise TempoError("model_type is not a string")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = "has no model_type" if isinstance(error, KeyError) else f"is damaged: {_line(error)}"
        raise ModelLoadError(f"{folder / 'config.json'} {what}") from error
    return config


def check_layers(folder: Path, config: dict[str, Any]) -> None:
    """ModelLoadError if config.json has more layers than mlx-lm can build in reasonable time."""
    layers = max(_layer_counts(config), default=0)
    if layers > MOST_LAYERS:
        raise ModelLoadError(
            f"{folder / 'config.json'} is damaged: it has {shown(layers)} layers, and no model has "
            f"more than {MOST_LAYERS}"
        )


def _layer_counts(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _layer_counts(value)
        elif LAYERS.fullmatch(name) and isinstance(value, int):
            yield value


def _load_model(
    folder: Path, model_type: str, lazy: bool, model_config: dict[str, Any] | None = None
) -> nn.Module:
    try:
        model, _ = mlx_lm.utils.load_model(folder, lazy=lazy, model_config=model_config)
    except RuntimeError as error:
        raise ModelLoadError(
            f"the weights in {folder} are damaged or incomplete ({_line(error)}); fetch them again"
        ) from error
    # A bad configuration can make mlx-lm's code raise anything, such as ZeroDivisionError.
    except Exception as error:
        if str(error).startswith("Model type"):
            version = mlx_lm.__version__
            message = f"mlx-lm {version} has no architecture {model_type!r}, which {folder} needs"
        elif missing := _missing_weights(folder):
            message = f"weights are missing from {folder}: {', '.join(missing)}"
        else:
            message = f"{folder} does not fit the architecture {model_type!r}: {_line(error)}"
        raise ModelLoadError(message) from error
    except SystemExit as error:  # as mlx-lm's olmo.py does where its package is missing
        raise ModelLoadError(
            f"mlx-lm's file for {model_type!r} needs a package that is not installed"
        ) from error
    return model


def _check_adapters(folder: Path) -> None:
    """ModelLoadError unless the folder has adapters as mlx-lm trains them."""
    if (folder / "adapters.safetensors").is_file():
        return
    if found := sorted(folder.glob("adapter_model.*")):
        raise ModelLoadError(
            f"adapter_path {folder} holds adapters of PEFT ({found[0].name}), which mlx-lm does "
            "not read; merge them into their model with PEFT (merge_and_unload, save_pretrained) "
            "and convert what that writes with mlx_lm.convert"
        )
    raise ModelLoadError(f"adapter_path {folder} has no adapters.safetensors")


def _load_adapters(model: nn.Module, adapter_path: Path) -> nn.Module:
    try:
        model = mlx_lm.utils.load_adapters(model, str(adapter_path))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(
            f"adapters in {adapter_path} cannot be applied to the model: {_line(error)}"
        ) from error
    model.eval()
    return model


def _load_tokenizer(
    folder: Path, config: dict[str, Any], tokenizer_config: dict[str, Any] | None
) -> TokenizerWrapper:
    # By default, transformers asks on standard output and runs the code if the user agrees.
    given = {"trust_remote_code": False, **(tokenizer_config or {})}
    try:
        tokenizer = mlx_lm.utils.load_tokenizer(
            folder, given, eos_token_ids=config.get("eos_token_id")
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions
        if "trust_remote_code" in str(error):
            raise ModelLoadError(
                f"the tokenizer in {folder} needs custom code, which is not run"
            ) from error
        has_words = (folder / "vocab.txt").is_file()
        missing = _missing_vocabulary(folder, WORDS if has_words else BYTE_PAIRS)
        why = f"{_listed(missing)} missing" if missing else _line(error)
        raise ModelLoadError(f"the tokenizer in {folder} cannot be used: {why}") from error
    # Some transformers classes silently make a tokenizer without a vocabulary.
    if missing := _missing_vocabulary(folder, tokenizer.vocab_files_names.values()):
        raise ModelLoadError(
            f"the tokenizer in {folder} cannot be used: {_listed(missing)} missing"
        )
    return tokenizer


def _missing_vocabulary(folder: Path, names: Iterable[str]) -> list[str]:
    """Missing files of a tokenizer that no other file replaces.

    Args:
        folder: of the model.
        names: of all files that together replace tokenizer.json.
    """
    if any((folder / name).is_file() for name in WHOLE_TOKENIZERS):
        return []
    if any(any(folder.glob(pattern)) for pattern in OTHER_VOCABULARIES):
        return []
    parts = set(names) - set(WHOLE_TOKENIZERS)
    absent = sorted(name for name in parts if not (folder / name).is_file())
    if parts and not absent:
        return []
    # The files that exist show which form the tokenizer has.
    return absent if len(absent) < len(parts) else [WHOLE_TOKENIZERS[0]]


def _listed(names: list[str]) -> str:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, the cause's cause, and so on."""
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__


def _line(error: BaseException, length: int = 200) -> str:
    """An error's text on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[: length - 3] + "..."
