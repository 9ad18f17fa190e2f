"""``dqrm champion``: which version of a model serves, and roll-back to another."""

from datetime import datetime

import click

from dqrm.cli.framework import DqrmCommand
from dqrm.text import table


@click.command(
    "champion",
    cls=DqrmCommand,
    examples=[
        ("dqrm champion clicks", "its versions, newest first"),
        ("dqrm champion clicks --back", "the one before it serves again"),
        ("dqrm champion clicks --to 3", "version 3 serves"),
    ],
)
@click.argument("name")
@click.option("--to", "version", metavar="VERSION", help="Make this version the champion.")
@click.option("--back", is_flag=True, help="Make the version with the alias previous it.")
@click.option("--tracking-uri", metavar="URI", help="MLflow store or server.")
def champion(name: str, version: str | None, back: bool, tracking_uri: str | None) -> None:
    """Show which version of a model serves, and roll back to another.

    Versions are those of MLflow's registry; the one that serves has the alias champion. Pipelines
    that name models:/NAME@champion go on from the version chosen here.
    """
    from dqrm.tracking.config import TrackingConfig
    from dqrm.tracking.model_reference import CHAMPION, PREVIOUS
    from dqrm.tracking.registry import Registry

    if version is not None and back:
        raise click.UsageError("--to and --back both say which version; give one of them")
    registry = Registry.of(TrackingConfig(uri=tracking_uri))
    versions = {str(found.version): found for found in registry.versions(name)}
    if not versions:
        raise click.UsageError(f"no model {name} has versions in {registry.uri}")
    aliases = registry.aliases(name)
    if back:
        version = aliases.get(PREVIOUS)
        if version is None:
            raise click.UsageError(f"no version of {name} has the alias {PREVIOUS}; use --to")
    if version is not None:
        if version not in versions:
            raise click.UsageError(f"{name} has no version {version}: {', '.join(versions)}")
        registry.crown(name, version)
        click.echo(f"version {version} of {name} is the {CHAMPION}")
        return
    rows = [
        (
            number,
            ", ".join(alias for alias, of in aliases.items() if of == number),
            f"{datetime.fromtimestamp(found.creation_timestamp / 1000):%Y-%m-%d %H:%M}",
            found.tags.get("dqrm.promotion.reason", ""),
            str(found.run_id or ""),
        )
        for number, found in reversed(versions.items())
    ]
    click.echo(table(("version", "alias", "made", "because", "run"), rows, left=5))
