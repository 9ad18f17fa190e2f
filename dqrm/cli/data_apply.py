"""``dqrm data apply``: new rows prepared as an existing data set was."""

from pathlib import Path
from typing import cast

import click

from dqrm.cli.data_prepare import PREPARE_MODEL, SourceOrOverride, print_report, split_arguments
from dqrm.cli.framework import DqrmCommand

_EXAMPLES = [
    ("dqrm data apply tomorrow.txt --like prepared/kaggle -o prepared/tomorrow", "as a test split"),
    (
        "dqrm data apply new.parquet --like prepared/clicks -o prepared/new format=parquet",
        "the same columns from another format",
    ),
]


@click.command("apply", cls=DqrmCommand, examples=_EXAMPLES)
@click.argument(
    "arguments", nargs=-1, type=SourceOrOverride(PREPARE_MODEL), metavar="FILE... [KEY=VALUE]..."
)
@click.option(
    "--like",
    type=click.Path(path_type=Path),
    required=True,
    help="Data set whose columns and vocabularies are used.",
)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="test",
    show_default=True,
    help="Split that all rows go to.",
)
@click.option("--overwrite", is_flag=True, help="Drop what the folder holds, finished or not.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def apply(
    arguments: tuple[str, ...],
    like: Path,
    output: Path,
    split: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Prepare new rows with the vocabulary of a data set.

    A model trained on that data set can be measured on the result. Values that were not seen in
    training become the unknown id. KEY=VALUE changes how the files are read, such as format.
    """
    from dqrm.data.pool import use_one_thread

    use_one_thread()
    from dqrm.cli.progress import ProgressDisplay
    from dqrm.configuration import ConfigError, keys_at, parse_override, suggestion
    from dqrm.data.apply import apply as run
    from dqrm.data.config import PrepareConfig

    files, overrides = split_arguments(arguments)
    changes = {}
    for override in map(parse_override, overrides):
        if len(override.path) > 1 or override.key not in keys_at(PrepareConfig, ()):
            hint = suggestion(PrepareConfig, override.path)
            raise ConfigError(f"{override.key}: not a setting of reading; {hint}")
        changes[override.key] = override.value
    if not files:
        raise click.UsageError("name at least one file to prepare")
    if str(like) == "census" and not like.is_dir():
        # Not by opening the data set: that loads torch, which takes longer than many files do.
        from dqrm.data.census import cached_census

        like = cached_census()
    with ProgressDisplay() as display:
        report = run(
            like,
            cast("list[str | Path]", files),
            output,
            split=split,  # type: ignore[arg-type]  # click has checked it
            changes=changes,
            overwrite=overwrite,
            progress=lambda p: display.show(p.phase, p.done, p.total, p.unit),
        )
    print_report(report, as_json)
