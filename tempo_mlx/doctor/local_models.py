"""The models on this machine, and whether they support parallel tokens."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import CacheNotFound
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from ..errors import TempoError
from ..models import PositionedModel
from ..weights.loading import WEIGHTS, check_layers
from ..weights.recipes import VARIANTS, Recipe, recipes


@dataclass(frozen=True)
class RecipeModel:
    """One variant of a recipe's model.

    Args:
        recipe: of the model.
        variant: one of :data:`tempo_mlx.weights.recipes.VARIANTS`.
        path: its folder, whether or not it exists.
        ready: whether it has been fetched and converted.
        n_bytes: on disk.
    """

    recipe: Recipe
    variant: str
    path: Path
    ready: bool
    n_bytes: int


@dataclass(frozen=True)
class HubModel:
    """A repository in the Hub's cache.

    Args:
        repo: its id, owner/name.
        path: folder of its latest snapshot.
        n_bytes: on disk, of all revisions.
        problem: why it cannot be used; empty if it can.
        branch_bytes: of the recurrent states of one branch; 0 without recurrent layers.
    """

    repo: str
    path: Path
    n_bytes: int
    problem: str
    branch_bytes: int = 0


def recipe_models() -> list[RecipeModel]:
    """Every variant of every recipe."""
    found = []
    for recipe in recipes().values():
        for variant in VARIANTS:
            path, ready = recipe.folder(variant), recipe.is_ready(variant)
            found.append(RecipeModel(recipe, variant, path, ready, folder_bytes(path)))
    return found


def hub_models(cache: Path | None = None) -> Iterator[HubModel]:
    """Models in the Hub's cache, sorted by name. Reads their configurations, not their weights.

    Args:
        cache: the cache's folder; None for the user's.
    """
    # Passed explicitly, because scan_cache_dir reads its default only once, at import.
    cache = cache or Path(huggingface_hub.constants.HF_HUB_CACHE)
    try:
        repos = huggingface_hub.scan_cache_dir(cache).repos
    except CacheNotFound:
        return
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model" or not repo.revisions:
            continue
        latest = max(repo.revisions, key=lambda revision: revision.last_modified)
        path = Path(latest.snapshot_path)
        model = examined(path)
        why, states = (model, 0) if isinstance(model, str) else ("", model.state_bytes)
        yield HubModel(repo.repo_id, path, repo.size_on_disk, why, states)


def examined(folder: Path) -> PositionedModel | str:
    """The model in a folder without its weights, or why it does not support parallel tokens.

    The model is built from config.json with the folder's dtypes and weights that are never
    evaluated. It passes through the same checks as a loaded model.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except FileNotFoundError:
        if any(folder.glob("*.gguf")):
            return "GGUF files, which mlx-lm does not load"
        return "no config.json"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "config.json is damaged or has no model_type"
    if not any(folder.glob("*.safetensors")):
        return "no weights (*.safetensors) in the cache"
    try:
        model_class, args_class = _get_classes(config)
    except ValueError:
        return f"mlx-lm has no architecture {model_type!r}"
    # Some of mlx-lm's model files exit the process if a package is missing.
    except (ImportError, SystemExit) as error:
        return f"mlx-lm's file for {model_type!r} needs a package that is not installed: {error}"
    try:
        check_layers(folder, config)
    except TempoError as error:
        return str(error)
    try:
        model = model_class(args_class.from_dict(config))
    # A bad configuration can make mlx-lm's code raise anything, such as ZeroDivisionError.
    except Exception as error:
        return f"config.json does not fit {model_type!r}: {type(error).__name__}: {error}"
    _take_dtypes(model, folder)
    try:
        return PositionedModel(model)
    except TempoError as error:
        return str(error)


def _take_dtypes(model: nn.Module, folder: Path) -> None:
    """Give a model the dtypes of the weights in its folder, where they can be read.

    Recurrent states have the dtype of the activations: that of most weights, or of the scales of
    quantised weights.
    """
    stored: dict[str, mx.Dtype] = {}
    for file in folder.glob(WEIGHTS):
        # Loading reports damaged files.
        with suppress(RuntimeError, ValueError, OSError):
            arrays: Any = mx.load(str(file))  # reads the names only
            stored |= {name: array.dtype for name, array in arrays.items()}
    floating = {n: dtype for n, dtype in stored.items() if mx.issubdtype(dtype, mx.floating)}
    if floating:
        model.set_dtype(Counter(floating.values()).most_common(1)[0][0])
        own: Any = tree_flatten(model.parameters())
        kept = [(name, x.astype(floating[name])) for name, x in own if name in floating]
        model.update(tree_unflatten(kept))


def folder_bytes(path: Path) -> int:
    """Total bytes of the files in a folder; 0 if it does not exist."""
    if not path.is_dir():
        return 0
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def size(n_bytes: int) -> str:
    """A number of bytes in a readable unit, such as "98.4 MB"."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.2f} GB"
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.1f} kB"
