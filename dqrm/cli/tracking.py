"""``dqrm tracking``: the records that a tracking store missed."""

from pathlib import Path

import click

from dqrm.cli.errors import ExitCode
from dqrm.cli.framework import DqrmCommand, LazyGroup


@click.group(
    "tracking",
    cls=LazyGroup,
    lazy={
        "sync": ("dqrm.cli.tracking:sync", "Upload what runs could not while their store was away.")
    },
    help="Upload what a lost tracking server missed.",
)
def tracking() -> None:
    """Hold the commands."""


@click.command(
    "sync",
    cls=DqrmCommand,
    examples=[
        ("dqrm tracking sync", "every run under runs/ that still waits"),
        ("dqrm tracking sync runs/fp32", "one run"),
    ],
)
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[RUN|FOLDER]...")
def sync(folders: tuple[Path, ...]) -> int:
    """Upload what runs could not while their store was away.

    Safe to stop and to repeat: what is in the store stays there, the rest waits on disk.
    """
    from dqrm.tracking.errors import StoreError
    from dqrm.tracking.sync import find_spools, sync_spool

    for folder in folders:
        if not folder.is_dir():
            raise click.UsageError(f"{folder}: no such folder")
    # Evaluations lie in the folder of the run they measured.
    places = [
        place
        for folder in folders or [Path("runs")]
        for place in (folder, *folder.glob("evaluations"), *folder.glob("*/evaluations"))
    ]
    waiting = find_spools(places)
    if not waiting:
        click.echo("nothing waits for an upload")
        return ExitCode.DONE
    code = ExitCode.DONE
    for run_dir in waiting:
        try:
            result = sync_spool(run_dir)
        except (StoreError, ValueError) as error:
            click.echo(f"Error: {run_dir}: {error}", err=True)
            code = ExitCode.FAILED
            continue
        click.echo(
            f"{run_dir}: {result.records} records uploaded to run {result.run_id} in "
            f"{result.uri}, status {result.status}"
        )
        if result.rejected:
            click.echo(
                f"warning: the store refused {result.rejected} records; they are in "
                f"{run_dir / 'tracking-rejected.jsonl'}",
                err=True,
            )
    return code
