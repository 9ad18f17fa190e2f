"""``dqrm configs``: the configurations shipped with the package."""

from pathlib import Path

import click

from dqrm.cli.framework import DqrmCommand, LazyGroup
from dqrm.cli.options import ConfigSource


@click.group(
    "configs",
    cls=LazyGroup,
    lazy={
        "ls": ("dqrm.cli.configs:ls", "List the shipped configurations."),
        "cp": ("dqrm.cli.configs:cp", "Copy one to edit it."),
    },
    help="List and copy the shipped configurations.",
)
def configs() -> None:
    """Hold the commands."""


@click.command("ls", cls=DqrmCommand, examples=[("dqrm configs ls", "names and what they are for")])
def ls() -> None:
    """List the shipped configurations."""
    from dqrm.configuration import shipped_configs

    names = shipped_configs()
    width = max(map(len, names), default=0)
    for name, line in names.items():
        click.echo(f"{name:<{width}}  {line}".rstrip())


@click.command(
    "cp",
    cls=DqrmCommand,
    examples=[
        ("dqrm configs cp census", "writes census.yaml in this folder"),
        ("dqrm configs cp census mine.yaml", "under another name"),
    ],
)
@click.argument("name", type=ConfigSource())
@click.argument("destination", type=click.Path(path_type=Path), required=False)
@click.option("--force", "-f", is_flag=True, help="Overwrite an existing file.")
def cp(name: str, destination: Path | None, force: bool) -> None:
    """Copy one to edit it.

    DESTINATION is a file or a folder; NAME.yaml in this folder when not given.
    """
    from dqrm.configuration import shipped_text

    copy_shipped(shipped_text(name), f"{Path(name).name}.yaml", destination, force=force)


def copy_shipped(text: str, name: str, destination: Path | None, *, force: bool) -> None:
    """Write a file that is shipped, and say where.

    Args:
        text: of the file.
        name: in a folder.
        destination: a file, or a folder; None takes the current one.
        force: whether to overwrite a file.
    """
    from dqrm.data.files import write_text

    target = destination or Path()
    if target.is_dir():
        target = target / name
    if target.exists() and not force:
        raise click.UsageError(f"{target} exists; give another name, or --force to overwrite it")
    if not target.parent.is_dir():
        raise click.UsageError(f"{target.parent}: no such folder")
    write_text(target, text)
    click.echo(str(target))
