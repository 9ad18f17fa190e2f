"""``dqrm data describe``: what is in a prepared data set."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from dqrm.cli.framework import DqrmCommand
from dqrm.cli.outputs import PictureFile

_EXAMPLES = [
    ("dqrm data describe census", "the built-in example"),
    ("dqrm data describe prepared/kaggle --embedding-dim 64 --plot kaggle.png", "and a picture"),
    ("dqrm data describe prepared/kaggle --json", "for a script"),
]


@click.command("describe", cls=DqrmCommand, examples=_EXAMPLES)
@click.argument("dataset", metavar="DATASET")
@click.option(
    "--embedding-dim",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Width of the embedding rows whose memory is shown.",
)
@click.option("--plot", type=PictureFile(), metavar="PNG", help="Also draw a picture.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def describe(dataset: str, embedding_dim: int, plot: Path | None, as_json: bool) -> None:
    """Show what is in a data set.

    Rows and positive rate of each split; cardinality, missing rate, unknown rate and skew of
    each column; the memory that the embedding tables of a model would need.
    """
    from dqrm.data import describe as describing
    from dqrm.data.dataset import PreparedDataset

    path = PreparedDataset.open(dataset).path
    description = describing.describe(path, embedding_dim=embedding_dim)
    if as_json:
        click.echo(json.dumps(asdict(description), indent=2, default=str))
    else:
        click.echo(describing.render(description))
    if plot is not None:
        describing.plot(description, plot)
        click.echo(f"picture in {plot}", err=True)
