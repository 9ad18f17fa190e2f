"""``dqrm pipeline import``: DeepSpeed's compression settings as a pipeline."""

from pathlib import Path
from typing import Any

import click

from dqrm.cli.framework import DqrmCommand

_MODEL = "path/to/model"
_TRAIN = "path/to/train.tsv"


@click.command(
    "import",
    cls=DqrmCommand,
    examples=[
        ("dqrm pipeline import ds_config.json > compress.yaml", "then set model and data in it"),
        (
            "dqrm pipeline import ds_config.json --model bert-sst2 --train train.tsv > sst2.yaml",
            "ready to run",
        ),
    ],
)
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--model", default=_MODEL, help="Folder of the model to compress.")
@click.option("--train", default=_TRAIN, help="Table to train on.")
@click.option("--dev", help="Table to select on; a part of the other where not given.")
def import_(source: Path, model: str, train: str, dev: str | None) -> None:
    """Turn DeepSpeed's compression settings into a pipeline.

    Reads compression_training, quantize_training and eigenvalue, which DeepSpeed itself refuses
    since release 0.19.8. The pipeline goes to standard output; what has no effect in it, or had
    another one there than its name says, is told on standard error.
    """
    import yaml

    from dqrm.compress.compat.deepspeed import load

    found = load(source)
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)
    stage: dict[str, Any] = {
        "stage": "compress",
        "model": model,
        "data": {"train": train} | ({} if dev is None else {"dev": dev}),
        **found.training,
    }
    if found.layers is not None:
        stage["layers"] = found.layers if isinstance(found.layers, int) else [*found.layers]
    if found.transforms:
        stage["transforms"] = [
            transform.model_dump(mode="json", exclude_unset=True) for transform in found.transforms
        ]
    _check(source, stage)
    head = f"# From {source.name} of DeepSpeed.\n"
    if model == _MODEL or train == _TRAIN:
        head += "# Set model and data first.\n"
    text = yaml.safe_dump({"stages": [stage]}, sort_keys=False, width=100)
    click.echo(head + text, nl=False)


def _check(source: Path, stage: dict[str, Any]) -> None:
    """Refuse what would make no stage: its rules may be stricter than those of DeepSpeed."""
    from pydantic import ValidationError

    from dqrm.configuration import ConfigError, first_fault
    from dqrm.pipelines.config import PipelineConfig

    tree = {"stages": [stage]}
    try:
        PipelineConfig.model_validate(tree)
    except ValidationError as error:
        fault = first_fault(error, tree).removeprefix("stages.0.")
        raise ConfigError(f"{source}: {fault}") from error
